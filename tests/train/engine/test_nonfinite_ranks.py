"""A number that is not finite ends the step on every rank, with the parameter's name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.executor import Inputs, LossFn
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import PrecisionConfig
from phalanx.train.engine.step import Engine
from tests.small_run import make_config, make_engine, rank_batch

FIRST, LAST = "layers.0.feed_forward.w1.weight", "layers.4.attention.wq.weight"
LAYOUTS = ({"dp_shard": 2}, {"pp": 2, "dp_shard": 1})


@torch.no_grad()
def poison_last_row(tensor: Tensor, value: float) -> None:
    """Spoil one number; of a sharded tensor just the last rank has it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    begin = 0
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        begin = -(-tensor.shape[0] // mesh.size()) * mesh.get_local_rank()
    if begin + local.shape[0] == tensor.shape[0]:
        local[-1, 1] = value


class Spoiled:
    """An executor that spoils one finished gradient."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.inner, self.parameter = engine.model.executor, engine.model.parameters.get(name)

    def backward(self, inputs: Inputs, loss_fn: LossFn) -> Tensor:
        loss = self.inner.backward(inputs, loss_fn)
        if self.parameter is not None:
            assert self.parameter.grad is not None
            poison_last_row(self.parameter.grad, float("inf"))
        return loss


def error_of(engine: Engine) -> str:
    try:
        engine.gradients(rank_batch(engine))
    except FloatingPointError as error:
        return str(error)
    return "no error"


def errors(ranks: Ranks) -> list[str]:
    """What this rank says, by layout and defect: none, NaN weight, infinite weight, gradient."""
    said = []
    with process_group(ranks):
        for layout in LAYOUTS:
            config = make_config(precision=PrecisionConfig(), **layout)
            said.append(error_of(make_engine(ranks, config)))
            for name, value in ((FIRST, float("nan")), (LAST, float("-inf"))):
                engine = make_engine(ranks, config)
                if name in engine.model.parameters:
                    poison_last_row(engine.model.parameters[name], value)
                said.append(error_of(engine))
            for name in (FIRST, LAST):
                engine = make_engine(ranks, config)
                engine.model = replace(engine.model, executor=Spoiled(engine, name))
                said.append(error_of(engine))
    return said


def test_every_rank_names_the_parameter(run_ranks: Callable[..., list[Any]]) -> None:
    first, second = run_ranks(errors, world_size=2)
    assert first == second
    assert len(first) == 5 * len(LAYOUTS)
    for i in range(len(LAYOUTS)):
        healthy, nan, infinite, *gradients = first[5 * i : 5 * i + 5]
        assert healthy == "no error"
        for name, message in ((FIRST, nan), (LAST, infinite)):
            assert f"weights not finite in: {name}; gradients" in message
            assert "loss=nan" in message
        for name, message in zip((FIRST, LAST), gradients, strict=True):
            assert f"weights not finite in: none; gradients not finite in: {name}" in message
            assert message.endswith(name)
            assert "gradient norm=inf" in message
            assert "loss=nan" not in message
