"""Every layout computes what one process computes, and a layout that does not is found out."""

from dataclasses import replace
from typing import Any

import pytest

from phalanx.parallel.config import ActivationCheckpoint, ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.pipeline.schedules.registry import GENERATORS
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.config import (
    Config,
    Defect,
    Device,
    LaunchConfig,
    Precision,
    TrainingConfig,
    VerifyConfig,
)
from phalanx.train.data.config import DataConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.verify import VerifyReport
from tests.pairwise import pairwise
from tests.train.verify.verifier import Verifier

pytestmark = pytest.mark.verify

# Sizes that no degree divides evenly where they need not: 5 layers, 36 channels, 300 rows.
MODEL = ModelConfig(
    vocab_size=300,
    dim=36,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    ffn_dim=52,
    qk_norm=True,
    attention_bias=True,
)
FULL, SELECTIVE = ActivationCheckpoint.full, ActivationCheckpoint.selective
INTERLEAVED, ZB_H1, ZB_V = ({"schedule": name} for name in ("interleaved", "zb_h1", "zb_v"))
V_HALF, DUALPIPE_V = ({"schedule": name} for name in ("v_half", "dualpipe_v"))


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return Verifier(tmp_path_factory.mktemp("references"))


def run(
    verifier: Verifier,
    data: DataConfig,
    *,
    pipeline: dict[str, str] | None = None,
    stage: int = 3,
    tied: bool = False,
    num_layers: int = MODEL.num_layers,
    microbatch: int = 2,
    steps: int = 2,
    resume_in: dict[str, int] | None = None,
    dtype: Precision = Precision.fp64,
    inject: Defect = Defect.none,
    **parallel: object,
) -> VerifyReport:
    """Verify one layout of the small model on the test corpus."""
    layout = ParallelConfig(**{"dp_shard": 1, **parallel})  # type: ignore[arg-type]
    config = Config(
        model=replace(MODEL, tie_embeddings=tied, num_layers=num_layers),
        data=data,
        parallel=layout,
        pipeline=PipelineConfig(**(pipeline or {})),
        zero=ZeroConfig(stage=stage),
        training=TrainingConfig(seq_len=32, global_batch_size=16, microbatch_size=microbatch),
        launch=LaunchConfig(device=Device.cpu, threads_per_rank=1, timeout_s=60),
        verify=VerifyConfig(dtype=dtype, steps=steps, resume_in=resume_in or {}, inject=inject),
    )
    return verifier(config, world_size=layout.fixed_degree * layout.dp_shard)


# Under tensor parallelism every microbatch costs what its collectives do, so it has few of them.
LAYOUTS = {
    "dp_shard": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp": {"tp": 2, "microbatch": 8},
    "pp": {"pp": 2},
    "pp gpipe": {"pp": 2, "pipeline": {"schedule": "gpipe"}},
    "pp interleaved": {"pp": 2, "pipeline": INTERLEAVED},
    "pp zb_h1": {"pp": 2, "pipeline": ZB_H1},
    "pp dualpipe_v": {"pp": 2, "pipeline": DUALPIPE_V},
    "tp dp": {"tp": 2, "dp_shard": 2},
    "pp tp": {"pp": 2, "tp": 2, "microbatch": 4},
    "pp dp tp": {"pp": 2, "dp_shard": 2, "tp": 2, "microbatch": 4},
    "zero 0": {"dp_shard": 2, "stage": 0},
    "zero 1": {"dp_shard": 2, "stage": 1},
    "zero 2": {"dp_shard": 2, "stage": 2},
    "zero 0 tp": {"dp_shard": 2, "tp": 2, "stage": 0, "microbatch": 4},
    "zero 1 hsdp": {"dp_replicate": 2, "dp_shard": 2, "stage": 1},
    "recompute all": {"dp_shard": 2, "activation_checkpoint": FULL},
    "recompute some": {
        "dp_shard": 2,
        "tp": 2,
        "activation_checkpoint": SELECTIVE,
        "microbatch": 4,
    },
    "recompute pp": {"pp": 2, "dp_shard": 2, "activation_checkpoint": FULL, "stage": 2},
    "one microbatch": {"dp_shard": 2, "microbatch": 8},
    "many microbatches": {"dp_shard": 2, "microbatch": 1, "stage": 1},
    "tied dp": {"dp_shard": 2, "tied": True},
    "tied tp": {"tp": 2, "dp_shard": 2, "tied": True, "microbatch": 4},
    "tied pp": {"pp": 2, "dp_shard": 2, "tied": True},
    "tied zb_v": {"pp": 2, "dp_shard": 2, "tied": True, "pipeline": ZB_V},
    "v_half tp": {"pp": 2, "tp": 2, "pipeline": V_HALF, "activation_checkpoint": FULL},
    "zb_h1 zero 1": {"pp": 2, "dp_shard": 2, "stage": 1, "pipeline": ZB_H1},
    "zb_v hsdp": {"pp": 2, "dp_replicate": 2, "stage": 2, "pipeline": ZB_V},
    "all": {
        "pp": 2,
        "dp_shard": 2,
        "tp": 2,
        "tied": True,
        "stage": 2,
        "microbatch": 4,
        "pipeline": INTERLEAVED,
        "activation_checkpoint": SELECTIVE,
    },
}


SLOW = {
    "pp gpipe",
    "pp zb_h1",
    "zero 0",
    "zero 2",
    "zero 1 hsdp",
    "recompute pp",
    "one microbatch",
    "many microbatches",
    "tied dp",
    "tied pp",
    "v_half tp",
    "zb_h1 zero 1",
}
"""Layouts whose parts are each in another one, and that only `make test-slow` verifies."""


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, layout in LAYOUTS.items()
    ],
)
def test_layout_equals_one_process(
    verifier: Verifier, demo_data: DataConfig, layout: dict[str, object]
) -> None:
    report = run(verifier, demo_data, **layout)  # type: ignore[arg-type]
    assert report.passed, report.table()


def dp_size(row: dict[str, Any]) -> int:
    return 1 if row["stage"] is None else 2


def num_ranks(row: dict[str, Any]) -> int:
    return dp_size(row) * row["pp"] * row["tp"]


def named(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items() if value)


SCHEDULES = pairwise(
    {
        "schedule": tuple(GENERATORS),
        "pp": (2, 4),
        "stage": (None, 1, 2, 3),  # None = one data-parallel rank, else two
        "tp": (1, 2),
        "rounds": (2, 4),  # microbatches per pipeline rank
        "recompute": (False, True),
        "tied": (False, True),
        "compile": (False, True),
    },
    allowed=lambda row: (
        num_ranks(row) <= (4 if row["compile"] else 8)
        and dp_size(row) * row["pp"] * row["rounds"] <= 16
    ),
)
"""Every schedule with every way of sharding, both with everything that is on or off, and so on."""


@pytest.mark.slow
@pytest.mark.parametrize("row", SCHEDULES, ids=named)
def test_every_schedule_equals_one_process(
    verifier: Verifier, demo_data: DataConfig, row: dict[str, Any]
) -> None:
    report = run(
        verifier,
        demo_data,
        pipeline={"schedule": row["schedule"]},
        stage=row["stage"] or 3,
        tied=row["tied"],
        num_layers=2 * row["pp"],
        microbatch=16 // (dp_size(row) * row["pp"] * row["rounds"]),
        pp=row["pp"],
        tp=row["tp"],
        dp_shard=dp_size(row),
        activation_checkpoint=FULL if row["recompute"] else ActivationCheckpoint.none,
        compile=row["compile"],
    )
    assert report.passed, report.table()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dp_shard": 4}, {"tp": 2, "dp_shard": 2}),
        ({"dp_shard": 4}, {"pp": 2, "dp_shard": 2}),
        pytest.param({"tp": 2, "dp_shard": 2}, {"dp_shard": 4}, marks=pytest.mark.slow),
        ({"tp": 2, "dp_shard": 2}, {"pp": 2, "dp_shard": 2}),
        pytest.param({"pp": 2, "dp_shard": 2}, {"dp_shard": 4}, marks=pytest.mark.slow),
        ({"pp": 2, "dp_shard": 2}, {"tp": 2, "dp_shard": 2}),
    ],
)
def test_resumes_in_another_layout(
    verifier: Verifier, demo_data: DataConfig, before: dict[str, int], after: dict[str, int]
) -> None:
    report = run(verifier, demo_data, microbatch=4, steps=3, resume_in=after, **before)  # type: ignore[arg-type]
    assert report.passed, report.table()
    assert {axis: n for axis, n in report.resumed_layout.items() if n > 1} == after


def test_fp32_stays_within_its_tolerance(verifier: Verifier, demo_data: DataConfig) -> None:
    report = run(verifier, demo_data, steps=3, dtype=Precision.fp32, pp=2, dp_shard=2)
    assert report.passed, report.table()
    assert report.tolerance == 1e-5


@pytest.mark.parametrize(
    ("defect", "named"),
    [
        (Defect.grad_scale, "gradient scale: every gradient is 1.5 times"),
        (Defect.drop_grad, "dropped gradient: zero for layers.0.feed_forward.w1.weight"),
        (Defect.stale_shard, "stale shard: layers.0.feed_forward.w1.weight, rows 0 to 25 of 52"),
        (Defect.reorder_batch, "wrong batch: from row 0 on, samples [16, 17"),
    ],
)
@pytest.mark.parametrize("dtype", [Precision.fp32, Precision.fp64])
def test_names_a_planted_defect(
    verifier: Verifier, demo_data: DataConfig, defect: Defect, named: str, dtype: Precision
) -> None:
    report = run(verifier, demo_data, inject=defect, dtype=dtype, dp_shard=2)
    assert not report.passed
    assert named in report.findings[0], report.table()


def test_refuses_an_unknown_degree_to_resume_in(verifier: Verifier, demo_data: DataConfig) -> None:
    with pytest.raises(ValueError, match="resume_in.*unknown degree zp"):
        run(verifier, demo_data, resume_in={"zp": 2}, dp_shard=2)
