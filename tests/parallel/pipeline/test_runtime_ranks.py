"""Every schedule computes the same numbers, bit for bit, at every ZeRO stage; and what it holds."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.tensor import DTensor

from phalanx.parallel.config import ActivationCheckpoint
from phalanx.parallel.pipeline.files import save_schedule
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.runtime import PipelineExecutor
from phalanx.parallel.pipeline.schedules.registry import GENERATORS, make_schedule
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.gathered import Gathered
from phalanx.train.config import Precision, PrecisionConfig
from phalanx.train.engine.step import Engine
from tests.small_run import make_config, make_engine, rank_batch

pytestmark = pytest.mark.pipeline

BF16 = PrecisionConfig(params=Precision.fp32, compute=Precision.bf16, reduce=Precision.fp32)
FULL, SELECTIVE = ActivationCheckpoint.full, ActivationCheckpoint.selective
NUM_LAYERS = 8
"""A V placement over 4 ranks has 8 stages."""
slow = pytest.mark.slow


def pipeline(schedule: str, **layout: Any) -> Any:
    """The small model's configuration under a schedule."""
    return make_config(num_layers=NUM_LAYERS, schedule=schedule, **layout)


def executor_of(engine: Engine) -> PipelineExecutor:
    executor = engine.model.executor
    assert isinstance(executor, PipelineExecutor)
    return executor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def steps(ranks: Ranks, layout: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """By schedule: loss and gradient norm of three steps, clipped and updated."""
    found: dict[str, list[tuple[float, float]]] = {}
    with process_group(ranks):
        for schedule in GENERATORS:
            engine = make_engine(ranks, pipeline(schedule, **layout))
            found[schedule] = []
            for number in range(3):
                gradients = engine.gradients(rank_batch(engine, number=number))
                engine.update(gradients, 1e-2)
                found[schedule].append((gradients.loss, gradients.norm))
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 2, "dp_shard": 2, "stage": 3, "tied": True},
        {"pp": 4, "tied": True},
        pytest.param({"pp": 2, "tp": 2, "microbatch": 2}, marks=slow),
        pytest.param({"pp": 4, "activation_checkpoint": FULL}, marks=slow),
        pytest.param({"pp": 2, "dp_shard": 2, "stage": 0}, marks=slow),
        pytest.param({"pp": 2, "dp_shard": 2, "stage": 1}, marks=slow),
        pytest.param({"pp": 2, "dp_shard": 2, "stage": 1, "precision": BF16}, marks=slow),
        pytest.param({"pp": 2, "dp_shard": 2, "stage": 2, "precision": BF16}, marks=slow),
        pytest.param(
            {"pp": 2, "dp_replicate": 2, "stage": 2, "activation_checkpoint": SELECTIVE}, marks=slow
        ),
    ],
    ids=str,
)
def test_schedules_agree_to_the_bit(
    run_ranks: Callable[..., list[Any]], layout: dict[str, Any]
) -> None:
    ranks = run_ranks(steps, layout, world_size=4)
    expected = ranks[0]["1f1b"]
    assert len({loss for loss, _ in expected}) == 3
    for found in ranks:
        for schedule, values in found.items():
            assert values == expected, schedule


def tied_steps(ranks: Ranks) -> list[list[tuple[float, float]]]:
    """Loss and norm of two steps of a tied model whose vocabulary two ranks cannot halve, by
    schedule, each with a barrier and, every step taken back to clip it, without."""
    found = []
    with process_group(ranks):
        for post in (False, True):
            for schedule in ("1f1b", "zb_v"):
                config = make_config(
                    num_layers=4, schedule=schedule, pp=2, dp_shard=2, stage=1, tied=True
                )
                config = replace(
                    config,
                    model=replace(config.model, vocab_size=299),
                    optim=replace(config.optim, max_grad_norm=1e-3 if post else 1.0),
                    pipeline=replace(config.pipeline, post_validation=post),
                )
                engine = make_engine(ranks, config)
                for number in range(2):
                    engine.update(engine.gradients(rank_batch(engine, number=number)), 1e-2)
                engine.settle()
                found.append([(step.loss, step.norm) for step in engine.take_settled()])
    return found


def test_a_tied_weight_cut_unevenly_stays_one(run_ranks: Callable[..., list[Any]]) -> None:
    """A V placement's first rank has it twice."""
    for plain, v, plain_post, v_post in run_ranks(tied_steps, world_size=4):
        assert v == plain
        assert v_post == plain_post
        assert len({loss for loss, _ in plain + plain_post}) == 3


def kept_gradients(ranks: Ranks) -> int:
    """Most gradients of stages' inputs that this rank holds when an operation begins."""
    with process_group(ranks):
        engine = make_engine(ranks, pipeline("zb_h2", pp=2))
        shape, counts = executor_of(engine).boundary.shape, []

        @contextmanager
        def counted(op: Op) -> Iterator[None]:
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_leaf]
            counts.append(sum(t.grad is not None for t in tensors if t.shape == shape))
            yield

        executor_of(engine).recorder = counted
        engine.gradients(rank_batch(engine))
        assert len(counts) == 24
        return max(counts)


def test_an_input_gradient_goes_once_it_is_sent(run_ranks: Callable[..., list[Any]]) -> None:
    """Though the input itself is kept for weight gradients that are put off."""
    assert run_ranks(kept_gradients, world_size=2) == [0, 0]


def restarted(ranks: Ranks, layouts: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
    """By layout: forwards thrown away on this rank, and parameters whose gradient differs from an
    undisturbed run's.

    The hook changes the parameters, as post-validation may.
    """
    found = []
    with process_group(ranks):
        for layout in layouts:
            config = pipeline(**layout)
            disturbed, plain = (make_engine(ranks, config) for _ in range(2))
            executor = executor_of(disturbed)
            grow(plain)
            calls: list[bool] = []

            def changed_once(engine: Engine = disturbed, calls: list[bool] = calls) -> bool:
                calls.append(not calls)
                if calls[-1]:
                    grow(engine)
                return calls[-1]

            executor.before_backward = changed_once
            differing = []
            for number in range(2):
                batch = rank_batch(plain, number=number)
                assert disturbed.gradients(batch) == plain.gradients(batch)
                differing += [
                    name
                    for name, parameter in plain.model.parameters.items()
                    if not torch.equal(
                        local(parameter.grad), local(disturbed.model.parameters[name].grad)
                    )
                ]
            assert calls == [True, False]
            found.append((executor.forwards_before_backward[executor.rank], differing))
    return found


@torch.no_grad()
def grow(engine: Engine) -> None:
    for parameter in engine.model.parameters.values():
        local(parameter).mul_(1.25)


def test_a_step_begun_anew_is_undisturbed(run_ranks: Callable[..., list[Any]]) -> None:
    layouts = [
        {"schedule": "1f1b", "pp": 4, "microbatch": 2},
        {"schedule": "zb_h2", "pp": 2, "dp_shard": 2, "stage": 1},
        {"schedule": "interleaved", "pp": 4, "tied": True, "microbatch": 2},
        {"schedule": "v_min", "pp": 2, "dp_shard": 2, "stage": 3, "tied": True},
        {"schedule": "zb_v", "pp": 4, "microbatch": 2},
    ]
    ranks = run_ranks(restarted, layouts, world_size=4)
    for i, layout in enumerate(layouts):
        assert max(rank[i][0] for rank in ranks) > 1, "no forwards to throw away"
        for rank in ranks:
            assert rank[i][1] == [], layout


def replaced(ranks: Ranks) -> list[bool]:
    """Whether gradients stay after each of several orders took the one before's place."""
    with process_group(ranks):
        engine = make_engine(ranks, pipeline("gpipe", pp=2))
        executor = executor_of(engine)
        batch = rank_batch(engine)
        expected = engine.gradients(batch)
        found = []
        for name in ("1f1b", "zb_h2", "zb_h1"):
            executor.schedule = make_schedule(
                name, num_ranks=2, num_microbatches=executor.schedule.num_microbatches
            )
            for parameter in engine.model.parameters.values():
                parameter.grad = None
            found.append(engine.gradients(batch) == expected)
        with pytest.raises(AssertionError, match="stages cannot move"):
            executor.schedule = make_schedule("zb_v", num_ranks=2, num_microbatches=8)
    return found


def test_schedule_is_replaced_between_steps(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(replaced, world_size=2) == [[True] * 3] * 2


class Held(NamedTuple):
    """What a rank does in an operation of a step, and has after it."""

    op: Op
    gathers: int
    """Units gathered in it, prefetched ones too."""
    blocks: int
    """Units of sharding that are blocks."""
    whole: int
    """Whole parameters of blocks."""
    whole_grads: int
    sharded_grads: int


class Watch:
    """Notes what a rank holds after each operation."""

    def __init__(self, engine: Engine) -> None:
        self.stages = engine.model.stages
        self.shardings = engine.model.shardings
        self.seen: list[Held] = []
        self.gathers = 0
        executor_of(engine).recorder = self.record

    @contextmanager
    def record(self, op: Op) -> Iterator[None]:
        before = self.gathers
        yield
        stage = self.stages[op.stage]
        blocks = list(stage.layers.children())  # type: ignore[union-attr, operator]
        units = self.shardings[op.stage].units
        params = [p for unit in units for p in unit.params]
        self.seen.append(
            Held(
                op,
                self.gathers - before,
                len(blocks),
                sum(unit.gathered.ready for unit in units if unit.modules[0] in blocks),
                sum(p.whole is not None and p.whole.grad is not None for p in params),
                sum(p.sharded.grad is not None for p in params)
                + sum(
                    unit.reduced._summed is not None or bool(unit.reduced._transfers)
                    for unit in units
                ),
            )
        )


ZERO_RUNS = [(schedule, stage) for schedule in ("1f1b", "zb_h1") for stage in (1, 2, 3)]


def held(ranks: Ranks) -> list[list[Held]]:
    """Of a second step each."""
    found = []
    with process_group(ranks), pytest.MonkeyPatch.context() as patch:
        gather, watches = Gathered._gather, []

        def counted(unit: Gathered) -> Any:
            for watch in watches:
                watch.gathers += 1
            return gather(unit)

        patch.setattr(Gathered, "_gather", counted)
        for schedule, stage in ZERO_RUNS:
            engine = make_engine(ranks, pipeline(schedule, pp=2, dp_shard=2, stage=stage))
            engine.gradients(rank_batch(engine))
            for parameter in engine.model.parameters.values():
                parameter.grad = None
            watches[:] = [Watch(engine)]
            engine.gradients(rank_batch(engine, number=1))
            found.append(watches[0].seen)
    return found


def test_zero_stage_is_what_it_says(run_ranks: Callable[..., list[Any]]) -> None:
    for rank, runs in enumerate(run_ranks(held, world_size=4)):
        for (schedule, stage), seen in zip(ZERO_RUNS, runs, strict=True):
            assert len(seen) == 4 * (2 if schedule == "1f1b" else 3)
            check_held(seen, stage, has_head=rank >= 2)


def check_held(seen: list[Held], stage: int, *, has_head: bool) -> None:
    for i, now in enumerate(seen):
        done = any(before.op.kind in (Kind.W, Kind.BW) for before in seen[: i + 1])
        last = i == len(seen) - 1
        assert bool(now.sharded_grads) == (done if stage >= 2 else last), now
        assert bool(now.whole_grads) == (done and stage < 2 and not last), now
        assert bool(now.whole) == (stage < 3 and not last), now
        # Blocks, and the embedding or the head; a backward pass needs no embedding, and the head
        # stays from a forward to its backward.
        if stage < 3:
            assert now.gathers == (now.blocks + 1 if i == 0 else 0), now
        elif now.op.kind is Kind.F:
            assert now.blocks <= now.gathers <= now.blocks + 1, now
            assert now.gathers == now.blocks + 1 or has_head, now
        else:
            assert now.gathers == (0 if now.op.kind is Kind.W else now.blocks), now


def file_numbers(ranks: Ranks, path: str) -> list[Any]:
    """Gradients' report and evaluation loss under a schedule file, and under 1F1B."""
    with process_group(ranks):
        found = []
        for schedule in (path, "1f1b"):
            engine = make_engine(ranks, pipeline(schedule, pp=2, tied=True))
            gradients = engine.gradients(rank_batch(engine))
            found.append((gradients, engine.evaluate([rank_batch(engine, number=2)])))
        return found


@pytest.mark.parametrize("placement", [(1, 0), (1, 0, 0, 1, 1), (0, 1, 0)], ids=str)
def test_any_placement_runs_from_a_file(
    run_ranks: Callable[..., list[Any]], tmp_path: Path, placement: tuple[int, ...]
) -> None:
    """Stages in the order of their ranks or not, neighbours on one rank, more on one than on
    another: all forwards, then each microbatch's backward in its two parts."""
    stages, microbatches = range(len(placement)), range(8)
    ops = [Op(stage, Kind.F, i) for i in microbatches for stage in stages]
    for i in microbatches:
        ops += [Op(stage, Kind.B, i) for stage in reversed(stages)]
        ops += [Op(stage, Kind.W, i) for stage in stages]
    orders = [[op for op in ops if placement[op.stage] == rank] for rank in range(2)]
    path = tmp_path / "schedule.json"
    save_schedule(Schedule.of("mine", placement, len(microbatches), orders), path)
    for found, expected in run_ranks(file_numbers, str(path), world_size=2):
        assert found == expected
