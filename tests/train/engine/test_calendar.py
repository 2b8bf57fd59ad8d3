"""When something is due, by the configuration alone."""

from dataclasses import replace

import pytest

from phalanx.checkpoint.config import CheckpointConfig, SnapshotConfig
from phalanx.train.config import Config, TrainingConfig
from phalanx.train.engine.calendar import Calendar

STEPS = 10
NEVER: list[int] = []


def calendar(
    *,
    every: int = 0,
    save_last: bool = False,
    snapshots: int = 0,
    eval_every: int = 0,
    eval_batches: int = 0,
    sample_every: int = 0,
    tokens: int = 0,
) -> Calendar:
    config = Config(
        training=TrainingConfig(steps=STEPS, eval_every=eval_every, eval_batches=eval_batches),
        checkpoint=CheckpointConfig(
            every=every, save_last=save_last, snapshot=SnapshotConfig(every=snapshots)
        ),
    )
    sample = replace(config.monitor.sample, tokens=tokens, every=sample_every)
    return Calendar(replace(config, monitor=replace(config.monitor, sample=sample)))


def days(rule: object) -> list[int]:
    """The counts of done steps, up to two beyond the last, after which it is due."""
    assert callable(rule)
    return [done for done in range(STEPS + 3) if rule(done)]


@pytest.mark.parametrize(
    ("every", "save_last", "due"),
    [
        (0, False, NEVER),
        (0, True, [10, 11, 12]),
        (4, False, [0, 4, 8, 12]),
        (4, True, [0, 4, 8, 10, 11, 12]),
        (5, False, [0, 5, 10]),
    ],
)
def test_saves(every: int, save_last: bool, due: list[int]) -> None:
    assert days(calendar(every=every, save_last=save_last).save) == due


@pytest.mark.parametrize(
    ("every", "save_last", "first"), [(4, False, 8), (4, True, 10), (5, False, 10), (0, True, 10)]
)
def test_the_last_save_is_known(every: int, save_last: bool, first: int) -> None:
    found = calendar(every=every, save_last=save_last)
    assert days(found.is_last_save) == list(range(first, STEPS + 3))


@pytest.mark.parametrize(("every", "due"), [(0, NEVER), (1, list(range(13))), (6, [0, 6, 12])])
def test_snapshots(every: int, due: list[int]) -> None:
    assert days(calendar(snapshots=every).snapshot) == due


@pytest.mark.parametrize(
    ("every", "count", "due"),
    [(0, 0, NEVER), (3, 0, NEVER), (0, 1, [10]), (3, 1, [3, 6, 9, 10, 12]), (5, 1, [5, 10])],
)
def test_evaluations_and_samples(every: int, count: int, due: list[int]) -> None:
    assert days(calendar(eval_every=every, eval_batches=count).evaluation) == due
    assert days(calendar(sample_every=every, tokens=count).sample) == due


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({}, [10]),
        ({"every": 4}, [0, 4, 8, 10, 12]),
        ({"snapshots": 6}, [0, 6, 10, 12]),
        ({"eval_every": 7, "eval_batches": 1}, [7, 10]),
        ({"sample_every": 9, "tokens": 1}, [9, 10]),
        ({"save_last": True}, [10, 11, 12]),
    ],
)
def test_parameters_are_read_where_anything_is_due(
    settings: dict[str, int], due: list[int]
) -> None:
    assert days(calendar(**settings).reads_parameters) == due  # type: ignore[arg-type]
