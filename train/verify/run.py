"""One command's proof: the layout, one process, and the layout's checkpoint resumed elsewhere."""

import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from phalanx.parallel.config import ActivationCheckpoint, ParallelConfig
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.config import Config, Defect, Precision, PrecisionConfig
from phalanx.train.optim.config import LrConfig, LrSchedule, OptimizerName
from phalanx.train.plan.pipeline import check_pipeline
from phalanx.train.verify.compare import VerifyReport, compare
from phalanx.train.verify.record import record

TOLERANCE = {Precision.fp32: 1e-5, Precision.fp64: 1e-12}
"""Rounding of sums taken in another order reaches some 1e-7 to 1e-6 in fp32 (unit roundoff 6e-8)
and 1e-15 in fp64; a dropped term, a wrong factor or a stale shard is larger than 1e-3."""
DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


def verify(config: Config, launch: Callable[..., list[Any]], *, world_size: int) -> VerifyReport:
    """Run the layout of `config` and its one-process reference, and compare every number.

    Args:
        launch: phalanx.launch.ranks.start.launch.
        world_size: ranks of the layout.

    Raises:
        ValueError: verify.resume_in names no layout that this configuration can run in, or the
            configuration rounds what travels.
    """
    reference, layout, resumed = layouts(config)
    resumed_size = _num_ranks(resumed)
    tolerance = config.verify.tolerance
    if tolerance is None:
        tolerance = TOLERANCE[config.verify.dtype]
    save_at = max(1, config.verify.steps // 2)
    with tempfile.TemporaryDirectory(prefix="phalanx-verify-") as name:
        folders = {part: Path(name) / part for part in ("reference", "layout", "resumed")}
        for folder in folders.values():
            folder.mkdir()
        for run, part, size, first in (
            (reference, "reference", 1, 0),
            (layout, "layout", world_size, 0),
            (resumed, "resumed", resumed_size, save_at),
        ):
            run = replace(
                run,
                checkpoint=replace(run.checkpoint, dir=f"{name}/checkpoints", async_save=False),
                launch=replace(run.launch, ranks_per_node=size // run.launch.nodes),
            )
            launch(
                _record,
                run,
                folders[part],
                first,
                save_at if part == "layout" else None,
                world_size=size,
                config=run.launch,
            )
        worst, findings = compare(folders["reference"], folders["layout"], tolerance)
        again, more = compare(folders["reference"], folders["resumed"], tolerance)
    return VerifyReport(
        layout=layout.parallel.sized(world_size),
        resumed_layout=resumed.parallel.sized(resumed_size),
        tolerance=tolerance,
        worst=worst,
        resumed=again,
        findings=findings or [f"after resuming: {text}" for text in more],
    )


def layouts(config: Config) -> tuple[Config, Config, Config]:
    """The lone process, the layout, and what the layout's checkpoint is resumed in.

    Raises:
        ValueError: as `verify`.
    """
    _check_exact(config)
    layout = _plain(config)
    # Lone process: nothing sharded, cut, recomputed or compiled.
    reference = _in_layout(layout, dict.fromkeys(DEGREES, 1), alone=True)
    resumed = _in_layout(layout, _resume_degrees(config), alone=False)
    check_pipeline(resumed, resumed.num_microbatches(_num_ranks(resumed)))
    return reference, layout, resumed


def _num_ranks(config: Config) -> int:
    return config.parallel.dp_shard * config.parallel.fixed_degree


def _record(ranks: Any, config: Config, folder: Path, first: int, save_at: int | None) -> None:
    record(ranks, config, folder, first=first, save_at=save_at)


def _plain(config: Config) -> Config:
    """The configuration in the format of the comparison, with an optimizer that shows mistakes.

    In a warm-up's first steps a missing update would be as small as rounding, so the rate is
    constant and every matrix decays. AdamW divides a gradient by its own size, which makes pure
    rounding noise (a gradient of zero) as large as a step; a larger eps keeps noise small.
    """
    dtype = config.verify.dtype
    optim = replace(
        config.optim,
        lr=LrConfig(schedule=LrSchedule.constant, warmup_steps=0, peak=1e-3),
        weight_decay=max(config.optim.weight_decay, 0.1),
        eps=max(config.optim.eps, 1e-3),
    )
    precision = PrecisionConfig(params=dtype, compute=dtype, reduce=dtype)
    return replace(config, precision=precision, optim=optim)


def _in_layout(config: Config, degrees: dict[str, int], *, alone: bool) -> Config:
    """The same run in another layout; without any planted defect."""
    given: dict[str, Any] = degrees if alone else {**degrees, "compile": config.parallel.compile}
    parallel = ParallelConfig(
        activation_checkpoint=(
            ActivationCheckpoint.none if alone else config.parallel.activation_checkpoint
        ),
        **given,
    )
    pipeline = config.pipeline
    if parallel.pp == 1:
        pipeline = replace(pipeline, post_validation=False)
    return replace(
        config,
        parallel=parallel,
        pipeline=pipeline,
        zero=_zero_in(config.zero, parallel, alone=alone),
        # Its ranks are one node, whatever the layout's are.
        launch=replace(config.launch, nodes=1, emulate_nodes=False, ranks_per_node=None),
        verify=replace(config.verify, inject=Defect.none),
    )


def _zero_in(zero: ZeroConfig, parallel: ParallelConfig, *, alone: bool) -> ZeroConfig:
    """The same sharding where it fits other degrees; plain for a lone process."""
    if alone:
        return ZeroConfig()
    fits = zero.secondary_shard and parallel.dp_shard % zero.secondary_shard == 0
    return replace(zero, secondary_shard=zero.secondary_shard if fits else 0)


def _check_exact(config: Config) -> None:
    for name in ("quantize_weights", "quantize_gradients"):
        value: Quantization = getattr(config.zero, name)
        if value is not Quantization.none:
            raise ValueError(
                f"zero.{name}={value.name}: rounds what travels, so that no layout computes what "
                f"one process does to verify.tolerance; verify with zero.{name}=none"
            )
    low_bit = config.optim.name is not OptimizerName.adamw
    if low_bit and config.verify.dtype is Precision.fp32 and config.verify.tolerance is None:
        raise ValueError(
            f"verify.dtype=fp32: with optim.name={config.optim.name.name} a last bit that differs "
            "between layouts can choose another code of a state, far above the tolerance; use "
            "verify.dtype=fp64, which is exact, or set verify.tolerance (0.01)"
        )


def _resume_degrees(config: Config) -> dict[str, int]:
    """Degrees of verify.resume_in; what it does not name is 1."""
    asked = config.verify.resume_in
    known = {field.name for field in fields(ParallelConfig)} & set(DEGREES)
    unknown = sorted(asked.keys() - known)
    if unknown:
        raise ValueError(
            f"verify.resume_in={asked}: unknown degree {unknown[0]}; use {', '.join(DEGREES)}"
        )
    for degree, size in asked.items():
        if size < 1:
            raise ValueError(f"verify.resume_in={asked}: {degree} must be a whole number from 1")
    return dict.fromkeys(DEGREES, 1) | asked
