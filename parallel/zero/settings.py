"""What all units of a rank share."""

from dataclasses import dataclass

import torch

from phalanx.parallel.zero.collectives import Lane
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Number formats of one run."""

    params: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Groups, lanes and formats."""

    config: ZeroConfig
    groups: Groups
    dtypes: Dtypes
    device: torch.device
    """Where modules compute."""
    param_lane: Lane
    grad_lane: Lane
