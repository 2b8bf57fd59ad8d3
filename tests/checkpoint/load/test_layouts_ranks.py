"""A checkpoint that any layout saved loads in any other."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from phalanx.checkpoint.format.folders import folder_name
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import Run, manager_of, stored_names


class Net(nn.Module):
    """Linears that tensor parallelism cuts by rows and by columns, evenly and not, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.odd_up = nn.Linear(8, 5)
        self.odd_down = nn.Linear(7, 8, bias=False)
        self.tiny = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(6)


STYLES: dict[str, type[ColwiseParallel] | type[RowwiseParallel]] = {
    "up": ColwiseParallel,
    "down": RowwiseParallel,
    "odd_up": ColwiseParallel,
    "odd_down": RowwiseParallel,
    "tiny": ColwiseParallel,
}


def built(degrees: dict[str, int]) -> nn.Module:
    """The net with known values in a layout, made the way a trainer makes it."""
    torch.manual_seed(0)
    net = Net()
    if not degrees:
        return net
    mesh = init_device_mesh("cpu", tuple(degrees.values()), mesh_dim_names=tuple(degrees))
    if "tp" in degrees:
        parallelize_module(net, mesh["tp"], {name: style() for name, style in STYLES.items()})
    axes = tuple(axis for axis in degrees if axis != "tp")
    if axes:
        fully_shard(net, mesh=mesh[axes])
    return net


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Parameters, a moment of each in the same layout, and a scalar."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        tensors[f"model.{name}"] = parameter
        tensors[f"optim.exp_avg.{name}"] = parameter.detach() * 2
        tensors[f"optim.step.{name}"] = torch.tensor(3.0)
    return tensors


def local_bytes(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    with torch.no_grad():
        return {
            name: (tensor.to_local() if hasattr(tensor, "to_local") else tensor)
            .detach()
            .contiguous()
            .numpy()
            .tobytes()
            for name, tensor in tensors.items()
        }


LAYOUTS: dict[str, dict[str, int]] = {
    "dp_shard=4": {"dp_shard": 4},
    "dp_shard=2 tp=2": {"dp_shard": 2, "tp": 2},
    "dp_replicate=2 dp_shard=2": {"dp_replicate": 2, "dp_shard": 2},
    "dp_replicate=2 tp=2": {"dp_replicate": 2, "dp_shard": 1, "tp": 2},
    "tp=4": {"tp": 4},
}
SAVED = ("dp_shard=4", "dp_shard=2 tp=2", "dp_replicate=2 dp_shard=2")


def save_layout(ranks: Ranks, root: Path, degrees: dict[str, int]) -> None:
    tensors = state_of(built(degrees))
    tensors[f"rng.{ranks.rank}"] = torch.full((4,), ranks.rank, dtype=torch.uint8)
    manager = manager_of(ranks, root)
    manager.save(100, tensors, {"layout": degrees, "lr": 0.1})
    manager.close()


def loads_equal(ranks: Ranks, root: Path, degrees: dict[str, int]) -> bool:
    """Fill a zeroed net; whether this rank's memory then equals the directly built one's."""
    net = built(degrees)
    expected = local_bytes(state_of(net))
    tensors = state_of(net)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    manager = manager_of(ranks, root)
    assert manager.newest() == 100
    meta = manager.load(100, tensors)
    assert meta["lr"] == 0.1
    manager.close()
    return local_bytes(tensors) == expected


def save_and_load_layouts(ranks: Ranks, root: Path) -> dict[str, bool]:
    with process_group(ranks):
        equal = {"one -> tp=4": loads_equal(ranks, root / "one", LAYOUTS["tp=4"])}
        for saved in SAVED:
            save_layout(ranks, root / saved, LAYOUTS[saved])
            for loaded, other in LAYOUTS.items():
                equal[f"{saved} -> {loaded}"] = loads_equal(ranks, root / saved, other)
        return equal


def save_alone(ranks: Ranks, root: Path) -> None:
    with process_group(ranks):
        save_layout(ranks, root / "one", {})


def load_alone(ranks: Ranks, root: Path) -> dict[str, bool]:
    with process_group(ranks):
        equal = {}
        for saved in SAVED:
            names = stored_names(root / saved, folder_name(100))
            rng = {name for name in names if name.startswith("rng.")}
            assert rng == {"rng.0", "rng.1", "rng.2", "rng.3"}
            equal[saved] = loads_equal(ranks, root / saved, {})
        return equal


def test_any_layout_loads_in_any_other(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_alone, tmp_path, world_size=1)
    for equal in run_ranks(save_and_load_layouts, tmp_path, world_size=4):
        assert len(equal) == 1 + len(SAVED) * len(LAYOUTS)
        assert [pair for pair, same in equal.items() if not same] == []
    [equal] = run_ranks(load_alone, tmp_path, world_size=1)
    assert [saved for saved, same in equal.items() if not same] == []
