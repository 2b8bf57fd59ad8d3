"""What a point of the partition space costs a rank: bytes that it holds, and bytes that it sends.

With P parameters, S = R L data-parallel ranks, L of them in each of R nodes, and s = 1, L or S for
the extents none, node and all, in bytes a number: masters and moments take o P / s_states,
gradients g P / s_grads, parameters in the compute format c P / s_params (AMSP, Chen et al., 2023,
with o = 12, g = 2 and c = 2; here sums of gradients have the masters' format). What is counted here
has in it what the engine adds: slices of whole rows, padding, scales. Activations are not in it.

What is sent is counted as the engine counts it, collective by collective, in a `CommMeter`.
Torch-free.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from phalanx.parallel.comm_meter import CommMeter, Traffic
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.config import Offload, ZeroConfig
from phalanx.parallel.zero.partition import Extent
from phalanx.parallel.zero.places import GroupRanks
from phalanx.parallel.zero.slices import Slices, block_format, wire_bytes

Shape = tuple[int, ...]
MomentBytes = Callable[[Shape, int], int]
"""Bytes of an optimizer's states: of a whole parameter's shape, and how many of its rows."""


@dataclass(frozen=True, kw_only=True)
class UnitShapes:
    """Parameters that are gathered together."""

    shapes: tuple[Shape, ...]
    """On this tensor-parallel rank."""
    count: int = 1
    """Units like this one."""
    gathers: int = 2
    """Times a microbatch that it is gathered where parameters are divided: forward and backward."""

    @property
    def numel(self) -> int:
        """Elements of one unit."""
        return sum(map(prod, self.shapes))


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Bytes of a number."""

    params: int
    compute: int
    reduce: int


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes on one rank, the first, whose slices are the largest."""

    masters: int
    moments: int
    """The optimizer's."""
    params: int
    """In the compute format, or as they travel: this rank's share."""
    grads: int
    """From one microbatch to the next."""
    feedback: int
    """What rounding took from gradients; see zero.error_feedback."""
    working: int
    """Most of what comes and goes: gathered units and gradients on their way, at most about."""
    on_host: bool
    """Whether masters and moments lie in the host's memory."""

    @property
    def on_device(self) -> int:
        """All that lies where the model computes."""
        total = self.params + self.grads + self.feedback + self.working
        return total if self.on_host else total + self.masters + self.moments


def sizes_of(unit: UnitShapes, config: ZeroConfig, num_slices: int, kind: Quantization) -> Slices:
    """How a unit is cut for what travels as `kind`."""
    fmt = block_format(kind, config, num_slices)
    return Slices(unit.shapes, num_slices=num_slices, block=1 if fmt is None else fmt.block)


def sent(
    units: Sequence[UnitShapes],
    config: ZeroConfig,
    formats: Formats,
    place: GroupRanks,
    *,
    microbatches: int,
) -> dict[str, Traffic]:
    """What the rank at `place` sends in a step, by kind: params, grads, replicas."""
    meter = CommMeter(rank=place.rank, ranks_per_node=place.ranks_per_node)
    point, nodes = config.extents, len(place.across)
    for unit in units:
        weights = unit.count * _weight_wire(unit, config, formats, place)
        uses = 1 if point.params is Extent.none else microbatches * unit.gathers
        refreshes = uses if point.params is Extent.all else 1
        meter.exchanged("params", place.across, weights * refreshes)
        meter.exchanged("params", place.local, weights * uses * nodes)
        sizes = sizes_of(unit, config, place.num_slices, config.quantize_gradients)
        grads = unit.count * wire_bytes(
            sizes, block_format(config.quantize_gradients, config, place.num_slices), formats.reduce
        )
        inside = 1 if point.grads is Extent.none else microbatches
        outside = microbatches if point.grads is Extent.all else 1
        meter.exchanged("grads", place.local, grads * inside * nodes)
        meter.exchanged("grads", place.across, grads * outside)
        for _ in range(unit.count):
            meter.all_reduced("replicas", place.copies, sizes.numel * formats.reduce)
    return {kind: traffic for kind, traffic in meter.take().items() if traffic.total}


def held(
    units: Sequence[UnitShapes],
    config: ZeroConfig,
    formats: Formats,
    place: GroupRanks,
    *,
    microbatches: int,
    moments: MomentBytes,
) -> Held:
    """What the rank at `place` holds, if it is one that holds most."""
    masters = states = params = grads = feedback = 0
    for unit in units:
        sizes = sizes_of(unit, config, place.num_slices, config.quantize_gradients)
        share = sum(entry.chunk for entry in sizes.entries)
        masters += unit.count * share * formats.params
        states += unit.count * sum(moments(e.shape, e.chunk_rows) for e in sizes.entries)
        params += unit.count * _kept_params(unit, config, formats, place)
        grads += unit.count * _kept_grads(unit, sizes, config, formats, place, microbatches)
        feedback += unit.count * _residual(sizes, config, formats, place)
    return Held(
        masters=masters,
        moments=states,
        params=params,
        grads=grads,
        feedback=feedback,
        working=_working(units, config, formats, place),
        on_host=config.offload is Offload.cpu,
    )


def _weight_wire(unit: UnitShapes, config: ZeroConfig, formats: Formats, place: GroupRanks) -> int:
    """Bytes of a rank's slice of a unit's parameters, as it travels."""
    sizes = sizes_of(unit, config, place.num_slices, config.quantize_weights)
    return wire_bytes(
        sizes, block_format(config.quantize_weights, config, place.num_slices), formats.compute
    )


def _kept_params(unit: UnitShapes, config: ZeroConfig, formats: Formats, place: GroupRanks) -> int:
    kept = config.extents.params
    if kept is Extent.none:
        # With one slice, modules compute with the masters where the format is the same.
        same = place.num_slices == 1 and formats.params == formats.compute
        return 0 if same and config.offload is Offload.none else unit.numel * formats.compute
    slices = len(place.across) if kept is Extent.node else 1
    return slices * _weight_wire(unit, config, formats, place)


def _kept_grads(
    unit: UnitShapes,
    sizes: Slices,
    config: ZeroConfig,
    formats: Formats,
    place: GroupRanks,
    microbatches: int,
) -> int:
    kept = config.extents.grads
    # Sums over microbatches are in the masters' format, as the masters' gradients are.
    if microbatches == 1 or kept is Extent.all:
        return sizes.numel * formats.params
    if kept is Extent.node:
        return len(place.across) * sizes.numel * formats.params
    if formats.reduce == formats.compute:  # autograd adds them up
        return unit.numel * formats.compute
    return place.num_slices * sizes.numel * formats.reduce


def _residual(sizes: Slices, config: ZeroConfig, formats: Formats, place: GroupRanks) -> int:
    if not config.error_feedback:
        return 0
    slices = place.num_slices if len(place.local) > 1 else 0
    slices += len(place.across) if len(place.across) > 1 else 0
    return slices * sizes.matrix_numel * formats.reduce


def _working(
    units: Sequence[UnitShapes], config: ZeroConfig, formats: Formats, place: GroupRanks
) -> int:
    """Two units gathered, one of them still on its way, and one unit's gradients: whole, in slices
    and as they come from other ranks."""
    slices, whole, on_way, reduced = place.num_slices, 0, 0, 0
    for unit in units:
        whole = max(whole, unit.numel * formats.compute)
        if slices > 1:
            in_wire = slices * _weight_wire(unit, config, formats, place)
            if config.quantize_weights is not Quantization.none:  # and read out of it, in slices
                weights = sizes_of(unit, config, slices, config.quantize_weights)
                in_wire += slices * weights.numel * formats.compute
            on_way = max(on_way, in_wire)
        sizes = sizes_of(unit, config, slices, config.quantize_gradients)
        in_slices = slices * sizes.numel * formats.reduce
        reduced = max(reduced, unit.numel * formats.compute + 2 * in_slices)
    gathered = 0 if config.extents.params is Extent.none else 2 * whole
    return gathered + on_way + reduced
