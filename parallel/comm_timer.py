"""Seconds that a rank's host stood waiting in collectives.

On CPU a collective runs in gloo's threads and the host blocks where it needs the result. In
Python it does so in two places only: `Work.wait` (c10d's synchronous collectives and
point-to-point, FSDP2, pipelining) and `_functional_collectives.wait_tensor` (DTensor). While a
`CommTimer` is entered, both are wrapped and the time inside them is added up.

What is not seen: waits inside C++ (autograd of functional collectives, `monitored_barrier`,
compiled code), and waits of other threads than the one that entered, such as a background
checkpoint, because they do not hold up the step.

On CUDA the host only enqueues and never blocks, so there is nothing to measure: `seconds` is NaN
there, not 0. A profiler trace shows NCCL's kernels instead.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional


class CommTimer:
    """Adds up this thread's waits while entered; puts torch's own functions back at exit."""

    def __init__(self, *, device_type: str) -> None:
        """`device_type`: "cpu" measures; on any other the host does not wait."""
        self._measures = device_type == "cpu"
        self._seconds = 0.0
        self._depth = 0
        self._thread: int | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def seconds(self) -> float:
        """Seconds waited since the timer was made; NaN where the host does not wait."""
        return self._seconds if self._measures else float("nan")

    def __enter__(self) -> "CommTimer":
        if self._thread is not None:
            raise RuntimeError("CommTimer is entered already; one context at a time")
        self._thread = threading.get_ident()
        if self._measures:
            self._wrap(dist.Work, "wait")
            self._wrap(functional, "wait_tensor")
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._thread = None

    def _wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)
        setattr(owner, name, self._timed(original))
        self._undo.append(lambda: setattr(owner, name, original))

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            # is_compiling comes first: under torch.compile the rest must not be traced.
            if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._depth += 1
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:  # a wait inside a wait counts once
                    self._seconds += time.perf_counter() - begin

        return wait
