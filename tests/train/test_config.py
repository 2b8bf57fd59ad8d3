"""Every refusal of every config.py names the key and the value, and none is untested.

Those of the pipeline's and of ZeRO's settings stand in files of their own.
"""

import importlib
from dataclasses import fields, is_dataclass, replace

import pytest

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.train.config import (
    BenchConfig,
    Config,
    LaunchConfig,
    Launcher,
    MonitorConfig,
    Precision,
    PrecisionConfig,
    ProfileConfig,
    SampleConfig,
    TrainingConfig,
    VerifyConfig,
)
from phalanx.train.data.config import CorpusConfig, DataConfig, tokenizer_path
from phalanx.train.model.config import ModelConfig, RopeScalingConfig
from phalanx.train.optim.config import LrConfig, OptimConfig, OptimizerName
from phalanx.train.plan.notes import notes
from tests.refusals import (
    CHECKPOINT_MODULES,
    INF,
    MODULES,
    NAN,
    PIPELINE_MODULES,
    PP2,
    ROOT,
    TINY,
    ZERO_MODULES,
    Case,
    batches,
    check_refusal,
    of,
    sized_batch,
    unreached,
    whole,
)

CASES = [
    *(
        of(ParallelConfig, "parallel", axis, 0, "from 1")
        for axis in ("pp", "dp_replicate", "cp", "tp", "ep")
    ),
    of(ParallelConfig, "parallel", "tp", -2, "from 1"),
    of(ParallelConfig, "parallel", "dp_shard", 0, "-1"),
    of(ParallelConfig, "parallel", "dp_shard", -2, "-1"),
    of(ParallelConfig, "parallel", "cp", 2, "parallel.cp=1"),
    of(ParallelConfig, "parallel", "ep", 4, "parallel.ep=1"),
    Case(
        make=lambda: ParallelConfig(pp=2, tp=2).sized(6),
        words=("pp=2", "tp=2", "= 4", "6 ranks", "launch.ranks_per_node"),
    ),
    Case(
        make=lambda: ParallelConfig(pp=2, dp_shard=3).sized(4),
        words=("pp=2", "dp_shard=3", "= 6", "4 ranks", "parallel.dp_shard=-1"),
    ),
    *(
        of(TrainingConfig, "training", key, 0, "at least 1")
        for key in ("steps", "seq_len", "global_batch_size", "microbatch_size")
    ),
    *(
        of(TrainingConfig, "training", key, -1, "0 or more")
        for key in ("seed", "eval_every", "eval_batches")
    ),
    of(PrecisionConfig, "precision", "params", Precision.bf16, "precision.compute=bf16"),
    of(LaunchConfig, "launch", "nodes", 0, "at least 1"),
    of(LaunchConfig, "launch", "ranks_per_node", 0, "at least 1"),
    of(LaunchConfig, "launch", "threads_per_rank", -1, "at least 1"),
    *(of(LaunchConfig, "launch", "timeout_s", value, "above 0") for value in (0.0, NAN, INF)),
    of(LaunchConfig, "launch", "nodes", 2, "launch=torchrun", launcher=Launcher.local),
    of(LaunchConfig, "launch", "emulate_nodes", True, "launch=local", "launch.ranks_per_node"),
    of(ProfileConfig, "monitor.profile", "start", -1, "0 or more"),
    of(ProfileConfig, "monitor.profile", "steps", -1, "0 or more"),
    *(
        of(SampleConfig, "monitor.sample", key, -1, "0 or more")
        for key in ("tokens", "every", "temperature")
    ),
    *(of(SampleConfig, "monitor.sample", "temperature", value, "finite") for value in (NAN, INF)),
    of(MonitorConfig, "monitor", "log_every", 0, "at least 1"),
    of(VerifyConfig, "verify", "steps", 1, "at least 2"),
    of(VerifyConfig, "verify", "dtype", Precision.bf16, "fp32 or fp64"),
    *(of(VerifyConfig, "verify", "tolerance", value, "0 or more") for value in (-1e-9, NAN, INF)),
    Case(make=lambda: BenchConfig(rounds=0), words=("bench", "rounds=0", "at least 1")),
    Case(make=lambda: BenchConfig(steps=0), words=("bench", "steps=0", "at least 1")),
    whole(
        ("monitor.profile.start=1000", "training.steps=1000"),
        monitor=MonitorConfig(profile=ProfileConfig(start=1000, steps=1)),
    ),
    whole(
        ("training.eval_batches=4", "data.eval_fraction=0", "training.eval_batches=0"),
        data=DataConfig(eval_fraction=0.0),
    ),
    *(
        whole((f"parallel.tp={tp}", key), model=TINY, parallel=ParallelConfig(tp=tp))
        for tp, key in (
            (4, "model.num_heads=6"),
            (3, "model.num_kv_heads=2"),
        )
    ),
    whole(
        ("parallel.tp=2", "model.ffn_dim=51"),
        model=replace(TINY, ffn_dim=51),
        parallel=ParallelConfig(tp=2),
    ),
    whole(
        ("parallel.tp=2", "model.vocab_size=299"),
        model=replace(TINY, vocab_size=299),
        parallel=ParallelConfig(tp=2),
    ),
    whole(
        ("parallel.tp=2", "training.seq_len=31"),
        model=TINY,
        training=TrainingConfig(seq_len=31),
        parallel=ParallelConfig(tp=2),
    ),
    whole(
        ("pipeline.post_validation=true", "parallel.pp=1", "2 or more"),
        pipeline=PipelineConfig(post_validation=True),
    ),
    *(
        whole(
            (*words, "pipeline.post_validation"),
            model=TINY,
            parallel=PP2,
            pipeline=PipelineConfig(post_validation=True),
            optim=optim,
        )
        for words, optim in (
            (("optim.name=adamw8bit", "forgets"), OptimConfig(name=OptimizerName.adamw8bit)),
            (("optim.beta1=0", "above 0"), OptimConfig(beta1=0.0)),
            (("optim.beta2=0", "above 0"), OptimConfig(beta2=0.0)),
            (
                ("optim.weight_decay=20", "optim.lr.peak=0.1", "below 1"),
                OptimConfig(weight_decay=20, lr=LrConfig(peak=0.1)),
            ),
        )
    ),
    batches(
        ("training.global_batch_size=6", "4 data-parallel ranks", "microbatch_size=1"),
        4,
        training=sized_batch(6),
    ),
    batches(("dp_shard=3", "4 ranks"), 4, parallel=ParallelConfig(dp_shard=3)),
    *(
        Case(
            make=lambda weight=weight: CorpusConfig(path="a/b", weight=weight),  # type: ignore[misc]
            words=("data.corpora", f"weight={weight}", "a/b", "above 0"),
        )
        for weight in (0.0, NAN, INF)
    ),
    Case(
        make=lambda: tokenizer_path(DataConfig(corpora=[CorpusConfig(path="a/b")])),
        words=("data.tokenizer", "data.corpora", "data.tokenizer=path/to/tokenizer.json"),
    ),
    of(DataConfig, "data", "eval_fraction", 1.0, "[0, 1)"),
    *(of(DataConfig, "data", "eval_fraction", value, "[0, 1)") for value in (-0.1, NAN, INF)),
    of(DataConfig, "data", "prefetch", -1, "0 or more"),
    of(DataConfig, "data", "vocab_size", 259, "260"),
    *(
        of(RopeScalingConfig, "model.rope_scaling", "factor", value, "1 (none) or more")
        for value in (0.5, NAN, INF)
    ),
    *(
        of(RopeScalingConfig, "model.rope_scaling", key, value, "above 0")
        for key in ("low_freq_factor", "high_freq_factor")
        for value in (0.0, NAN, INF)
    ),
    of(RopeScalingConfig, "model.rope_scaling", "original_max_seq_len", 0, "above 0"),
    of(
        RopeScalingConfig,
        "model.rope_scaling",
        "high_freq_factor",
        1.0,
        "low_freq_factor=1.0",
        factor=8.0,
    ),
    *(
        of(ModelConfig, "model", key, 0, "at least 1")
        for key in ("vocab_size", "dim", "num_layers", "num_heads", "ffn_dim")
    ),
    *(
        of(ModelConfig, "model", key, value, "at least 1")
        for key in ("num_kv_heads", "head_dim")
        for value in (0, -2)
    ),
    *(
        of(ModelConfig, "model", key, value, "above 0")
        for key in ("norm_eps", "rope_theta", "init_std")
        for value in (0.0, -1.0, NAN, INF)
    ),
    of(ModelConfig, "model", "num_heads", 5, "model.dim=256", "model.head_dim"),
    of(ModelConfig, "model", "head_dim", 7, "even"),
    of(ModelConfig, "model", "num_kv_heads", 3, "model.num_heads=4"),
    *(of(LrConfig, "optim.lr", "peak", value, "above 0") for value in (0.0, NAN, INF)),
    of(LrConfig, "optim.lr", "warmup_steps", -1, "0 or more"),
    of(LrConfig, "optim.lr", "min_ratio", 1.5, "[0, 1]"),
    of(LrConfig, "optim.lr", "decay_fraction", -0.1, "[0, 1]"),
    of(OptimConfig, "optim", "beta1", 1.0, "[0, 1)"),
    of(OptimConfig, "optim", "beta2", -0.1, "[0, 1)"),
    *(
        of(OptimConfig, "optim", key, -1.0, "0 or more")
        for key in ("eps", "weight_decay", "max_grad_norm")
    ),
    Case(
        make=lambda: Config(launch=LaunchConfig(racks=["a", "b"])).check_nodes(4, 1),
        words=("launch.racks=['a', 'b']", "4 nodes"),
    ),
]


FLOATS = [
    (part, name, field.name)
    for name in (*MODULES, *CHECKPOINT_MODULES, *PIPELINE_MODULES, *ZERO_MODULES)
    for part in vars(importlib.import_module(f"phalanx.{name}")).values()
    if is_dataclass(part) and part.__module__ == f"phalanx.{name}"
    for field in fields(part)
    if field.type in (float, float | None)
]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    ("part", "module", "key"), FLOATS, ids=lambda item: getattr(item, "__name__", item)
)
def test_every_float_must_be_finite(part: type, module: str, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}"):
        part(**{key: value})


def test_floats_are_found() -> None:
    assert len(FLOATS) > 15


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words[0])
def test_refusal_names_key_and_value(case: Case) -> None:
    check_refusal(case)


def test_every_refusal_has_a_case() -> None:
    assert unreached(MODULES, CASES) == []


def test_every_config_module_is_looked_at() -> None:
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("train", "parallel", "checkpoint", "fault", "launch", "bench")
        for path in (ROOT / folder).rglob("config.py")
    }
    assert found == {*MODULES, *CHECKPOINT_MODULES, *PIPELINE_MODULES, *ZERO_MODULES}


def test_defaults_are_right() -> None:
    assert Config().num_microbatches(4) == 4


@pytest.mark.parametrize(
    ("layout", "world_size", "sizes"),
    [
        (ParallelConfig(), 1, (1, 1, 1, 1, 1)),
        (ParallelConfig(), 6, (1, 1, 6, 1, 1)),
        (ParallelConfig(pp=2, tp=2), 12, (2, 1, 3, 1, 2)),
        (ParallelConfig(dp_replicate=2, dp_shard=2), 4, (1, 2, 2, 1, 1)),
    ],
)
def test_degrees_fill_the_world(
    layout: ParallelConfig, world_size: int, sizes: tuple[int, ...]
) -> None:
    assert tuple(layout.sized(world_size).values()) == sizes


def test_a_warm_up_longer_than_the_run_is_noted() -> None:
    def noted(warmup_steps: int) -> list[str]:
        lr = LrConfig(warmup_steps=warmup_steps)
        return notes(Config(training=TrainingConfig(steps=20), optim=OptimConfig(lr=lr)))

    assert noted(19) == []
    [last] = noted(20)
    [never] = noted(100)
    assert last.startswith("optim.lr.warmup_steps=20: with training.steps=20 ")
    assert last.endswith("only in the last step reaches its peak")
    assert never.startswith("optim.lr.warmup_steps=100: with training.steps=20 ")
    assert never.endswith("never reaches its peak")


def test_microbatches_of_a_rank() -> None:
    config = Config(
        training=TrainingConfig(global_batch_size=24, microbatch_size=2),
        parallel=ParallelConfig(dp_replicate=2, tp=2),
    )
    assert config.num_microbatches(8) == 3
