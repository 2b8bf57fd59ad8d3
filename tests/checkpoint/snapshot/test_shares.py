"""What snapshots need no holder for: who keeps what, copying it, and which one is found again."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phalanx.checkpoint.boxes import Box, TensorInfo
from phalanx.checkpoint.format.table import PartTable
from phalanx.checkpoint.holder.inventory import EpochInventory, Inventory, SlotInventory
from phalanx.checkpoint.holder.spec import HolderError, Spec
from phalanx.checkpoint.load.choice import Recoverable, new_homes, newest
from phalanx.checkpoint.snapshot.copier import BUCKET_BYTES, Copier
from phalanx.checkpoint.snapshot.pins import Pins
from phalanx.checkpoint.snapshot.shares import RankBoxes, assign

F32, U8 = "F32", "U8"


def held(**boxes: tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> RankBoxes:
    return {
        name: (TensorInfo(dtype=dtype, shape=shape), Box(offsets, sizes))
        for name, (dtype, shape, offsets, sizes) in boxes.items()
    }


def keys(table: PartTable) -> list[str]:
    return [entry.key for entry in table.entries]


# --- shares ---------------------------------------------------------------------------------------


def test_every_box_is_kept_once_and_replicas_are_spread() -> None:
    layers = {f"w{i}": (F32, (8, 4), (0, 0), (8, 4)) for i in range(6)}
    tables = assign([held(**layers), held(**layers), held(**layers)])
    assert sorted(key for table in tables for key in keys(table)) == sorted(layers)
    assert [table.nbytes for table in tables] == [256, 256, 256]


def test_what_one_rank_holds_alone_counts_before_replicas_are_spread() -> None:
    shared = {"a": (F32, (10,), (0,), (10,)), "b": (F32, (10,), (0,), (10,))}
    alone = {"own": (F32, (40,), (0,), (40,))}
    tables = assign([held(**shared, **alone), held(**shared)])
    assert keys(tables[0]) == ["own"]
    assert keys(tables[1]) == ["a", "b"]


def test_parts_of_a_tensor_stay_where_they_are_and_wide_types_come_first() -> None:
    tables = assign(
        [
            held(w=(F32, (5, 2), (0, 0), (3, 2)), rng=(U8, (7,), (0,), (7,))),
            held(w=(F32, (5, 2), (3, 0), (2, 2))),
        ]
    )
    assert keys(tables[0]) == ["w[0:3,0:2]", "rng"]
    assert keys(tables[1]) == ["w[3:5,0:2]"]
    assert [entry.begin for entry in tables[0].entries] == [0, 24]


def test_one_name_for_two_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w: rank 1 holds F32 \[4\], another rank F32 \[3\]"):
        assign([held(w=(F32, (3,), (0,), (3,))), held(w=(F32, (4,), (0,), (4,)))])


# --- copier ---------------------------------------------------------------------------------------


def test_bytes_arrive_in_order_and_progress_is_told_by_buckets() -> None:
    large = torch.arange(BUCKET_BYTES // 4 + 1000, dtype=torch.float32)
    sources = [large, torch.arange(6.0).reshape(2, 3).t(), torch.tensor(3.5), torch.ones(0)]
    sources += [torch.arange(5, dtype=torch.uint8)]
    expected = b"".join(source.contiguous().numpy().tobytes() for source in sources)
    memory = memoryview(bytearray(len(expected)))
    told: list[int] = []
    issued: list[object] = []
    Copier(torch.device("cpu")).copy(
        sources, memory, ready=None, on_issued=issued.append, on_bytes=told.append
    )
    assert bytes(memory) == expected
    assert told == [BUCKET_BYTES, len(expected)]
    assert issued == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_cuda_see_the_moment_of_the_call() -> None:
    device = torch.device("cuda")
    copier = Copier(device)
    tensor = torch.zeros(1 << 24, device=device)
    memory = memoryview(bytearray(tensor.numel() * 4))
    copier.pin(memory)
    for value in (1.0, 2.0):
        for _ in range(50):
            tensor.fill_(0)
        tensor.fill_(value)
        done: list[Any] = []
        copier.copy(
            [tensor], memory, ready=copier.mark(), on_issued=done.append, on_bytes=lambda n: None
        )
        torch.cuda.current_stream().wait_event(done[0])
        tensor.fill_(-1)
        assert bool((torch.frombuffer(memory, dtype=torch.float32) == value).all())
    copier.unpin()


# --- slots on their way to storage ----------------------------------------------------------------


def taken(epoch: str, slot: int) -> Any:
    return SimpleNamespace(epoch=SimpleNamespace(name=epoch), slot=slot)


def test_a_slot_is_free_that_holds_neither_the_newest_nor_what_is_pinned() -> None:
    pins = Pins()
    assert pins.free_slot(3, epoch="e", newest=None, wait=True) == 0
    pins.add(taken("e", 0))
    pins.add(taken("before", 1))
    assert (bool(pins), pins.epochs()) == (True, {"e", "before"})
    assert pins.free_slot(3, epoch="e", newest=1, wait=True) == 2
    assert pins.free_slot(2, epoch="e", newest=1, wait=False) == 2  # none
    with ThreadPoolExecutor(1) as pool:
        slot = pool.submit(pins.free_slot, 2, epoch="e", newest=1, wait=True)
        with pytest.raises(TimeoutError):
            slot.result(timeout=0.1)
        pins.remove(taken("before", 1))
        with pytest.raises(TimeoutError):
            slot.result(timeout=0.1)
        pins.remove(taken("e", 0))
        assert slot.result(timeout=60) == 0
    assert not pins


# --- recovery -------------------------------------------------------------------------------------

SPEC = Spec(
    epoch="e",
    token="t",
    parity=1,
    num_slots=2,
    groups=((0, 1, 2),),
    addresses=(("a", 1), ("b", 2), ("c", 3)),
    ranks=((0,), (1,), (2,)),
    parts=[[["w", "F32", [4], [0], [4]]], [], []],
)


def inventory(member: int, *slots: tuple[int, str], epoch: str = "e") -> Inventory:
    described = tuple(
        SlotInventory(slot=n, step=step, state=state, meta={"s": step}, digests=(1, 2, 3))
        for n, (step, state) in enumerate(slots)
    )
    held = EpochInventory(
        spec=replace(SPEC, epoch=epoch),
        frozen=False,
        bytes=16,
        taken=8,
        attached=(0,),
        members={member: described},
    )
    return Inventory(pid=1, address=("a", 1), epochs=(held,))


def found(*inventories: Inventory | None) -> Recoverable:
    answer, _ = newest(inventories)
    assert answer is not None
    return answer


def test_the_newest_committed_by_any_is_complete_in_all() -> None:
    ahead = inventory(0, (4, "committed"), (5, "committed"))
    behind = [inventory(n, (4, "committed"), (5, "complete")) for n in (1, 2)]
    answer = found(ahead, *behind)
    assert (answer.step, answer.lost, answer.meta) == (5, (), {"s": 5})
    assert answer.where == {0: (0, 1), 1: (1, 1), 2: (2, 1)}


def test_what_nobody_committed_does_not_count() -> None:
    assert found(*(inventory(n, (4, "committed"), (5, "complete")) for n in range(3))).step == 4
    assert newest([inventory(n, (5, "complete")) for n in range(3)]) == (None, [])


def test_a_lost_member_is_rebuilt_where_least_is() -> None:
    answer = found(None, *(inventory(n, (4, "committed")) for n in (0, 2)))
    assert answer.lost == (1,)
    assert answer.where == {0: (1, 0), 2: (2, 0)}
    assert new_homes(answer, 3) == {1: 0}


def test_more_than_parity_is_said_and_an_older_one_is_taken() -> None:
    answer, reasons = newest([None, None, inventory(0, (4, "committed"))])
    assert answer is None
    assert "step 4 cannot be had" in reasons[0]
    assert "nodes 1, 2" in reasons[0]
    older = inventory(0, (3, "committed"), (4, "committed"))
    others = [inventory(n, (3, "committed"), (4, "filling")) for n in (1, 2)]
    answer, reasons = newest([older, *others])
    assert answer is not None
    assert answer.step == 3
    assert len(reasons) == 1


def test_the_newest_epoch_that_has_it_and_not_a_rejected_one() -> None:
    before = [inventory(n, (7, "committed"), epoch="old") for n in range(3)]
    now = [inventory(n, (7, "committed"), (8, "committed"), epoch="new") for n in range(3)]
    both = [replace(a, epochs=a.epochs + b.epochs) for a, b in zip(before, now, strict=True)]
    assert found(*both).epoch == "new"
    again, _ = newest(both, without={("new", 8)})
    assert again is not None
    assert again.step == 7


def test_what_holders_say_is_understood_by_other_versions_of_the_same_language() -> None:
    """The words may not change without VERSION: a holder outlives the program that started it."""
    body = {
        "version": 2,
        "pid": 1,
        "address": ["a", 1],
        "epochs": [
            {
                "epoch": "e",
                "spec": {
                    "epoch": "e",
                    "token": "t",
                    "parity": 1,
                    "slots": 2,
                    "groups": [[0, 1, 2]],
                    "nodes": [
                        {"address": ["a", 1], "ranks": [0]},
                        {"address": ["b", 2], "ranks": [1]},
                        {"address": ["c", 3], "ranks": [2]},
                    ],
                    "parts": [[["w", "F32", [4], [0], [4]]], [], []],
                },
                "frozen": False,
                "bytes": 16,
                "taken": 8,
                "attached": [0],
                "members": {
                    "0": {
                        "slots": [
                            {
                                "slot": 0,
                                "step": 4,
                                "state": "committed",
                                "meta": {"s": 4},
                                "digest": None,
                                "digests": [1, 2, 3],
                                "data_ok": True,
                                "parity_ok": True,
                            }
                        ]
                    }
                },
            }
        ],
    }
    assert json.loads(json.dumps(inventory(0, (4, "committed")).to_json())) == body
    assert json.loads(json.dumps(Inventory.from_json(body).to_json())) == body
    with pytest.raises(HolderError, match=r"process 1\) was started by another version"):
        Inventory.from_json(body | {"version": 1})
