"""Nodes that vanish with their holders, ranks and memory: what parity makes up for comes back bit
for bit and is protected anew; of what it does not, the run says so and goes back to storage."""

import itertools
import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from phalanx.launch.ranks.start import RankFailed, launch
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Device, LaunchConfig
from tests.checkpoint.ranks import Events, Run, holder_pids
from tests.checkpoint.snapshot.nodes import (
    check_protected,
    flip,
    goes_on,
    protected_manager,
    state,
    take,
)
from tests.killed_run import end_all, snapshot_bytes, wait_until

pytestmark = pytest.mark.holders


def go_on_and_die(
    ranks: Ranks, root: Path, parity: int, lost: tuple[int, ...], steps: int = 1
) -> None:
    """Go on, commit snapshots, note that, and lose nodes in the middle of the next one.

    Of several `steps`, the first is saved to storage too.
    """
    with process_group(ranks):
        events: Events = []
        manager = protected_manager(ranks, root, parity, events)
        step, from_memory = goes_on(manager, ranks)
        manager.prepare(state(ranks.rank, step))
        for done in range(step + 1, step + 1 + steps):
            take(manager, ranks, done, durable=steps > 1 and done == step + 1)
            manager.wait()
        nodes = ranks.world_size // ranks.ranks_per_node
        check_protected(root, nodes, step + steps)
        dist.barrier()
        if ranks.rank == 0:
            line = {"from": step, "memory": from_memory, "events": [name for name, _ in events]}
            with (root / "noted.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        holder = holder_pids(root)[ranks.rank // ranks.ranks_per_node]
        dist.barrier()
        take(manager, ranks, step + steps + 1)
        if ranks.rank // ranks.ranks_per_node in lost:
            with suppress(ProcessLookupError):  # another rank of the node was here before
                os.kill(holder, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        manager.wait()
        manager.close()


def noted(root: Path) -> list[dict[str, Any]]:
    """What each start noted."""
    return [json.loads(line) for line in (root / "noted.jsonl").read_text().splitlines()]


def lose(run: Run, root: Path, lost: tuple[int, ...], *, k: int, m: int, steps: int = 1) -> None:
    """A start at whose end these nodes are lost."""
    with pytest.raises(RankFailed, match="SIGKILL|peer|closed"):
        run(go_on_and_die, root, m, lost, steps, world_size=k + m, nodes=k + m)
    wait_until(lambda: holder_pids(root).keys() == set(range(k + m)).difference(lost))


@pytest.mark.parametrize(
    ("k", "m"),
    [
        (2, 1),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(6, 2, marks=pytest.mark.slow),
    ],
)
def test_every_set_of_nodes_that_parity_makes_up_for(
    run_ranks: Run, root: Path, k: int, m: int
) -> None:
    sets = [lost for size in range(1, m + 1) for lost in itertools.combinations(range(k + m), size)]
    for lost in sets:
        lose(run_ranks, root, lost, k=k, m=m)
    run_ranks(go_on_and_die, root, m, (), world_size=k + m, nodes=k + m)
    steps = noted(root)
    assert len(steps) == len(sets) + 1
    assert steps[0] == {"from": 0, "memory": False, "events": ["snapshot_opened"]}
    for before, after in itertools.pairwise(steps):
        # What was begun when the nodes were lost may have been committed, or not.
        assert after["from"] - before["from"] in (1, 2)
        assert after["memory"]
        assert after["events"] == ["snapshot_opened"]
    assert not holder_pids(root)


@pytest.mark.parametrize(
    ("k", "m", "lost"),
    [(2, 1, (0, 2)), pytest.param(4, 2, (1, 2, 5), marks=pytest.mark.slow)],
)
def test_more_lost_than_parity_makes_up_for(
    run_ranks: Run, root: Path, tmp_path: Path, k: int, m: int, lost: tuple[int, ...]
) -> None:
    lose(run_ranks, root, lost, k=k, m=m, steps=3)
    run_ranks(go_on_and_die, root, m, (), world_size=k + m, nodes=k + m)
    first, second = noted(root)
    assert first["from"] == 0
    assert (second["from"], second["memory"]) == (1, False)
    assert set(second["events"]) == {"snapshot_lost", "snapshot_opened"}
    said = (tmp_path / "logs" / "rank0.log").read_text()
    assert re.search(
        rf"the snapshot of step [34] cannot be had: of its group of {k + m} nodes, {m + 1} are "
        rf"lost \(nodes {', '.join(map(str, lost))}\), and its parity makes up for {m}",
        said,
    )


def test_begins_anew_where_nothing_is_left(run_ranks: Run, root: Path) -> None:
    lose(run_ranks, root, (0, 1, 2), k=2, m=1)
    assert not holder_pids(root)
    run_ranks(go_on_and_die, root, 1, (), world_size=3, nodes=3)
    assert [(line["from"], line["memory"]) for line in noted(root)] == [(0, False), (0, False)]


def measure(ranks: Ranks, root: Path, parity: int) -> tuple[int, list[dict[str, int]]]:
    """Bytes of one copy of the state, and what each holder has when two generations are there."""
    with process_group(ranks):
        events: Events = []
        manager = protected_manager(ranks, root, parity, events)
        for step in (1, 2, 3):
            tensors = {f"x{ranks.rank}": torch.full((500_000,), float(step))}
            manager.snapshot(step, lambda tensors=tensors: tensors, {})
            manager.wait()
        dist.barrier()
        held = [snapshot_bytes(pid) for _, pid in sorted(holder_pids(root).items())]
        dist.barrier()
        manager.close()
        nbytes = events[0][1]["bytes"] if events else 0
        return nbytes, held


@pytest.mark.parametrize(
    ("k", "m"),
    [
        (2, 1),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(6, 2, marks=pytest.mark.slow),
    ],
)
def test_host_memory(run_ranks: Run, root: Path, k: int, m: int) -> None:
    nbytes, held = run_ranks(measure, root, m, world_size=k + m, nodes=k + m)[0]
    assert nbytes == (k + m) * 2_000_000
    assert len(held) == k + m
    for slot in (0, 1):
        mine = [{n: b for n, b in one.items() if n.endswith(f"-slot{slot}")} for one in held]
        used = sum(sum(one.values()) for one in mine)
        assert used / nbytes == pytest.approx((k + m) / k, rel=0.05)
        each = [sum(one.values()) for one in mine]
        assert max(each) == min(each)  # every node carries an equal share
    assert all(name.endswith(("-slot0", "-slot1")) for one in held for name in one)


def take_two_and_die(ranks: Ranks, root: Path) -> None:
    with process_group(ranks):
        manager = protected_manager(ranks, root, 1, [])
        for step in (1, 2):
            take(manager, ranks, step)
            manager.wait()
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def go_on(ranks: Ranks, root: Path) -> tuple[int, bool, Events]:
    with process_group(ranks):
        events: Events = []
        manager = protected_manager(ranks, root, 1, events)
        step, from_memory = goes_on(manager, ranks)
        manager.prepare(state(ranks.rank, 0))
        manager.close()
        return step, from_memory, events


@pytest.mark.parametrize(
    ("flipped", "lost", "step"),
    [
        (["rank1-slot1"], (), 2),
        (["rank0-slot1", "rank2-slot1"], (), 1),
        pytest.param(["parity1-slot1"], (0,), 1, marks=pytest.mark.slow),
        pytest.param(["rank2-slot1"], (0,), 1, marks=pytest.mark.slow),
    ],
    ids=["one is rebuilt", "two", "parity that is needed", "one more than is lost"],
)
def test_memory_that_changed_is_never_loaded(
    run_ranks: Run, root: Path, flipped: list[str], lost: tuple[int, ...], step: int
) -> None:
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_ranks(take_two_and_die, root, world_size=3, nodes=3)
    pids = holder_pids(root)
    for name in flipped:
        flip(pids[int(re.findall(r"\d", name)[0])], name)
    end_all(pids[node] for node in lost)
    found = run_ranks(go_on, root, world_size=3, nodes=3)
    assert [(step, memory) for step, memory, _ in found] == [(step, True)] * 3
    names = [name for name, _ in found[0][2]]
    assert names == ["snapshot_rejected"] * (step == 1) + ["snapshot_opened"]


def get_stuck(ranks: Ranks, root: Path) -> None:
    """Rank 1 stands still for ever in the middle of step 3."""
    with process_group(ranks):
        manager = protected_manager(ranks, root, 1, [])
        for step in (1, 2):
            take(manager, ranks, step)
            manager.wait()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        take(manager, ranks, 3)
        dist.barrier()


@pytest.mark.slow
def test_a_rank_that_stands_still(run_ranks: Run, root: Path, tmp_path: Path) -> None:
    config = LaunchConfig(
        nodes=3,
        ranks_per_node=1,
        emulate_nodes=True,
        device=Device.cpu,
        threads_per_rank=1,
        timeout_s=3.0,
    )
    with pytest.raises(RankFailed, match="[Tt]imed out"):
        launch(get_stuck, root, world_size=3, config=config)
    found = run_ranks(go_on, root, world_size=3, nodes=3)
    assert [(step, memory) for step, memory, _ in found] == [(2, True)] * 3
