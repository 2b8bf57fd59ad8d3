"""Low-bit AdamW over ranks: a shard computes and saves what the whole computes, bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from phalanx.checkpoint.chunks import chunk_of
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.optim.config import OptimConfig, OptimizerName
from phalanx.train.optim.low_bit import LowBitAdamW
from phalanx.train.optim.sharded import local_of
from tests.checkpoint.ranks import Run, manager_of

NAMES = ("adamw8bit", "adamw4bit")
SAVED_AT, STEPS = 3, 5
LAYOUTS: dict[str, dict[str, int]] = {
    "dp_shard=4": {"dp_shard": 4},
    "dp_shard=2 tp=2": {"dp_shard": 2, "tp": 2},
    "dp_replicate=2 dp_shard=2": {"dp_replicate": 2, "dp_shard": 2},
    "tp=4": {"tp": 4},
}


class Net(nn.Module):
    """Matrices that tensor parallelism cuts by rows and by columns, one with two rows (4 ranks
    leave two of them empty-handed) and one of odd rows, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(96, 82)
        self.down = nn.Linear(128, 70, bias=False)
        self.flat = nn.Linear(2100, 2, bias=False)
        self.odd = nn.Linear(61, 75, bias=False)
        self.small = nn.Linear(8, 7, bias=False)
        self.norm = nn.LayerNorm(6)


STYLES: dict[str, type[ColwiseParallel] | type[RowwiseParallel]] = {
    "up": ColwiseParallel,
    "down": RowwiseParallel,
}


def parameters_in(degrees: Mapping[str, int]) -> dict[str, nn.Parameter]:
    """The net's, with known values, cut as a layout cuts them; whole without degrees."""
    torch.manual_seed(0)
    net = Net()
    if degrees:
        mesh = init_device_mesh("cpu", tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        if "tp" in degrees:
            parallelize_module(net, mesh["tp"], {name: style() for name, style in STYLES.items()})
        axes = tuple(axis for axis in degrees if axis != "tp")
        if axes:
            fully_shard(net, mesh=mesh[axes])
    return dict(net.named_parameters())


def part_of(tensor: Tensor, whole: Tensor) -> Tensor:
    """What this rank holds of `whole`, if it is cut as `tensor` is."""
    chunk = chunk_of("", tensor)
    if chunk is None:
        return whole[:0]
    for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.local.shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def run_steps(optimizer: LowBitAdamW, named: dict[str, nn.Parameter], first: int, end: int) -> None:
    """Steps with the same gradients in every layout."""
    for step in range(first, end):
        generator = torch.Generator().manual_seed(10 + step)
        for parameter in named.values():
            sizes = 10.0 ** -(4 * torch.rand(parameter.shape, generator=generator))
            whole = torch.randn(parameter.shape, generator=generator) * sizes
            part = part_of(parameter, whole).contiguous()
            parameter.grad = (
                DTensor.from_local(
                    part,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                if isinstance(parameter, DTensor)
                else part
            )
        optimizer.step(1e-2)


def made(name: str, degrees: Mapping[str, int]) -> tuple[LowBitAdamW, dict[str, nn.Parameter]]:
    named = parameters_in(degrees)
    return LowBitAdamW(named, OptimConfig(name=OptimizerName[name])), named


def state_of(optimizer: LowBitAdamW, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    model = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
    return model | optimizer.state_tensors()


def whole_states(name: str) -> dict[int, dict[str, Tensor]]:
    """By steps done: what one process computes."""
    optimizer, named = made(name, {})
    states = {}
    for first, end in ((0, SAVED_AT), (SAVED_AT, STEPS)):
        run_steps(optimizer, named, first, end)
        states[end] = {key: tensor.clone() for key, tensor in state_of(optimizer, named).items()}
    return states


def differing(state: dict[str, Tensor], whole: dict[str, Tensor]) -> list[str]:
    """Names whose part here is not that part of the whole, to the bit."""
    assert state.keys() == whole.keys()
    return [
        name
        for name, tensor in state.items()
        if tensor.shape != whole[name].shape
        or not torch.equal(local_of(tensor), part_of(tensor, whole[name]))
    ]


def train_and_save(ranks: Ranks, root: Path, degrees: dict[str, int]) -> dict[str, list[str]]:
    """What differs from one process, by optimizer; saves each after SAVED_AT steps."""
    with process_group(ranks):
        return saved_in(ranks, root, degrees)


def saved_in(ranks: Ranks, root: Path, degrees: dict[str, int]) -> dict[str, list[str]]:
    found = {}
    for name in NAMES:
        optimizer, named = made(name, degrees)
        run_steps(optimizer, named, 0, SAVED_AT)
        state = state_of(optimizer, named)
        found[name] = differing(state, whole_states(name)[SAVED_AT])
        manager = manager_of(ranks, root / name)
        manager.save(SAVED_AT, state, {})
        manager.close()
    return found


def save_then_resume_anywhere(ranks: Ranks, root: Path) -> dict[str, list[str]]:
    """Train in one layout; load what it and three ranks saved in every other, and go on."""
    with process_group(ranks):
        found = saved_in(ranks, root / "four", LAYOUTS["dp_shard=2 tp=2"])
        for name in NAMES:
            wholes = whole_states(name)
            for saved, layouts in (("three", LAYOUTS), ("four", ("dp_shard=4", "tp=4"))):
                for layout in layouts:
                    degrees = LAYOUTS[layout]
                    optimizer, named = made(name, degrees)
                    manager = manager_of(ranks, root / saved / name)
                    manager.load(SAVED_AT, state_of(optimizer, named))
                    manager.close()
                    case = f"{name} {saved} -> {layout}"
                    found[case] = differing(state_of(optimizer, named), wholes[SAVED_AT])
                    run_steps(optimizer, named, SAVED_AT, STEPS)
                    after = differing(state_of(optimizer, named), wholes[STEPS])
                    found[f"{case}, trained on"] = after
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_shards_equal_one_process(run_ranks: Run, tmp_path: Path, world_size: int) -> None:
    degrees = {"dp_shard": world_size}
    for found in run_ranks(train_and_save, tmp_path, degrees, world_size=world_size):
        assert found == {name: [] for name in NAMES}


def test_a_state_saved_in_one_layout_goes_on_in_any_other(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(train_and_save, tmp_path / "three", {"dp_shard": 3}, world_size=3)
    for found in run_ranks(save_then_resume_anywhere, tmp_path, world_size=4):
        assert len(found) == 2 + 2 * 2 * (len(LAYOUTS) + 2)
        assert {case: wrong for case, wrong in found.items() if wrong} == {}


def cut_inside_a_block(ranks: Ranks) -> str:
    with process_group(ranks):
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("tp",))
        net = nn.Module()
        net.down = nn.Linear(192, 64, bias=False)
        parallelize_module(net, mesh["tp"], {"down": RowwiseParallel()})
        try:
            LowBitAdamW(dict(net.named_parameters()), OptimConfig(name=OptimizerName.adamw8bit))
        except ValueError as error:
            return str(error)
    return ""


def test_columns_cut_inside_a_block_are_refused(run_ranks: Run) -> None:
    for message in run_ranks(cut_inside_a_block, world_size=3):
        assert message.startswith("optim.name=adamw8bit: parallel.tp=3 cuts the 192 columns of ")
        assert "down.weight [64, 192]" in message
