"""What is loaded is what was saved, and what does not fit is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from phalanx.checkpoint.config import SnapshotConfig
from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.snapshot import epoch
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import Events, Run, manager_of, step_names, stored_names

# --- saving ------------------------------------------------------------------------------------


def save_while_training(ranks: Ranks, root: Path, async_save: bool) -> Events:
    """Pipeline ranks: own names each, one name twice, changed in place right after each save."""
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, async_save=async_save, keep=0)
        tensors = {"model.tied": torch.zeros(5), f"model.stage{ranks.rank}": torch.zeros(1000)}
        for step in (1, 2, 3):
            for tensor in tensors.values():
                tensor.fill_(step)
            assert manager.save(step, tensors, {"tokens": step * 10}) > 0
            for tensor in tensors.values():
                tensor.fill_(-1)
        manager.close()
        manager = manager_of(ranks, root)
        assert manager.newest() == 3
        for step in (1, 2, 3):
            assert manager.load(step, tensors) == {"tokens": step * 10}
            assert all(bool((tensor == step).all()) for tensor in tensors.values())
        manager.close()
        return events


@pytest.mark.parametrize("async_save", [False, True])
def test_what_was_saved_is_the_moment_of_the_call(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    events, none = run_ranks(save_while_training, tmp_path, async_save, world_size=2)
    assert stored_names(tmp_path, "step_00000003") == {"model.tied", "model.stage0", "model.stage1"}
    saved = [event for event in events if event[0] != "snapshot_opened"]
    assert [(name, facts["step"]) for name, facts in saved] == [
        ("checkpoint_saved", 1),
        ("checkpoint_saved", 2),
        ("checkpoint_saved", 3),
    ]
    assert all(facts["bytes"] > 8000 for _, facts in saved)
    assert none == []


def snapshot_then_save(ranks: Ranks, root: Path) -> Events:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, snapshot=SnapshotConfig(every=1))
        tensors = {f"x{ranks.rank}": torch.ones(1000)}
        for step in (1, 2):
            manager.snapshot(step, lambda: tensors, {})
            manager.before_update()
        manager.snapshot(2, lambda: tensors, {}, durable=True)
        for step in (3, 4, 5):
            manager.snapshot(step, lambda: tensors, {}, durable=step == 4)
        manager.close()
        return events


def test_a_snapshot_in_memory_goes_to_storage_without_another(
    run_ranks: Run, tmp_path: Path
) -> None:
    events, _ = run_ranks(snapshot_then_save, tmp_path, world_size=2)
    told = [(name, facts.get("step")) for name, facts in events]
    assert told == [("snapshot_opened", None), ("checkpoint_saved", 2), ("checkpoint_saved", 4)]


def hold_on(ranks: Ranks, root: Path) -> str:
    """A second start of a run whose first one lives."""
    epoch.OTHERS_S = 0.3
    with process_group(ranks):
        first = manager_of(ranks, root)
        tensors = {"x": torch.ones(10)}
        first.save(1, tensors, {})
        first.wait()
        second = manager_of(ranks, root)
        with pytest.raises(CheckpointError, match="another start of this run is alive") as caught:
            second.prepare(tensors)
        first.close()
        second.prepare(tensors)
        second.close()
        return str(caught.value)


def test_two_starts_of_one_run_are_not_mixed(run_ranks: Run, tmp_path: Path) -> None:
    for text in run_ranks(hold_on, tmp_path, world_size=2):
        assert "on node 0 (ranks 0, 1); end it first" in text


def rotate(ranks: Ranks, root: Path) -> list[list[str]]:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2, keep_every=30, async_save=False)
        seen = []
        for step in (10, 20, 30, 40, 50, 50):
            manager.save(step, {"x": torch.tensor(float(step))}, {})
            seen.append(step_names(root))
        manager.close()
        return seen


def test_old_checkpoints_are_deleted(run_ranks: Run, tmp_path: Path) -> None:
    [seen] = run_ranks(rotate, tmp_path / "c", world_size=1)
    steps = [[name.removeprefix("step_000000") for name in names] for names in seen]
    assert [" ".join(names) for names in steps] == [
        "10",
        "10 20",
        "20 30",
        "30 40",
        "30 40 50",
        "30 40 50.r1",
    ]


# --- loading -----------------------------------------------------------------------------------


def load_what_does_not_fit(ranks: Ranks, root: Path) -> list[str]:
    with process_group(ranks):
        manager = manager_of(ranks, root, async_save=False)
        manager.save(1, {"a": torch.zeros(3), "rng.0": torch.zeros(2, dtype=torch.uint8)}, {})
        texts = []
        wrong_on_rank_1: list[dict[str, Tensor]] = [
            {"a": torch.zeros(3), "gone": torch.zeros(2, 5)},
            {"a": torch.zeros(4)},
            {"rng.0": torch.zeros(2)},
        ]
        for wrong in wrong_on_rank_1:
            with pytest.raises(ValueError, match="rank 1") as caught:
                manager.load(1, wrong if ranks.rank == 1 else {"a": torch.zeros(3)})
            texts.append(str(caught.value))
        with pytest.raises(ValueError, match="complete are: 1") as caught:
            manager.load(2, {})
        manager.close()
        return texts


def test_what_does_not_fit_is_named_on_every_rank(run_ranks: Run, tmp_path: Path) -> None:
    first, second = run_ranks(load_what_does_not_fit, tmp_path, world_size=2)
    assert first == second
    assert "lacks 1 of 2 tensors: gone [2, 5]" in first[0]
    assert "a is [3] there and [4] here" in first[1]
    assert "rng.0 is torch.uint8 there and torch.float32 here" in first[2]


def load_in_other_types(ranks: Ranks, root: Path) -> Events:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, async_save=False)
        values = torch.tensor([1.0, 1.0 + 2**-20])
        manager.save(1, {"wide": values, "narrow": values.bfloat16()}, {})
        loaded = {"wide": torch.zeros(2, dtype=torch.bfloat16), "narrow": torch.zeros(2)}
        manager.load(1, loaded)
        assert torch.equal(loaded["wide"], values.bfloat16())
        assert torch.equal(loaded["narrow"], values.bfloat16().float())
        manager.close()
        return events


def test_rounding_is_reported(run_ranks: Run, tmp_path: Path) -> None:
    [events] = run_ranks(load_in_other_types, tmp_path, world_size=1)
    assert events[-1:] == [("checkpoint_cast", {"step": 1, "names": ["wide"]})]
