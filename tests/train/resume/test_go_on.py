"""A resume that falls back to an older state after a loading has failed half-way."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from phalanx.checkpoint.manager import CheckpointManager
from phalanx.fault.events import EventLog
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.engine.step import Engine
from phalanx.train.resume.go_on import go_on


class _Engine:
    def __init__(self) -> None:
        self.moment, self.owed = torch.ones(2), torch.ones(2)  # what a broken loading has left

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"model.w": torch.zeros(2), "optim.exp_avg.w": self.moment}

    def rank_tensors(self) -> dict[str, torch.Tensor]:
        return {"residual.0.w": self.owed}


def _go_on(*found: set[str]) -> _Engine:
    """Resume where of these states all but the last turn out to be broken."""

    def resume(wanted: Callable[..., dict[str, torch.Tensor]]) -> None:
        for names in found:
            assert wanted(4, names, {}).keys() <= names

    engine = _Engine()
    done = go_on(
        cast(CheckpointManager, SimpleNamespace(resume=resume)),
        cast(Engine, engine),
        Config(),
        ranks=Ranks(rank=0, world_size=1),
        events=EventLog(None),
    )
    assert done.step == 0
    return engine


def test_what_a_broken_checkpoint_left_in_the_state_is_never_trained_on() -> None:
    weights, whole = {"model.w"}, {"model.w", "optim.exp_avg.w", "rng.cpu.0"}
    _go_on(weights)
    older = _go_on(whole | {"residual.0.w"}, whole)
    assert not older.rank_tensors()["residual.0.w"].any()
    with pytest.raises(ValueError, match=r"of step 4 there are weights alone, and all that is new"):
        _go_on(whole, weights)
