"""What a user may ask of ZeRO sharding. Torch-free."""

from dataclasses import dataclass, field
from enum import Enum

from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.partition import STAGES, Extent, Partition


class Offload(Enum):
    """Where master parameters and optimizer states lie."""

    none = "none"
    cpu = "cpu"


@dataclass(kw_only=True)
class PartitionConfig:
    """The ranks among which each thing is divided; params <= grads <= states."""

    params: Extent | None = None
    """Parameters in the compute format: none, node (each node has them all) or all; empty = as
    zero.stage says."""
    grads: Extent | None = None
    """Gradients between microbatches: none, node or all; empty = as zero.stage says."""
    states: Extent | None = None
    """Master parameters and optimizer states: none, node or all; empty = as zero.stage says."""


@dataclass(kw_only=True)
class ZeroConfig:
    """How the data-parallel ranks divide parameters, gradients and optimizer states."""

    stage: int = 3
    """0: everything replicated, gradients all-reduced. 1: optimizer states sharded, gradients
    reduced once a step. 2: gradients sharded too, reduced at each microbatch. 3: parameters
    sharded too, gathered again for the backward pass. Names for points of zero.partition."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    """What is divided among which of the dp_shard ranks, where zero.stage is not fine enough."""
    secondary_shard: int = 0
    """Stage 3: so many neighbouring ranks of a node also divide a copy of the parameters in the
    compute format, so that between nodes they are gathered once a step (ZeRO++ hpZ); 0 = none."""
    quantize_weights: Quantization = Quantization.none
    """Format that matrices are gathered in (ZeRO++ qwZ): none, int8, int4 or fp8. Vectors (norms,
    biases) travel in the compute format. All ranks compute with the same rounded values; the
    masters are not rounded."""
    quantize_gradients: Quantization = Quantization.none
    """Format that matrices' gradients are reduced in (ZeRO++ qgZ): none, int8 or int4. They are
    added up in precision.reduce, and rounded twice: for inside a node, and for between nodes."""
    block_size: int = 256
    """Elements that share one scale."""
    error_feedback: bool = False
    """Add what rounding took from a gradient to the next one; costs a gradient's memory a rank."""
    offload: Offload = Offload.none
    """cpu: master parameters and optimizer states lie in host memory, and the optimizer runs
    there."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"zero.stage={self.stage}: choose 0, 1, 2 or 3")
        if self.secondary_shard < 0:
            raise ValueError(
                f"zero.secondary_shard={self.secondary_shard}: a number of ranks, or 0 for none"
            )
        self._check_partition()
        self._check_quantization()

    @property
    def extents(self) -> Partition:
        """The point of the partition space that these settings name."""
        named = STAGES[self.stage]
        params = Extent.node if self.secondary_shard else named.params
        given = self.partition
        return Partition(
            params=given.params or params,
            grads=given.grads or named.grads,
            states=given.states or named.states,
        )

    def _check_partition(self) -> None:
        point = self.extents
        if not point.is_nested:
            raise ValueError(
                f"zero.partition={{params: {point.params.name}, grads: {point.grads.name}, states: "
                f"{point.states.name}}}: needs params <= grads <= states in none < node < all "
                f"(empty ones come from zero.stage={self.stage})"
            )
        if self.secondary_shard and (
            point != Partition(Extent.node, Extent.all, Extent.all) or self.stage != 3
        ):
            raise ValueError(
                f"zero.secondary_shard={self.secondary_shard}: is a second copy beside parameters "
                f"divided among all ranks; use it with zero.stage=3 (here {self.stage}) and "
                "without zero.partition"
            )

    def _check_quantization(self) -> None:
        block = self.block_size
        if block < 8 or block > 65536:
            raise ValueError(
                f"zero.block_size={block}: from 8 (smaller ones send more scales than values) to "
                "65536 elements"
            )
        weights, grads = self.quantize_weights, self.quantize_gradients
        if grads is Quantization.fp8:
            raise ValueError("zero.quantize_gradients=fp8: choose none, int8 or int4")
        if Quantization.int4 in (weights, grads) and block % 2:
            raise ValueError(
                f"zero.block_size={block}: int4 packs two elements in a byte; use an even number"
            )
        point = self.extents
        if weights is not Quantization.none and point.states is Extent.none:
            raise ValueError(
                f"zero.quantize_weights={weights.name}: with optimizer states on every rank "
                "(zero.stage=0) no weights are gathered; divide zero.partition.states"
            )
        if grads is not Quantization.none and point.states is not Extent.all:
            raise ValueError(
                f"zero.quantize_gradients={grads.name}: needs zero.partition.states=all (here "
                f"{point.states.name}): copies of states need sums that are the same to the bit"
            )
        if self.error_feedback and grads is Quantization.none:
            raise ValueError(
                "zero.error_feedback=true: nothing is rounded; set zero.quantize_gradients"
            )

    def check_nodes(self, dp_shard: int, per_node: int | None) -> None:
        """Whether the ranks of a node fit these settings.

        `per_node` of the `dp_shard` ranks share a node; None where nodes differ in it.

        Raises:
            ValueError: they do not fit.
        """
        uses_nodes = Extent.node in (self.extents.params, self.extents.grads, self.extents.states)
        if per_node is None:
            if uses_nodes or self.quantize_gradients is not Quantization.none:
                raise ValueError(
                    f"parallel.dp_shard={dp_shard}: nodes would hold different numbers of one "
                    "model's shards, and zero's extent `node` and quantized gradients need equal "
                    "ones; make dp_shard x tp a multiple of launch.ranks_per_node, or a divisor"
                )
            return
        copies = self.secondary_shard
        if copies > per_node:
            raise ValueError(
                f"zero.secondary_shard={copies}: larger than a node, which has {per_node} of the "
                f"parallel.dp_shard={dp_shard} ranks; use {per_node}, or a divisor of it"
            )
        if copies and per_node % copies:
            raise ValueError(
                f"zero.secondary_shard={copies}: does not divide the {per_node} data-parallel "
                "ranks of a node; use a divisor"
            )

    def settings_beside_stage(self) -> list[str]:
        """What is set to other than its default, apart from the stage, as key=value."""
        default = ZeroConfig()
        changed = [
            f"zero.partition.{part}={extent.name}"
            for part, extent in vars(self.partition).items()
            if extent is not None
        ]
        for name in ("secondary_shard", "quantize_weights", "quantize_gradients"):
            value = getattr(self, name)
            if value != getattr(default, name):
                changed.append(f"zero.{name}={getattr(value, 'value', value)}")
        return changed

    def notes(self, num_nodes: int | None) -> list[str]:
        """Settings that do something else than their name says, where several ranks share a model.

        `num_nodes`: that a model's shards lie on; None where nobody knows yet.
        """
        notes, given, point = [], vars(self.partition), self.extents
        if self.stage != ZeroConfig().stage and all(given.values()):
            notes.append(f"zero.stage={self.stage}: no effect, zero.partition says everything")
        if num_nodes == 1:
            notes += [
                f"zero.partition.{part}=node: the same as all, for one node holds all "
                "of a model's shards"
                for part, extent in given.items()
                if extent is Extent.node
            ]
            if self.secondary_shard:
                notes.append(
                    f"zero.secondary_shard={self.secondary_shard}: one node holds all of a model's "
                    "shards, so that there is nothing between nodes to save; "
                    "launch.emulate_nodes=true plays several"
                )
        if self.quantize_weights is not Quantization.none and point.params is Extent.none:
            notes.append(
                f"zero.quantize_weights={self.quantize_weights.name}: weights are gathered once a "
                "step only, since every rank keeps them (zero.partition.params=none)"
            )
        if self.error_feedback:
            notes.append(
                "zero.error_feedback=true: each rank keeps what was rounded away, as large as a "
                "whole gradient; `phalanx plan` says how much"
            )
        return notes
