"""A snapshot that was asked for, and one that was taken."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.snapshot.epoch import Epoch


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A committed snapshot."""

    step: int
    epoch: Epoch
    slot: int
    durable: bool
    """Whether its slot stays as it is until `release`, so that it can be written to storage."""
    meta: dict[str, Any]
    time: float
    """Unix seconds of the commit."""
    bytes: int
    """Of this rank's part."""
    copy_s: float
    """From `take` until the copy stood; this rank's."""
    protect_s: float
    """From then on until the node's parity stood; 0 but on a node's first rank."""
    encode_s: float
    sent_s: float
    sent_bytes: int
    """Parity work of this node; 0 but on its first rank."""


NO_WORK: dict[str, Any] = dict.fromkeys(
    ("bytes", "copy_s", "protect_s", "encode_s", "sent_s", "sent_bytes"), 0
)


@dataclass(kw_only=True)
class Request:
    """A snapshot on its way."""

    step: int
    chunks: Callable[[], dict[str, Chunk]]
    """Found in the thread: there may be thousands."""
    eager: dict[str, Chunk]
    ready: "torch.cuda.Event | None"
    meta: Mapping[str, Any]
    durable: bool
    may_skip: bool
    start: float = field(default_factory=time.perf_counter)
    copied: threading.Event = field(default_factory=threading.Event)
    issued: "torch.cuda.Event | None" = None
