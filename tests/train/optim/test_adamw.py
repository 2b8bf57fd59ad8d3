"""AdamW against the textbook, and its state as a checkpoint sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.optim.adamw import MOMENTS, AdamW
from phalanx.train.optim.config import OptimConfig
from tests.small_run import make_config, make_engine, rank_batch

CONFIG = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
RATES = [1e-2, 2e-2, 5e-3, 0.0, 1e-2]
SHAPES = {"matrix": (7, 5), "norm": (9,), "cube": (2, 3, 4), "bias": (1,)}


@dataclass
class Textbook:
    """Loshchilov & Hutter, 2019, algorithm 2, in fp64, one number's formula at a time."""

    weight: Tensor
    decay: float
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    t: int = 0

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def step(self, grad: Tensor, lr: float, config: OptimConfig) -> None:
        self.t += 1
        self.m = config.beta1 * self.m + (1 - config.beta1) * grad
        self.v = config.beta2 * self.v + (1 - config.beta2) * grad**2
        m_hat = self.m / (1 - config.beta1**self.t)
        v_hat = self.v / (1 - config.beta2**self.t)
        self.weight = (
            self.weight - lr * m_hat / (v_hat.sqrt() + config.eps) - lr * self.decay * self.weight
        )


def make_parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return {name: p.grad.double() for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_the_textbook(dtype: torch.dtype, tolerance: float) -> None:
    parameters = make_parameters(dtype)
    optimizer = AdamW(parameters, CONFIG)
    books = {
        name: Textbook(p, decay=CONFIG.weight_decay if p.dim() >= 2 else 0.0)
        for name, p in parameters.items()
    }
    for step, lr in enumerate(RATES):
        for name, grad in set_gradients(parameters, step).items():
            books[name].step(grad, lr, CONFIG)
        optimizer.step(lr)
        state = optimizer.state_tensors()
        for name, book in books.items():
            for found, expected in (
                (parameters[name].detach(), book.weight),
                (state[f"optim.exp_avg.{name}"], book.m),
                (state[f"optim.exp_avg_sq.{name}"], book.v),
            ):
                torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
            assert float(state[f"optim.step.{name}"]) == step + 1


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = make_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = AdamW(parameters, CONFIG)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in parameters.items():
        kept = 1 - 0.1 * CONFIG.weight_decay if len(SHAPES[name]) >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-15, atol=0)


def test_only_vectors_or_only_matrices() -> None:
    for chosen in ("norm", "matrix"):
        parameters = {chosen: make_parameters()[chosen]}
        optimizer = AdamW(parameters, CONFIG)
        before = parameters[chosen].detach().clone()
        set_gradients(parameters, 0)
        optimizer.step(0.1)
        assert not torch.isclose(parameters[chosen], before).any()


def test_gradients_are_dropped_and_a_missing_one_changes_nothing() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, CONFIG)
    set_gradients(parameters, 0)
    parameters["matrix"].grad = None
    before = parameters["matrix"].detach().clone()
    optimizer.step(0.1)
    assert torch.equal(parameters["matrix"], before)
    state = optimizer.state_tensors()
    assert float(state["optim.step.matrix"]) == 0
    assert float(state["optim.step.norm"]) == 1
    assert all(p.grad is None for p in parameters.values())
    left = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step(0.1)  # nothing to do: no gradient of the step before is used again
    assert all(torch.equal(parameters[name], left[name]) for name in left)


def test_state_exists_at_once_and_is_seen_through_views() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, CONFIG)
    views = optimizer.state_tensors()
    assert set(views) == {f"optim.{kind}.{name}" for kind in (*MOMENTS, "step") for name in SHAPES}
    assert not any(view.any() for view in views.values())
    set_gradients(parameters, 0)
    optimizer.step(0.1)
    assert all(view.any() for view in views.values())


def test_state_loaded_in_place_continues_bit_for_bit() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, CONFIG)
    for step in range(3):
        set_gradients(parameters, step)
        optimizer.step(0.1)
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    resumed = AdamW(copies, CONFIG)
    for name, tensor in resumed.state_tensors().items():
        tensor.copy_(optimizer.state_tensors()[name])
    for step in range(3, 6):
        for named, each in ((parameters, optimizer), (copies, resumed)):
            set_gradients(named, step)
            each.step(0.1)
    assert all(torch.equal(parameters[name], copies[name]) for name in SHAPES)


def test_without_decay_matrices_stay_too() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, replace(CONFIG, weight_decay=0.0))
    before = parameters["matrix"].detach().clone()
    parameters["matrix"].grad = torch.zeros_like(before)
    optimizer.step(0.1)
    assert torch.equal(parameters["matrix"], before)


def sharded_state(ranks: Ranks) -> list[str]:
    """What is wrong with the state of an unevenly sharded model, taken before it ever ran."""
    wrong = []
    with process_group(ranks):
        engine = make_engine(ranks, make_config(dp_shard=4))
        views = engine.state_tensors()
        before = {name: _local(view).clone() for name, view in views.items()}
        for number in range(2):
            gradients = engine.gradients(rank_batch(engine, number=number))
            engine.update(gradients, 1e-2)
        now = engine.state_tensors()
        for name, view in views.items():
            if not torch.equal(_local(view), _local(now[name])):
                wrong.append(f"{name}: no longer seen")
            if _local(view).numel() and torch.equal(_local(view), before[name]):
                wrong.append(f"{name}: not moved")
            if name.startswith("optim.exp") and isinstance(view, DTensor):
                parameter = engine.model.parameters[name.split(".", maxsplit=2)[2]]
                assert isinstance(parameter, DTensor)
                if (view.shape, view.placements) != (parameter.shape, parameter.placements):
                    wrong.append(f"{name}: {view.shape} {view.placements}")
    return wrong


def test_views_of_uneven_shards(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(sharded_state, world_size=4) == [[], [], [], []]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
