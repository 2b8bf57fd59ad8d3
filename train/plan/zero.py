"""What each way to divide the configured model would cost a rank: memory, and bytes sent in a step.

Of the pipeline rank that needs most memory, where there are several. Torch-free, and no rank is
started.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from phalanx.parallel.comm_meter import Traffic
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.config import PartitionConfig, ZeroConfig
from phalanx.parallel.zero.cost import Formats, Held, Shape, UnitShapes, held, sent
from phalanx.parallel.zero.partition import NAMES, POINTS, Partition, data_ranks_per_node
from phalanx.parallel.zero.places import place_of
from phalanx.train.config import Config
from phalanx.train.model.shapes import unit_shapes
from phalanx.train.optim.blocks import FORMATS, block_size
from phalanx.train.optim.config import OptimizerName
from phalanx.train.plan.costs import BYTES, estimated_memory
from phalanx.train.plan.cuts import stage_cuts
from phalanx.train.plan.limits import memory_limit
from phalanx.train.plan.pipeline import auto_placements, plan_pipeline

_SHORT = {"quantize_weights": "weights", "quantize_gradients": "grads"}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to divide the model, and what it costs."""

    name: str
    zero: ZeroConfig
    held: Held
    needed: float
    """Most bytes that a rank of any pipeline rank needs, activations counted."""
    sent: dict[str, Traffic]
    """By kind; the mean over a node's ranks."""
    configured: bool

    @property
    def total(self) -> Traffic:
        """Sent, over all kinds."""
        kinds = self.sent.values()
        return Traffic(
            inside=sum(kind.inside for kind in kinds), between=sum(kind.between for kind in kinds)
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one pipeline rank holds."""

    rank: int
    units: list[UnitShapes]
    activations: float
    """Bytes that it keeps for backward passes, by estimate."""

    @property
    def num_parameters(self) -> int:
        """That one of its ranks computes with."""
        return sum(unit.count * unit.numel for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the ways have in common."""

    config: Config
    world_size: int
    ranks_per_node: int
    degrees: dict[str, int]
    microbatches: int
    parts: list[Part]
    """Of each pipeline rank."""

    @cached_property
    def part(self) -> Part:
        """The pipeline rank that is looked at: which needs most memory as configured."""
        return max(self.parts, key=lambda part: _needed(self, part, self.config.zero))

    @property
    def formats(self) -> Formats:
        """Bytes of the configured number formats."""
        precision = self.config.precision
        return Formats(
            params=BYTES[precision.params],
            compute=BYTES[precision.compute],
            reduce=BYTES[precision.reduce],
        )


def setting_of(config: Config, *, world_size: int, ranks_per_node: int) -> Setting:
    """The configured layout's.

    Raises:
        ValueError: degrees, batch, schedule or nodes do not fit each other.
    """
    degrees = config.parallel.sized(world_size)
    microbatches = config.num_microbatches(world_size)
    config.check_nodes(world_size, ranks_per_node)
    return Setting(
        config=config,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        degrees=degrees,
        microbatches=microbatches,
        parts=_parts(config, microbatches),
    )


def ways(setting: Setting) -> list[Way]:
    """The ten points of the partition space, then ways to send less at the configured one."""
    config = setting.config.zero
    choices: list[tuple[str, ZeroConfig]] = []
    for name, zero in _choices(config):
        if all(_essence(zero) != _essence(other) for _, other in choices):
            choices.append((name, zero))
    if all(_essence(config) != _essence(other) for _, other in choices):
        choices.append(("as configured", config))
    found = []
    for name, zero in choices:
        try:
            found.append(_way(setting, name, zero))
        except ValueError:
            continue  # this cluster's nodes do not allow it
    return found


def _choices(config: ZeroConfig) -> Iterator[tuple[str, ZeroConfig]]:
    plain = replace(
        config,
        secondary_shard=0,
        quantize_weights=Quantization.none,
        quantize_gradients=Quantization.none,
        error_feedback=False,
    )
    for point in POINTS:
        yield NAMES[point], _at(plain, point)
    base, name = _at(plain, config.extents), ""
    if config.secondary_shard:
        base = replace(plain, partition=PartitionConfig(), secondary_shard=config.secondary_shard)
        name = f"secondary shard on {config.secondary_shard} ranks"
        yield name, base
    weights = _or(config.quantize_weights, Quantization.int8)
    grads = _or(config.quantize_gradients, Quantization.int4)
    for quantized in (
        {"quantize_weights": weights},
        {"quantize_gradients": grads},
        {"quantize_weights": weights, "quantize_gradients": grads},
    ):
        told = [f"{kind.name} {_SHORT[key]}" for key, kind in quantized.items()]
        try:
            changed = replace(base, **quantized)  # type: ignore[arg-type]
        except ValueError:
            continue  # this point takes no such quantization
        yield ", ".join([name, *told] if name else told), changed


def _or(kind: Quantization, default: Quantization) -> Quantization:
    return default if kind is Quantization.none else kind


def _at(zero: ZeroConfig, point: Partition) -> ZeroConfig:
    given = PartitionConfig(params=point.params, grads=point.grads, states=point.states)
    return replace(zero, partition=given, secondary_shard=0)


def _essence(zero: ZeroConfig) -> tuple[object, ...]:
    """What two settings that do the same have in common."""
    quantization = (zero.quantize_weights, zero.quantize_gradients, zero.error_feedback)
    return zero.extents, zero.secondary_shard, quantization


def _way(setting: Setting, name: str, zero: ZeroConfig) -> Way:
    config, degrees = setting.config, setting.degrees
    span = degrees["dp_replicate"] * degrees["dp_shard"] * degrees["tp"]
    per_node = setting.ranks_per_node
    if data_ranks_per_node(degrees["dp_shard"], degrees["tp"], per_node) is None:
        looked_at = span
    else:  # every node looks like the first one
        looked_at = min(span, per_node)
    first = setting.part.rank * span
    by_rank = [
        sent(
            setting.part.units,
            zero,
            setting.formats,
            place_of(rank, degrees, per_node, zero),
            microbatches=setting.microbatches,
        )
        for rank in range(first, first + looked_at)
    ]
    return Way(
        name=name,
        zero=zero,
        held=_held(setting, setting.part, zero),
        needed=max(_needed(setting, part, zero) for part in setting.parts),
        sent=_mean(by_rank),
        configured=_essence(zero) == _essence(config.zero),
    )


def _needed(setting: Setting, part: Part, zero: ZeroConfig) -> float:
    return _held(setting, part, zero).on_device + part.activations


def _held(setting: Setting, part: Part, zero: ZeroConfig) -> Held:
    """By the first rank of a pipeline rank, whose slices are the largest."""
    degrees = setting.degrees
    span = degrees["dp_replicate"] * degrees["dp_shard"] * degrees["tp"]
    formats, name = setting.formats, setting.config.optim.name

    def moments(shape: Shape, rows: int) -> int:
        return moment_bytes(name, shape, rows, size=formats.params)

    return held(
        part.units,
        zero,
        formats,
        place_of(part.rank * span, degrees, setting.ranks_per_node, zero),
        microbatches=setting.microbatches,
        moments=moments,
    )


def _mean(by_rank: list[dict[str, Traffic]]) -> dict[str, Traffic]:
    kinds = sorted({kind for sent_by_one in by_rank for kind in sent_by_one})
    none, count = Traffic(), len(by_rank)
    return {
        kind: Traffic(
            inside=sum(found.get(kind, none).inside for found in by_rank) / count,
            between=sum(found.get(kind, none).between for found in by_rank) / count,
        )
        for kind in kinds
    }


def moment_bytes(name: OptimizerName, shape: Shape, rows: int, *, size: int) -> int:
    """Bytes of both moments of some rows; `size`: of a master's number."""
    numel = rows * prod(shape[1:])
    block = block_size(shape, FORMATS[name]) if name in FORMATS else None
    if block is None:
        return 2 * numel * size
    return 2 * (numel // block) * (FORMATS[name].code_bytes(block) + 4)


def _parts(config: Config, microbatches: int) -> list[Part]:
    """Of each pipeline rank."""
    whole = [range(config.model.num_layers)]
    if config.parallel.pp == 1:
        activations = estimated_memory(config, whole).f[0]
        return [Part(rank=0, units=_units(config, whole), activations=activations)]
    if config.pipeline.schedule == "auto":  # without its search
        placement, schedule = auto_placements(config)[0], None
        cuts = stage_cuts(config, placement)
    else:
        plan = plan_pipeline(config, microbatches)
        placement, schedule, cuts = plan.schedule.placement, plan.schedule, plan.cuts
    parts = []
    for rank in sorted(set(placement)):
        mine = [cut for cut, owner in zip(cuts, placement, strict=True) if owner == rank]
        if schedule is None:
            activations = memory_limit(config, microbatches)
        else:
            activations = max(estimated_memory(config, cuts).after(schedule.orders[rank]))
        parts.append(Part(rank=rank, units=_units(config, mine), activations=activations))
    return parts


def _units(config: Config, parts: list[range]) -> list[UnitShapes]:
    tp = config.parallel.tp
    return [unit for layers in parts for unit in unit_shapes(config.model, layers, tp=tp)]
