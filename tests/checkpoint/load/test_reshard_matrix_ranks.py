"""A state saved in any layout goes on in any other: with the losses that the first would have had.

The small model in fp64, at `phalanx verify`'s tolerance for it (1e-12): what is dropped, doubled or
put in another's place is some 1e-3, while fp32's own rounding would reach 1e-6 in five steps. Every
tensor is made NaN before it is loaded, so that what is not filled shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.checkpoint.boxes import ITEM_BYTES
from phalanx.checkpoint.chunks import chunk_of
from phalanx.checkpoint.config import SnapshotConfig
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.load.reshard import Moved
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.reading import tensors_of
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.parallel.zero.partition import Extent, Partition
from phalanx.train.config import Precision
from phalanx.train.engine.step import Engine
from phalanx.train.optim.config import OptimizerName
from phalanx.train.verify.run import TOLERANCE
from tests.checkpoint.ranks import LINGER_S, Run, holder_pids, kill_holders, manager_of
from tests.parallel.zero.layouts import LR, Case, at, case
from tests.small_run import rank_batch

pytestmark = pytest.mark.storage

NONE, NODE, ALL = Extent
SAVED_AT, FOLLOWING = 3, 5
"""Steps done when the state is saved, and losses compared afterwards."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A case on so many ranks; `case.ranks_per_node` of them make a node."""

    ranks: int
    case: Case

    @property
    def nodes(self) -> int:
        return self.ranks // self.case.ranks_per_node


def layout(
    zero: ZeroConfig | int, *, ranks: int, per_node: int | None = None, **degrees: Any
) -> Layout:
    zero = ZeroConfig(stage=zero) if isinstance(zero, int) else zero
    degrees = {"dp_shard": 1, "microbatch": 2, **degrees}
    # Tied, so that the ends of a pipeline hold copies of one matrix.
    made = case(zero, ranks_per_node=per_node or ranks, num_layers=4, tied=True, **degrees)
    return Layout(ranks=ranks, case=made)


LAYOUTS: dict[str, Layout] = {
    "one rank": layout(3, ranks=1),
    "replicated": layout(0, ranks=2, dp_shard=2),
    "stage 3": layout(3, ranks=4, dp_shard=4),
    "in each node": layout(at(Partition(NODE, NODE, NODE)), ranks=4, per_node=2, dp_shard=4),
    "params by node": layout(at(Partition(NODE, ALL, ALL)), ranks=4, per_node=2, dp_shard=4),
    "stage 1": layout(1, ranks=2, dp_shard=2),
    "hybrid shards": layout(3, ranks=4, per_node=2, dp_replicate=2, dp_shard=2),
    "tp": layout(3, ranks=2, tp=2),
    "tp, stage 1": layout(1, ranks=4, per_node=2, tp=2, dp_shard=2),
    "pp of 3": layout(3, ranks=3, pp=3),
    "pp in a V, stage 2": layout(2, ranks=4, pp=2, dp_shard=2, schedule="zb_v"),
    "pp, tp": layout(3, ranks=4, pp=2, tp=2),
}
FEW = ("one rank", "in each node", "tp", "pp in a V, stage 2")
TARGETS = ("stage 1", "pp of 3", "in each node")
"""The dozen pairs of a quick run: FEW x TARGETS."""


@dataclass(frozen=True)
class Saved:
    """A state in storage or memory, and the losses that followed where it was saved."""

    root: Path
    losses: list[float]


@dataclass(frozen=True)
class Loaded:
    """What one rank found."""

    meta: dict[str, Any]
    moved: Moved
    losses: list[float]


def train(engine: Engine, first: int, count: int) -> list[float]:
    """Losses of so many steps; the same on every rank."""
    losses = []
    for number in range(first, first + count):
        gradients = engine.gradients(rank_batch(engine, number=number))
        engine.update(gradients, LR)
        losses.append(gradients.loss)
    engine.settle()
    return losses


def spoilt(engine: Engine) -> dict[str, Tensor]:
    """The engine's state, none of it left."""
    tensors = engine.state_tensors()
    for name, tensor in tensors.items():
        chunk = chunk_of(name, tensor)
        if chunk is not None:
            chunk.local.fill_(torch.nan if chunk.local.is_floating_point() else 255)
    return tensors


# --- through storage ------------------------------------------------------------------------------


def save_in(ranks: Ranks, one: Case, root: Path) -> list[float]:
    with process_group(ranks):
        engine = one.engine(ranks)
        train(engine, 0, SAVED_AT)
        manager = manager_of(ranks, root)
        manager.save(SAVED_AT, engine.state_tensors(), {"root": root.name})
        manager.close()
        return train(engine, SAVED_AT, FOLLOWING)


def load_in(ranks: Ranks, one: Case, roots: list[Path]) -> list[Loaded]:
    found = []
    with process_group(ranks):
        for root in roots:
            engine = one.engine(ranks)
            manager = manager_of(ranks, root)
            meta = manager.load(SAVED_AT, spoilt(engine))
            moved = manager._finder.moved
            assert moved is not None
            manager.close()
            found.append(Loaded(meta, moved, train(engine, SAVED_AT, FOLLOWING)))
    return found


class Store:
    """States that were saved, each once for all tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved: dict[str, Saved] = {}

    def saved(self, run_ranks: Run, name: str, one: Layout) -> Saved:
        if name not in self._saved:
            root = self._folder / name
            by_rank = run_ranks(save_in, one.case, root, world_size=one.ranks, nodes=one.nodes)
            assert by_rank == [by_rank[0]] * one.ranks
            assert holder_pids(root) == {}
            self._saved[name] = Saved(root, by_rank[0])
        return self._saved[name]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("saved"))


def check(
    run_ranks: Run, store: Store, layouts: Mapping[str, Layout], sources: list[str], target: str
) -> None:
    """Load what each source saved in the target, and compare."""
    states = [store.saved(run_ranks, name, layouts[name]) for name in sources]
    one = layouts[target]
    roots = [state.root for state in states]
    by_rank = run_ranks(load_in, one.case, roots, world_size=one.ranks, nodes=one.nodes)
    for name, state, found in zip(sources, states, zip(*by_rank, strict=True), strict=True):
        pair = f"{name} -> {target}"
        losses = [item.losses for item in found]
        worst = check_losses(state.losses, losses, pair, same=name == target)
        assert all(item.meta == {"root": state.root.name} for item in found), pair
        read = sum(item.moved.read for item in found)
        needed = sum(item.moved.needed for item in found)
        assert read == needed == whole_bytes(state.root), pair  # each byte once
        print(f"{pair}: losses differ by {worst:.0e}, bytes read / needed {read / needed:.2f}")


def check_losses(
    expected: list[float], by_rank: list[list[float]], pair: str, *, same: bool
) -> float:
    """The largest relative difference."""
    assert len(expected) == FOLLOWING
    assert by_rank == [by_rank[0]] * len(by_rank), pair
    if same:
        assert by_rank[0] == expected, pair  # to the bit
    worst = max(abs(a / b - 1) for a, b in zip(by_rank[0], expected, strict=True))
    assert worst <= TOLERANCE[Precision.fp64], (pair, worst)
    return worst


def whole_bytes(root: Path) -> int:
    """Of every tensor, counted once."""
    [folder] = root.glob("step_*")
    tensors = tensors_of(read_manifest(open_storage(root), folder.name))
    return sum(prod(info.shape) * ITEM_BYTES[info.dtype] for info in tensors.values())


@pytest.mark.parametrize("target", TARGETS)
def test_a_dozen_pairs(run_ranks: Run, store: Store, target: str) -> None:
    check(run_ranks, store, LAYOUTS, list(FEW), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_pair(run_ranks: Run, store: Store, target: str) -> None:
    assert len(LAYOUTS) == 12
    check(run_ranks, store, LAYOUTS, list(LAYOUTS), target)


def test_losses_tell_another_state(run_ranks: Run, store: Store) -> None:
    """A moment that is off by a millionth shows, so the tolerance means something."""
    state = store.saved(run_ranks, "one rank", LAYOUTS["one rank"])
    [other] = run_ranks(load_disturbed, LAYOUTS["one rank"].case, state.root, world_size=1)
    worst = max(abs(a / b - 1) for a, b in zip(other, state.losses, strict=True))
    assert worst > 100 * TOLERANCE[Precision.fp64]


def load_disturbed(ranks: Ranks, one: Case, root: Path) -> list[float]:
    with process_group(ranks):
        engine = one.engine(ranks)
        manager = manager_of(ranks, root)
        tensors = spoilt(engine)
        manager.load(SAVED_AT, tensors)
        manager.close()
        name = next(name for name in tensors if name.startswith("optim.exp_avg_sq."))
        chunk = chunk_of(name, tensors[name])
        assert chunk is not None
        chunk.local.mul_(1 + 1e-6)
        return train(engine, SAVED_AT, FOLLOWING)


# --- low-bit states -------------------------------------------------------------------------------


def low_bit(name: OptimizerName, names: list[str]) -> dict[str, Layout]:
    """Some of the layouts, with another optimizer."""
    found = {}
    for key in names:
        one = LAYOUTS[key]
        optim = replace(one.case.config.optim, name=name)
        config = replace(one.case.config, optim=optim)
        found[f"{key}, {name.name}"] = replace(one, case=replace(one.case, config=config))
    return found


@pytest.mark.parametrize("name", [OptimizerName.adamw8bit, OptimizerName.adamw4bit])
def test_low_bit_states(run_ranks: Run, store: Store, name: OptimizerName) -> None:
    layouts = low_bit(name, ["stage 1", "pp of 3"])
    for target in layouts:
        check(run_ranks, store, layouts, list(layouts), target)


@pytest.mark.slow
@pytest.mark.parametrize("name", [OptimizerName.adamw8bit, OptimizerName.adamw4bit])
def test_low_bit_states_in_more_layouts(run_ranks: Run, store: Store, name: OptimizerName) -> None:
    layouts = low_bit(name, ["one rank", "in each node", "pp in a V, stage 2"])
    for target in layouts:
        check(run_ranks, store, layouts, list(layouts), target)


# --- through memory -------------------------------------------------------------------------------


def snapshots(parity: str) -> SnapshotConfig:
    return SnapshotConfig(every=1, parity=parity, linger_s=LINGER_S)


def snapshot_in(ranks: Ranks, one: Case, root: Path, parity: str) -> list[float]:
    """Commit a snapshot and end without a word, as an error does."""
    with process_group(ranks):
        engine = one.engine(ranks)
        manager = manager_of(ranks, root, snapshot=snapshots(parity), save_last=False)
        for step in range(1, SAVED_AT + 1):
            manager.before_update()
            train(engine, step - 1, 1)
            manager.snapshot(step, engine.state_tensors, {"step": step})
        manager.wait()
        manager.close(finished=False)
        return train(engine, SAVED_AT, FOLLOWING)


def resume_in(ranks: Ranks, one: Case, root: Path) -> Loaded:
    with process_group(ranks):
        engine = one.engine(ranks)
        manager = manager_of(ranks, root, snapshot=snapshots("none"), save_last=False)
        resumed = manager.resume(lambda step, names, meta: spoilt(engine))
        assert resumed is not None
        assert resumed.from_memory
        assert resumed.saved_step is None
        moved = manager._finder.moved
        assert moved is not None
        found = Loaded(resumed.meta, moved, train(engine, SAVED_AT, FOLLOWING))
        manager.snapshot(SAVED_AT + FOLLOWING, engine.state_tensors, {})
        manager.close()  # who has snapshots ends the holders, also those found
        return found


@dataclass(frozen=True, kw_only=True)
class Passage:
    """From one layout to another, through the memory of so many nodes each."""

    source: str
    target: str
    nodes: tuple[int, int]
    parity: str = "none"
    dropped: tuple[int, ...] = ()
    """Nodes whose memory is lost in between."""


PASSAGES = [
    Passage(source="hybrid shards", target="pp of 3", nodes=(1, 1)),
    Passage(source="tp", target="stage 1", nodes=(2, 2), parity="xor", dropped=(1,)),
]
MORE_PASSAGES = [
    Passage(source="pp, tp", target="in each node", nodes=(4, 2), parity="rs(2)", dropped=(2, 3)),
    Passage(source="pp in a V, stage 2", target="tp, stage 1", nodes=(2, 2)),
    Passage(source="stage 3", target="in each node", nodes=(1, 2)),
    Passage(source="in each node", target="replicated", nodes=(2, 2)),
    Passage(source="pp of 3", target="stage 3", nodes=(3, 4), parity="xor", dropped=(1,)),
    Passage(source="tp", target="one rank", nodes=(1, 1)),
    Passage(source="params by node", target="pp, tp", nodes=(4, 4), parity="xor", dropped=(0,)),
]


@pytest.mark.parametrize(
    "passage",
    [*PASSAGES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE_PASSAGES)],
    ids=lambda one: f"{one.source} -> {one.target}",
)
def test_from_memory(run_ranks: Run, tmp_path: Path, passage: Passage) -> None:
    source, target = LAYOUTS[passage.source], LAYOUTS[passage.target]
    root = tmp_path / "c"
    try:
        expected = run_ranks(
            snapshot_in,
            source.case,
            root,
            passage.parity,
            world_size=source.ranks,
            nodes=passage.nodes[0],
        )[0]
        kill_holders(root, set(passage.dropped))
        found = run_ranks(
            resume_in,
            target.case,
            root,
            world_size=target.ranks,
            nodes=passage.nodes[1],
        )
        assert holder_pids(root) == {}
    finally:
        kill_holders(root)
    check_losses(expected, [item.losses for item in found], str(passage), same=False)
    assert all(item.meta == {"step": SAVED_AT} for item in found)
    read, needed = (sum(getattr(item.moved, what) for item in found) for what in ("read", "needed"))
    assert read == needed > 0
