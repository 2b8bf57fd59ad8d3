"""A resume that falls back to an older state after a loading has failed half-way."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from phalanx.checkpoint.manager import CheckpointManager
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.step import Engine
from phalanx.train.trainer import Trainer


class _Engine:
    def __init__(self) -> None:
        self.moment, self.owed = torch.ones(2), torch.ones(2)  # what a broken loading has left

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"model.w": torch.zeros(2), "optim.exp_avg.w": self.moment}

    def rank_tensors(self) -> dict[str, torch.Tensor]:
        return {"residual.0.w": self.owed}


def _resuming(*found: set[str]) -> Trainer:
    """A trainer before it resumes; of these states, all but the last turn out to be broken."""

    def resume(wanted: Callable[..., dict[str, torch.Tensor]]) -> None:
        for names in found:
            assert wanted(4, names, {}).keys() <= names

    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.engine = Config(), cast(Engine, _Engine())
    trainer.ranks = Ranks(rank=0, world_size=1)
    trainer.checkpoints = cast(CheckpointManager, SimpleNamespace(resume=resume))
    return trainer


def test_what_a_broken_checkpoint_left_in_the_state_is_never_trained_on() -> None:
    weights, whole = {"model.w"}, {"model.w", "optim.exp_avg.w", "rng.cpu.0"}
    assert _resuming(weights)._resume() == 0
    older = _resuming(whole | {"residual.0.w"}, whole)
    assert older._resume() == 0
    assert not older.engine.rank_tensors()["residual.0.w"].any()
    with pytest.raises(
        ValueError, match=r"of step 4 there are weights alone, and all that is newe"
    ):
        _resuming(whole, weights)._resume()
