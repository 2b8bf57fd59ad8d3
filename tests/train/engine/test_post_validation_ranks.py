"""Optimizer steps without a barrier, checked later, end where steps with one do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config
from phalanx.train.engine.gradients import Gradients
from phalanx.train.engine.step import Engine
from tests.small_run import make_config, make_engine, rank_batch
from tests.train.engine.test_nonfinite_ranks import Spoiled

pytestmark = pytest.mark.pipeline

STEPS = 4
RATE = 1e-2
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp": {"pp": 4, "dp_shard": 1},
    "pp tied": {"pp": 4, "dp_shard": 1, "tied": True, "schedule": "zb_h1"},
    "pp dp": {"pp": 2, "dp_shard": 2, "stage": 1},
    "pp dp zero 3": {"pp": 2, "dp_shard": 2, "stage": 3, "schedule": "zb_v"},
    "pp tp": {"pp": 2, "tp": 2, "dp_shard": 1, "schedule": "interleaved"},
    "v": {"pp": 4, "dp_shard": 1, "num_layers": 8, "schedule": "zb_v"},
    "v tied": {"pp": 2, "dp_shard": 2, "stage": 2, "tied": True, "schedule": "v_half"},
}
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


def config_of(layout: dict[str, Any], max_norm: float, *, post: bool) -> Config:
    config = make_config(microbatch=2, **layout)
    return replace(
        config,
        optim=replace(config.optim, max_grad_norm=max_norm),
        pipeline=replace(config.pipeline, post_validation=post),
    )


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Copies of this rank's parts of all parameters and optimizer states."""
    tensors = engine.state_tensors()
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: tensor.clone() for name, tensor in local.items()}


@contextmanager
def groups_used(found: list[list[int]]) -> Iterator[None]:
    """Collects the ranks of every collective called from Python."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            found.append(dist.get_process_group_ranks(group or dist.group.WORLD))
            return original(*args, group=group, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, counted(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def steps_of(
    ranks: Ranks, layout: dict[str, Any], max_norm: float, *, post: bool
) -> dict[str, Any]:
    """STEPS steps, the last one settled: what was logged, what is left, and what it took."""
    engine = make_engine(ranks, config_of(layout, max_norm, post=post))
    rollbacks = 0
    rollback = engine.optimizer.rollback

    def counted(lr: float) -> None:
        nonlocal rollbacks
        rollbacks += 1
        rollback(lr)

    engine.optimizer.rollback = counted  # type: ignore[method-assign]
    settled: list[list[Gradients]] = []
    used: list[list[int]] = []
    with groups_used(used):
        for number in range(STEPS):
            gradients = engine.gradients(rank_batch(engine, number=number))
            engine.update(gradients, RATE)
            settled.append(engine.take_settled())
        engine.settle()
    settled.append(engine.take_settled())
    ranks_a_stage = ranks.world_size // engine.mesh.size("pp")
    return {
        "settled": settled,
        "state": state_of(engine),
        "rollbacks": rollbacks,
        "spanning": sum(len({r // ranks_a_stage for r in group}) > 1 for group in used),
        "gradients left": sum(p.grad is not None for p in engine.model.parameters.values()),
    }


def runs(
    ranks: Ranks, layouts: list[str]
) -> dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]]:
    """By layout and limit: the run with a barrier, and the one with post-validation."""
    found: dict[str, Any] = {}
    with process_group(ranks):
        for name in layouts:
            layout = LAYOUTS[name]
            free = steps_of(ranks, layout, 0.0, post=False)
            norms = [gradients.norm for (gradients,) in free["settled"][:STEPS]]
            found[name] = {"never": (free, steps_of(ranks, layout, 1e9, post=True))}
            # Just under the second highest norm: two steps clip, one of them not the first, and
            # all ranks but the last find their prefix in order.
            for case, limit in (("sometimes", 0.97 * sorted(norms)[-2]), ("always", 1e-3)):
                found[name][case] = tuple(
                    steps_of(ranks, layout, limit, post=post) for post in (False, True)
                )
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["pp", "pp dp zero 3"], id="few"),
        pytest.param(
            ["pp tied", "pp dp", "pp tp", "v", "v tied"], id="more", marks=pytest.mark.slow
        ),
    ],
)
def everyone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Each rank's `runs`."""
    from phalanx.launch.ranks.start import launch
    from phalanx.train.config import Device, LaunchConfig

    config = LaunchConfig(ranks_per_node=4, device=Device.cpu, threads_per_rank=1, timeout_s=60.0)
    return launch(
        runs,
        request.param,
        world_size=4,
        config=config,
        log_dir=tmp_path_factory.mktemp("ranks") / "logs",
    )


def pairs(everyone: list[Any], case: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for rank, found in enumerate(everyone):
        for name in found:
            yield f"{name}, rank {rank}", *found[name][case]


def test_without_clipping_bit_for_bit(everyone: list[Any]) -> None:
    for name, barrier, post in pairs(everyone, "never"):
        assert post["rollbacks"] == 0
        for key, tensor in barrier["state"].items():
            assert torch.equal(post["state"][key], tensor), f"{name}: {key}"


@pytest.mark.parametrize("case", ["sometimes", "always"])
def test_with_clipping_within_rounding(everyone: list[Any], case: str) -> None:
    for name, barrier, post in pairs(everyone, case):
        for key, tensor in barrier["state"].items():
            scale = max(float(tensor.abs().max()), 1e-300) if tensor.numel() else 1.0
            off = (post["state"][key] - tensor).abs().max() if tensor.numel() else 0.0
            assert float(off) < 1e-12 * scale, f"{name}: {key}"


def test_some_steps_were_taken_back(everyone: list[Any]) -> None:
    """Else the tests above would pass without a rollback that works."""
    for name in everyone[0]:
        counts = [rank[name]["sometimes"][1]["rollbacks"] for rank in everyone]
        assert any(counts), name
        assert not all(counts), f"{name}: the last pipeline rank never errs"
        assert max(counts) < STEPS, f"{name}: in some step nobody erred"


@pytest.mark.parametrize("case", ["never", "sometimes", "always"])
def test_losses_and_norms_one_step_later(everyone: list[Any], case: str) -> None:
    for name, barrier, post in pairs(everyone, case):
        assert [len(step) for step in barrier["settled"]] == [1] * STEPS + [0], name
        assert [len(step) for step in post["settled"]] == [0] + [1] * STEPS, name
        pipelined = [gradients for step in post["settled"] for gradients in step]
        straight = [gradients for step in barrier["settled"] for gradients in step]
        for found, expected in zip(pipelined, straight, strict=True):
            same = case == "never" or found is pipelined[0]
            assert found == (expected if same else pytest.approx(expected, rel=1e-12)), name
    for name in everyone[0]:
        first, *others = (rank[name][case][1]["settled"] for rank in everyone)
        assert all(settled == first for settled in others), f"{name}: ranks disagree"


def test_no_collective_spans_the_pipeline(everyone: list[Any]) -> None:
    for case in ("never", "sometimes", "always"):
        for name, barrier, post in pairs(everyone, case):
            assert barrier["spanning"] == STEPS, f"{name}: one a step is what is saved"
            assert post["spanning"] == 0, name
            assert post["gradients left"] == 0, name


BAD_STEP = 2
DEFECTS = {
    "first": "layers.0.feed_forward.w1.weight",
    "middle": "layers.2.feed_forward.w2.weight",
    "last": "layers.4.attention.wq.weight",
}


def spoiled(ranks: Ranks) -> dict[str, tuple[str, float, int]]:
    """By defect: the message, how far parameters and states are from those before the bad step,
    relative to the largest of each, and the number of the step in which it was said."""
    found = {}
    with process_group(ranks):
        for layout, places in (("pp", tuple(DEFECTS)), ("pp dp zero 3", ("middle",))):
            for place in places:
                config = config_of(LAYOUTS[layout], 1e9, post=True)
                found[f"{layout}: {place}"] = _spoil(make_engine(ranks, config), DEFECTS[place])
    return found


def _spoil(engine: Engine, victim: str) -> tuple[str, float, int]:
    before: dict[str, Tensor] = {}
    healthy = engine.model
    for number in range(BAD_STEP + 2):
        if number == BAD_STEP:
            engine.settle()
            before = state_of(engine)
            engine.model = replace(healthy, executor=Spoiled(engine, victim))
        try:
            gradients = engine.gradients(rank_batch(engine, number=number))
        except FloatingPointError as error:
            after = state_of(engine)
            off = [
                float((after[key] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-300))
                for key, tensor in before.items()
                if tensor.numel()
            ]
            return str(error), max(off), number
        engine.update(gradients, RATE)
        engine.model = healthy
    return "no error", 0.0, -1


def test_a_bad_gradient_is_said_one_step_later(run_ranks: Callable[..., list[Any]]) -> None:
    everyone = run_ranks(spoiled, world_size=4)
    assert len(everyone[0]) == 4
    for case, (message, _, _) in everyone[0].items():
        victim = DEFECTS[case.split(": ")[1]]
        assert f"weights not finite in: none; gradients not finite in: {victim}" in message, case
        for found, off, number in (rank[case] for rank in everyone):
            assert found == message, case
            assert off < 1e-12, case
            assert number == BAD_STEP + 1, case


def settling(ranks: Ranks) -> tuple[bool, list[float], list[float]]:
    """Evaluation, next logits and state right after an `update`, which nobody settled."""
    said = []
    with process_group(ranks):
        for post in (False, True):
            config = config_of({"pp": 2, "dp_shard": 1}, 1e-3, post=post)
            engine = make_engine(ranks, config)
            engine.update(engine.gradients(rank_batch(engine)), RATE)
            said.append(engine.evaluate([rank_batch(engine, number=7)]))
            engine.update(engine.gradients(rank_batch(engine, number=1)), RATE)
            tokens = torch.arange(16)[None]
            said.append(float(engine.next_logits(tokens, [16]).double().sum()))
            engine.update(engine.gradients(rank_batch(engine, number=2)), RATE)
            said.append(sum(float(t.sum()) for t in state_of(engine).values()))
            unsettled = engine.settle()
    return unsettled, said[:3], said[3:]


def test_what_reads_parameters_settles_first(run_ranks: Callable[..., list[Any]]) -> None:
    for changed, barrier, post in run_ranks(settling, world_size=2):
        assert not changed
        assert post == pytest.approx(barrier, rel=1e-12)
