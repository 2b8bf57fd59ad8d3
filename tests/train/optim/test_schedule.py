"""The learning rate: its ends, its turning points, and that it never jumps up after warm-up."""

import math
from itertools import pairwise

import pytest

from phalanx.train.optim.config import LrConfig, LrSchedule
from phalanx.train.optim.schedule import learning_rate

STEPS = 200


def rates(config: LrConfig, steps: int = STEPS) -> list[float]:
    """The rate of every step, and the one that the schedule ends at."""
    return [learning_rate(config, step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", LrSchedule)
def test_warm_up_is_linear_and_starts_above_zero(schedule: LrSchedule) -> None:
    found = rates(LrConfig(schedule=schedule, peak=2e-3, warmup_steps=8))[:8]
    assert found == pytest.approx([2e-3 * n / 8 for n in range(1, 9)], rel=1e-12)


@pytest.mark.parametrize("schedule", LrSchedule)
def test_without_warm_up_the_first_step_has_the_peak(schedule: LrSchedule) -> None:
    assert rates(LrConfig(schedule=schedule, peak=1e-3, warmup_steps=0))[0] == 1e-3


@pytest.mark.parametrize("schedule", [LrSchedule.cosine, LrSchedule.wsd])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_decay_ends_at_the_minimum(schedule: LrSchedule, min_ratio: float) -> None:
    config = LrConfig(schedule=schedule, peak=1e-3, warmup_steps=10, min_ratio=min_ratio)
    found = rates(config)
    assert found[-1] == pytest.approx(1e-3 * min_ratio, abs=1e-18)
    # The run's last step is one step's decay above it.
    assert 0 <= found[-2] - found[-1] <= 1e-3 * (1 - min_ratio) / 20 * (1 + 1e-9)
    # A run that goes on stays there.
    assert learning_rate(config, STEPS + 50, STEPS) == pytest.approx(found[-1], abs=1e-18)


@pytest.mark.parametrize("schedule", LrSchedule)
@pytest.mark.parametrize("warmup", [0, 1, 37])
def test_rises_then_never_rises_again(schedule: LrSchedule, warmup: int) -> None:
    found = rates(LrConfig(schedule=schedule, peak=1e-3, warmup_steps=warmup))
    top = max(warmup - 1, 0)
    assert found[top] == max(found) == pytest.approx(1e-3, rel=1e-12)
    assert all(a < b for a, b in pairwise(found[: top + 1]))
    assert all(a >= b for a, b in pairwise(found[top:]))


def test_constant_stays() -> None:
    found = rates(LrConfig(schedule=LrSchedule.constant, peak=1e-3, warmup_steps=10))
    assert set(found[10:]) == {1e-3}


def test_cosine_follows_the_cosine() -> None:
    config = LrConfig(schedule=LrSchedule.cosine, peak=1.0, warmup_steps=20, min_ratio=0.2)
    found = rates(config)
    for step in range(20, STEPS + 1):
        share = (step - 20) / (STEPS - 20)
        assert found[step] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * share)))
    assert found[110] == pytest.approx(0.6)  # halfway down at half the time


def test_wsd_is_stable_then_linear() -> None:
    config = LrConfig(
        schedule=LrSchedule.wsd, peak=1.0, warmup_steps=10, min_ratio=0.1, decay_fraction=0.25
    )
    found = rates(config)
    assert set(found[10:151]) == {1.0}
    for step in range(150, STEPS + 1):
        assert found[step] == pytest.approx(0.1 + 0.9 * (STEPS - step) / 50)


def test_wsd_without_decay_is_constant_to_the_last_step() -> None:
    config = LrConfig(schedule=LrSchedule.wsd, peak=1.0, warmup_steps=0, decay_fraction=0.0)
    assert set(rates(config)[:STEPS]) == {1.0}


@pytest.mark.parametrize("schedule", LrSchedule)
def test_a_run_shorter_than_its_warm_up(schedule: LrSchedule) -> None:
    found = rates(LrConfig(schedule=schedule, peak=1.0, warmup_steps=100), 10)
    assert found == pytest.approx([n / 100 for n in range(1, 12)])
