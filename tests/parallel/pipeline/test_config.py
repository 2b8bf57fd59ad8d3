"""What the pipeline's settings refuse and note."""

import pytest

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.train.config import Config
from phalanx.train.plan.notes import notes
from tests.refusals import (
    PIPELINE_MODULES,
    PP2,
    TINY,
    Case,
    batches,
    check_refusal,
    of,
    sized_batch,
    unreached,
    whole,
)

CASES = [
    of(PipelineConfig, "pipeline", "schedule", "zb", "gpipe, 1f1b, interleaved", "auto", ".json"),
    *(
        of(PipelineConfig, "pipeline", "stages_per_rank", chunks, *words, schedule=schedule)
        for schedule, chunks, *words in (
            ("interleaved", 1, "at least 2", "pipeline.schedule=1f1b"),
            ("gpipe", 2, "pipeline.schedule=gpipe", "use 1", "interleaved"),
            ("1f1b", 0, "use 1"),
            ("zb_v", 1, "use 2", "interleaved"),
            ("zb_v", 3, "use 2"),
            ("auto", 3, "1 or 2"),
            ("auto", 0, "1 or 2"),
            ("mine/order.json", 2, "mine/order.json", "leave it empty"),
        )
    ),
    of(PipelineConfig, "pipeline", "layers_per_stage", [3, 0, 2], "at least 1 layer"),
    of(PipelineConfig, "pipeline", "memory_limit", "8GiB", "schedule=zb_h1", schedule="zb_h1"),
    *(
        of(PipelineConfig, "pipeline", "memory_limit", size, "8GiB", schedule="auto")
        for size in ("much", "0", "0MiB", "-1GiB", "8 GiBit", "9" * 400)
    ),
    of(PipelineConfig, "pipeline", "profile_steps", -1, "0 or more"),
    whole(
        ("parallel.pp=6", "6 pipeline stages", "model.num_layers=5"),
        model=TINY,
        parallel=ParallelConfig(pp=6),
    ),
    whole(
        ("parallel.pp=2 x 3 stages per rank = 6", "model.num_layers=5"),
        model=TINY,
        parallel=PP2,
        pipeline=PipelineConfig(schedule="interleaved", stages_per_rank=3),
    ),
    *(
        whole(
            (f"pipeline.layers_per_stage={layers}", *words),
            model=TINY,
            parallel=PP2,
            pipeline=PipelineConfig(schedule=schedule, layers_per_stage=layers, **more),  # type: ignore[arg-type]
        )
        for schedule, layers, words, more in (
            ("1f1b", [3, 3], ("6 layers", "model.num_layers=5"), {}),
            ("1f1b", [2, 2, 1], ("3 stages", "parallel.pp=2", "has 2"), {}),
            ("zb_v", [3, 2], ("2 stages", "schedule=zb_v", "has 4"), {}),
            ("auto", [2, 2, 1], ("3 stages", "has 2 or 4"), {}),
            ("auto", [3, 2], ("2 stages", "has 4"), {"stages_per_rank": 2}),
        )
    ),
    *(
        whole(
            (f"parallel.pp={pp} x {chunks} stages", f"schedule={schedule}", "model.num_layers=5"),
            model=TINY,
            parallel=ParallelConfig(pp=pp, dp_shard=1),
            pipeline=PipelineConfig(schedule=schedule),
        )
        for schedule, pp, chunks in (("zb_v", 3, 2), ("auto", 6, 1), ("zb_h1", 6, 1))
    ),
    *(
        batches(
            (f"pipeline.schedule={schedule}", "1 microbatches", "at least 2", "gpipe"),
            2,
            training=sized_batch(1),
            parallel=PP2,
            pipeline=PipelineConfig(schedule=schedule),
        )
        for schedule in ("1f1b", "interleaved", "zb_h1", "zb_v")
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words[0])
def test_refusal_names_key_and_value(case: Case) -> None:
    check_refusal(case)


def test_every_refusal_has_a_case() -> None:
    assert unreached(PIPELINE_MODULES, CASES) == []


def test_settings_of_a_pipeline_that_is_not_there_are_noted() -> None:
    pipeline = PipelineConfig(
        schedule="auto", memory_limit="8GiB", profile_steps=5, layers_per_stage=[2, 2]
    )
    assert notes(Config(pipeline=pipeline)) == [
        f"pipeline.{setting}: no effect at parallel.pp=1"
        for setting in (
            "schedule=auto",
            "layers_per_stage=[2, 2]",
            "memory_limit=8GiB",
            "profile_steps=5",
        )
    ]
    assert notes(Config(parallel=PP2, pipeline=pipeline)) == []


def test_an_auto_schedule_that_is_never_measured_is_noted() -> None:
    def notes(profile_steps: int, steps: int) -> list[str]:
        return PipelineConfig(schedule="auto", profile_steps=profile_steps).notes(2, steps)

    assert notes(3, 5) == []
    [early] = notes(3, 4)
    assert early.startswith("pipeline.profile_steps=3: with training.steps=4 the run ends before")
    [never] = notes(0, 5)
    assert never.startswith("pipeline.profile_steps=0: ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("2.5GB", 2.5e9),
        ("512 MiB", 512 * 2**20),
        ("1000", 1000),
        ("64k", 64e3),
        ("16Ki", 2**14),
    ],
)
def test_sizes_in_bytes(text: str, size: float) -> None:
    assert PipelineConfig(schedule="auto", memory_limit=text).memory_limit_bytes == size
    assert PipelineConfig().memory_limit_bytes is None
