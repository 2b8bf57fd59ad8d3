"""Where a run's snapshots belong: to its folder, to its nodes, to its GPU."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phalanx.checkpoint.chunks import Chunk
from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.format.job import directory_of, job_name, read_job
from phalanx.checkpoint.holder import memory
from phalanx.checkpoint.holder.inventory import EpochInventory, Inventory, SlotInventory
from phalanx.checkpoint.holder.spec import Spec
from phalanx.checkpoint.load.memory import find
from phalanx.checkpoint.nodes.node import find_node
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.snapshot.copier import Copier
from phalanx.checkpoint.snapshot.shares import share
from phalanx.checkpoint.storage.open import open_storage


class Told(Peers):
    """Peers of which the other ranks' words are known beforehand."""

    def __init__(self, *answers: list[Any], rank: int = 0) -> None:
        super().__init__(None)
        self.rank, self.size = rank, len(answers[0])
        self._answers = list(answers)

    def all_gather(self, value: Any) -> list[Any]:
        return self._answers.pop(0)


# --- the run's name -------------------------------------------------------------------------------


def test_a_copy_of_a_runs_folder_does_not_find_the_originals_memory(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    job = job_name(open_storage(first))
    shutil.copytree(first, second)
    assert read_job(open_storage(second)) is None
    assert job_name(open_storage(second)) != job
    assert read_job(open_storage(second)) not in (None, job)
    assert read_job(open_storage(first)) == job_name(open_storage(first)) == job


def test_the_name_of_a_place_tells_no_password() -> None:
    storage: Any = SimpleNamespace(local=None, url="sftp://me:secret@host/run@1")
    assert directory_of(storage) == "sftp://host/run@1"


def test_a_name_without_a_place_counts_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({"job": "0123456789abcdef"}))
    assert read_job(storage) == "0123456789abcdef"
    (tmp_path / "job.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"job\.json: is damaged"):
        read_job(storage)


# --- nodes ----------------------------------------------------------------------------------------


def test_nodes_of_different_size_are_refused_on_every_rank() -> None:
    for mine in (2, 4):
        with pytest.raises(ValueError, match=r"nodes have 2 and 3 and 4 ranks: all of a job"):
            find_node(
                Told([2, 2, 3, 3, 3, 4, 4, 4, 4]), ranks_per_node=mine, racks=(), store_host=None
            )


def test_nodes_that_share_a_machine_are_one_failure_domain() -> None:
    a, b = ("a", "", 1), ("b", "", 2)
    said = [(a, "", "10.0.0.1"), (a, "", "10.0.0.1"), (b, "", "10.0.0.2")]
    node = find_node(Told([1, 1, 1], said), ranks_per_node=1, racks=(), store_host=None)
    assert node.racks == ("a", "a", "")
    alike = [(a, "", "10.0.0.1")] * 3
    node = find_node(Told([1, 1, 1], alike), ranks_per_node=1, racks=(), store_host=None)
    assert node.racks == ("", "", "")  # emulated nodes stand for machines


# --- what can be saved ----------------------------------------------------------------------------


def _chunk(local: torch.Tensor, size: int, begin: int) -> Chunk:
    return Chunk(local=local, size=torch.Size([size]), offsets=torch.Size([begin]))


def test_what_could_not_be_loaded_is_refused_before_it_is_saved() -> None:
    half = {"w": _chunk(torch.ones(3), 6, 0)}
    with pytest.raises(ValueError, match=r"cannot be saved: w: the boxes hold 3 of 6 elements"):
        share(half, peers=Peers(None))
    with pytest.raises(CheckpointError, match=r"look at what is to be saved: rank 0: .*complex64"):
        share({"w": _chunk(torch.ones(3, dtype=torch.complex64), 3, 0)}, peers=Peers(None))


# --- asking the holders ---------------------------------------------------------------------------


def test_tables_are_told_by_one_node_and_only_once_a_snapshot_is_chosen() -> None:
    parts = [[["w", "F32", [4], [0], [4]]]]
    spec = Spec(
        epoch="e",
        token="t",
        parity=0,
        num_slots=2,
        groups=((0,),),
        addresses=(None,),
        ranks=((0,),),
        parts=parts,
    )
    slot = SlotInventory(slot=1, step=7, state="committed", digests=(5,), meta={})
    epoch = EpochInventory(
        spec=spec, frozen=False, bytes=16, taken=16, attached=(), members={0: (slot,)}
    )
    inventory = Inventory(pid=1, address=None, epochs=(epoch,))
    told: list[Any] = []

    class Listening(Peers):
        def all_gather(self, value: Any) -> list[Any]:
            told.append(value)
            return [value]

    client = SimpleNamespace(inventory=lambda: inventory)
    node = SimpleNamespace(leader=True, number=0, count=1, leaders=[0])
    node_holder: Any = SimpleNamespace(node=node, connect=lambda: nullcontext(client))
    found, reasons = find(node_holder, Listening(None))
    assert found is not None
    assert (found.step, found.spec.to_json(), reasons) == (7, spec.to_json(), [])
    assert told[0][0].epochs[0].spec.to_json() == spec.to_json() | {"parts": []}


# --- the copier's thread --------------------------------------------------------------------------


def test_the_copiers_thread_uses_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    Copier(torch.device("cuda", 3)).enter()
    Copier(torch.device("cpu")).enter()
    assert chosen == [torch.device("cuda", 3)]


# --- host memory ----------------------------------------------------------------------------------


def test_a_containers_cached_files_do_not_count_as_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.available_bytes()
    (tmp_path / "memory.max").write_text("max\n")  # a container without a limit
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 700\nshmem 100\n")
    assert memory.available_bytes() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("1024\n")
    assert memory.available_bytes() == 24 + 700
