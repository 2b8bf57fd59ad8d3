"""Taking an AdamW step back gives what was before it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phalanx.train.optim.adamw import AdamW
from phalanx.train.optim.config import LrConfig, OptimConfig
from tests.train.optim.test_adamw import CONFIG, make_parameters, set_gradients

CONFIGS = {
    "decay": CONFIG,
    "no decay": replace(CONFIG, weight_decay=0.0),
    "slow moments": replace(CONFIG, beta1=0.9, beta2=0.999, eps=1e-8),
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}
"""fp32: unit roundoff 6e-8, a few operations, and division by beta1 = 0.8."""


def snapshot(optimizer: AdamW, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    tensors = {name: p.detach() for name, p in parameters.items()} | optimizer.state_tensors()
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_undoes_any_step(config: OptimConfig, dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    optimizer = AdamW(parameters, config)
    for step, lr in enumerate([1e-2, 5e-2, 0.0, 1e-3]):
        before = snapshot(optimizer, parameters)
        set_gradients(parameters, step)
        optimizer.step(lr, keep_gradients=True)
        moved = snapshot(optimizer, parameters)
        assert not torch.equal(moved["optim.exp_avg.matrix"], before["optim.exp_avg.matrix"])
        assert lr == 0 or not torch.equal(moved["matrix"], before["matrix"])
        optimizer.rollback(lr)
        tolerance = TOLERANCE[dtype]
        for name, tensor in snapshot(optimizer, parameters).items():
            torch.testing.assert_close(
                tensor, before[name], rtol=tolerance, atol=tolerance, msg=f"{name} of step {step}"
            )
            if name.startswith("optim.step") or (step == 0 and name.startswith("optim.")):
                assert torch.equal(tensor, before[name]), name
        optimizer.step(lr)


def test_a_step_redone_ends_where_the_right_one_would() -> None:
    """Back and forth each step, with other gradients first: 30 steps stay within 1e-12."""
    straight, wavering = make_parameters(), make_parameters()
    one, other = AdamW(straight, CONFIG), AdamW(wavering, CONFIG)
    for step in range(30):
        set_gradients(straight, step)
        one.step(1e-2)
        set_gradients(wavering, step)
        other.step(1e-2, keep_gradients=True)
        other.rollback(1e-2)
        assert all(p.grad is not None for p in wavering.values())
        other.step(1e-2)
    for name, parameter in straight.items():
        torch.testing.assert_close(wavering[name], parameter, rtol=1e-12, atol=1e-12)


def test_a_second_moment_never_falls_below_zero() -> None:
    parameters = {"norm": make_parameters()["norm"]}
    optimizer = AdamW(parameters, replace(CONFIG, beta2=0.999))
    for _ in range(2):
        parameters["norm"].grad = torch.full_like(parameters["norm"], 1.1)
        optimizer.step(1e-2, keep_gradients=True)
    state = optimizer.state_tensors()["optim.exp_avg_sq.norm"]
    state.fill_(0.001 * 1.1**2 * (1 - 1e-15))  # what rounding may leave where nothing was before
    optimizer.rollback(1e-2)
    assert torch.equal(state, torch.zeros_like(state))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, CONFIG)
    set_gradients(parameters, 0)
    optimizer.step(0.1)
    set_gradients(parameters, 1)
    parameters["matrix"].grad = None
    before = snapshot(optimizer, parameters)
    optimizer.step(0.1, keep_gradients=True)
    optimizer.rollback(0.1)
    after = snapshot(optimizer, parameters)
    for name in ("matrix", *(f"optim.{part}.matrix" for part in ("exp_avg", "exp_avg_sq", "step"))):
        assert torch.equal(after[name], before[name]), name


def test_the_error_is_the_gradient_s_roundoff() -> None:
    """What the docstring owns up to: a tiny moment under a huge gradient loses digits, no more."""
    parameters = {"norm": make_parameters()["norm"]}
    optimizer = AdamW(parameters, CONFIG)
    for scale in (1e-3, 1e3):
        before = snapshot(optimizer, parameters)
        parameters["norm"].grad = torch.full_like(parameters["norm"], scale)
        optimizer.step(1e-2, keep_gradients=True)
    optimizer.rollback(1e-2)
    after = snapshot(optimizer, parameters)
    off = (after["optim.exp_avg_sq.norm"] - before["optim.exp_avg_sq.norm"]).abs().max()
    assert float(off) < 4 * 2.2e-16 * 1e6


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (OptimConfig(beta1=0.0), "optim.beta1=0:"),
        (OptimConfig(beta2=0.0), "optim.beta2=0:"),
        (OptimConfig(weight_decay=10.0, lr=LrConfig(peak=0.1)), "optim.weight_decay=10.0:"),
    ],
)
def test_settings_that_forget_are_refused(config: OptimConfig, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config.check_undoable()
