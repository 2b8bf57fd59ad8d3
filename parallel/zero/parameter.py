"""One parameter of a unit: this rank's slice of the master, and the whole that modules use."""

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from phalanx.parallel.local import local


@dataclass(kw_only=True)
class UnitParameter:
    """A parameter, possibly of several modules.

    Before `Unit` takes over, modules hold `sharded`, a DTensor laid out over copies, slices and
    tensor-parallel ranks; after, they hold `whole`, whose memory comes and goes.
    """

    places: list[tuple[nn.Module, str]]
    shape: tuple[int, ...]
    """Of the whole, on this tensor-parallel rank."""
    tensor_parallel: tuple[DeviceMesh, tuple[Placement, ...]] | None
    sharded: nn.Parameter
    whole: nn.Parameter | None = field(default=None)

    def find(self) -> None:
        """See what modules hold now: memory, or another parameter, may have been given to them."""
        module, name = self.places[0]
        found = getattr(module, name)
        assert all(getattr(other, key) is found for other, key in self.places), name
        self.sharded = found

    @property
    def local(self) -> Tensor:
        """This rank's rows of the master."""
        return local(self.sharded.detach())

    def hand_over(self, memory: Tensor) -> None:
        """Let modules compute with `memory`, of `shape`."""
        if self.tensor_parallel is not None:
            mesh, placements = self.tensor_parallel
            memory = DTensor.from_local(
                memory,
                mesh,
                placements,
                run_check=False,
                shape=self.sharded.shape,
                stride=self.sharded.stride(),
            )
        self.whole = nn.Parameter(memory, requires_grad=self.sharded.requires_grad)
        for module, name in self.places:
            module.register_parameter(name, self.whole)

    def take_gradient(self) -> Tensor | None:
        """The whole's gradient on this tensor-parallel rank, which is forgotten; None without."""
        assert self.whole is not None
        grad, self.whole.grad = self.whole.grad, None
        if isinstance(grad, DTensor):
            assert self.tensor_parallel is not None
            if grad.placements != self.tensor_parallel[1]:
                grad = grad.redistribute(placements=self.tensor_parallel[1])
            return grad.to_local()
        return grad

    def set_gradient(self, part: Tensor) -> None:
        """Give the master its rows of the gradient."""
        master = self.sharded
        assert isinstance(master, DTensor)
        part = part.to(dtype=master.dtype, device=self.local.device)
        # Not DTensor.from_local, which would take an offloaded part back to the mesh's device.
        master.grad = DTensor(part, master._spec, requires_grad=False)


def shard_parameter(parameter: nn.Parameter, spec: DeviceMesh, slice_index: int) -> UnitParameter:
    """Cut a parameter along dim 0 over the last axis of `spec`; on the meta device, too."""
    assert parameter.dim() > 0, "a parameter without dimensions cannot be cut"
    tensor_parallel = None
    whole = parameter.detach()
    if isinstance(whole, DTensor):
        tensor_parallel = whole.device_mesh, tuple(whole.placements)
        whole = whole.to_local()
    slices = spec.size(spec.ndim - 1)
    chunks = whole.chunk(slices)
    rows = chunks[slice_index] if slice_index < len(chunks) else whole[:0]
    placements: list[Placement] = [Replicate()] * (spec.ndim - 1)
    mesh, cut_before = spec, 1
    if tensor_parallel is not None:
        mesh = DeviceMesh._concatenate([spec, tensor_parallel[0]])
        if any(placement.is_shard(0) for placement in tensor_parallel[1]):
            cut_before = tensor_parallel[0].size()
    placements.append(_StridedShard(0, split_factor=cut_before) if cut_before > 1 else Shard(0))
    sharded = nn.Parameter(
        DTensor.from_local(
            rows.clone(),
            mesh,
            (*placements, *(tensor_parallel[1] if tensor_parallel else ())),
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ),
        requires_grad=parameter.requires_grad,
    )
    return UnitParameter(
        places=[], shape=tuple(whole.shape), tensor_parallel=tensor_parallel, sharded=sharded
    )
