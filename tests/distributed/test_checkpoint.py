"""Checkpoints across layouts, under damage, under failing ranks and under kill -9."""

import errno
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from phalanx.checkpoint import folders, manifest, write
from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.folders import folder_name
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.checkpoint.peers import CheckpointError
from phalanx.launch.start import RankFailed
from phalanx.parallel.ranks import Ranks, process_group

Run = Callable[..., list[Any]]
Events = list[tuple[str, dict[str, Any]]]


def manager_of(
    ranks: Ranks, root: Path, *, events: Events | None = None, **config: Any
) -> CheckpointManager:
    found: Events = [] if events is None else events
    return CheckpointManager(
        CheckpointConfig(dir=str(root), **config),
        rank=ranks.rank,
        world_size=ranks.world_size,
        on_event=lambda name, facts: found.append((name, facts)),
    )


# --- layouts ----------------------------------------------------------------------------------


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


STYLES = {
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
            manager = manager_of(ranks, root / saved)
            rng = {name for name in manager.names(100) if name.startswith("rng.")}
            assert rng == {"rng.0", "rng.1", "rng.2", "rng.3"}
            manager.close()
            equal[saved] = loads_equal(ranks, root / saved, {})
        return equal


def test_any_layout_loads_in_any_other(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_alone, tmp_path, world_size=1)
    for equal in run_ranks(save_and_load_layouts, tmp_path, world_size=4):
        assert len(equal) == 1 + len(SAVED) * len(LAYOUTS)
        assert [pair for pair, same in equal.items() if not same] == []
    [equal] = run_ranks(load_alone, tmp_path, world_size=1)
    assert [saved for saved, same in equal.items() if not same] == []


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
            assert manager.names(step) == {"model.tied", "model.stage0", "model.stage1"}
        manager.close()
        return events


@pytest.mark.parametrize("async_save", [False, True])
def test_what_was_saved_is_the_moment_of_the_call(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    events, none = run_ranks(save_while_training, tmp_path, async_save, world_size=2)
    assert [(name, facts["step"]) for name, facts in events] == [
        ("checkpoint_saved", 1),
        ("checkpoint_saved", 2),
        ("checkpoint_saved", 3),
    ]
    assert all(facts["bytes"] > 8000 for _, facts in events)
    assert none == []


def rotate(ranks: Ranks, root: Path) -> list[list[str]]:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2, keep_every=30, async_save=False)
        seen = []
        for step in (10, 20, 30, 40, 50, 50):
            manager.save(step, {"x": torch.tensor(float(step))}, {})
            seen.append(sorted(path.name for path in root.iterdir()))
        manager.close()
        return seen


def test_old_checkpoints_are_deleted(run_ranks: Run, tmp_path: Path) -> None:
    [seen] = run_ranks(rotate, tmp_path / "c", world_size=1)
    steps = [[int(name.removeprefix("step_")) for name in names] for names in seen]
    assert steps == [[10], [10, 20], [20, 30], [30, 40], [30, 40, 50], [30, 40, 50]]


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
    assert events[1:] == [("checkpoint_cast", {"step": 1, "names": ["wide"]})]


# --- damage ------------------------------------------------------------------------------------


def save_three(ranks: Ranks, root: Path) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=0)
        for step in (1, 2, 3):
            manager.save(step, {f"x{ranks.rank}": torch.full((1000,), float(step))}, {})
        manager.close()


def resume_and_save(ranks: Ranks, root: Path, next_step: int) -> tuple[int | None, float, Events]:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, keep=1)
        tensors = {f"x{ranks.rank}": torch.zeros(1000)}
        step = manager.newest()
        if step is not None:
            manager.load(step, tensors)
        value = float(tensors[f"x{ranks.rank}"][0])
        manager.save(next_step, tensors, {})
        manager.close()
        assert manager_of(ranks, root).newest() == next_step
        return step, value, events


def truncate(folder: Path) -> None:
    os.truncate(folder / "__1_0.distcp", 100)


def flip(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def flip_metadata(folder: Path) -> None:
    path = folder / ".metadata"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 50)


def rename_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / folder_name(9))
    remove(folder)


def test_broken_checkpoints_are_refused_with_the_reason(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_three, tmp_path / "good", world_size=2)
    for damage, reasons in (
        (truncate, ["__1_0.distcp has 100 bytes instead of"]),
        (flip, ["__0_0.distcp is damaged: checksum"]),
        (remove, ["__1_0.distcp is missing"]),
        (flip_metadata, [".metadata is damaged"]),
        (cut_manifest, ["manifest.json cannot be read"]),
        (rename_folder, ["its manifest is of step 3", "is missing"]),
    ):
        root = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "good", root)
        damage(root / folder_name(3))
        results = run_ranks(resume_and_save, root, 4, world_size=2)
        assert [result[:2] for result in results] == [(2, 2.0), (2, 2.0)]
        events = results[0][2]
        rejected = [facts for name, facts in events if name == "checkpoint_rejected"]
        assert len(rejected) == len(reasons)
        for facts, reason in zip(rejected, reasons, strict=True):
            assert reason in facts["reason"]
        assert [path.name for path in root.iterdir()] == [folder_name(4)]


def test_the_resumed_one_outlives_a_broken_newer_one(run_ranks: Run, tmp_path: Path) -> None:
    """With keep=1, a broken step 3 must not take the place of the step 2 that is saved anew."""
    root = tmp_path / "c"
    run_ranks(save_three, root, world_size=2)
    flip(root / folder_name(3))
    results = run_ranks(resume_and_save, root, 3, world_size=2)
    assert results[0][0] == 2
    assert [path.name for path in root.iterdir()] == [folder_name(3)]


def test_all_broken_means_none(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(save_three, tmp_path, world_size=2)
    for step in (1, 2, 3):
        remove(tmp_path / folder_name(step))
    (step, _, events), _ = run_ranks(resume_and_save, tmp_path, 1, world_size=2)
    assert step is None
    assert [facts["step"] for name, facts in events if "rejected" in name] == [3, 2, 1]


# --- failing ranks -----------------------------------------------------------------------------


def save_and_wait(manager: CheckpointManager, *args: Any) -> None:
    manager.save(*args)
    manager.wait()


def fail_on_rank_1(ranks: Ranks, root: Path, async_save: bool) -> list[str]:
    """Rank 1's files may not grow over 1 MB for a while; then it is given something unsavable."""
    with process_group(ranks):
        manager = manager_of(ranks, root, async_save=async_save)
        tensors = {f"x{ranks.rank}": torch.full((1_000_000,), 1.0)}
        manager.save(1, tensors, {})
        manager.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        texts = []
        with pytest.raises(CheckpointError, match="step 2 could not be saved") as caught:
            save_and_wait(manager, 2, tensors, {})
        texts.append(str(caught.value))
        assert caught.value.__cause__ is not None
        assert caught.value.__cause__.__traceback__ is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert manager.newest() == 1
        with pytest.raises(CheckpointError, match="step 3 could not be saved") as caught:
            save_and_wait(manager, 3, tensors, {"x": object()} if ranks.rank == 1 else {})
        texts.append(str(caught.value))
        manager.save(4, tensors, {})
        manager.close()
        assert manager.newest() == 4
        return texts


@pytest.mark.parametrize("async_save", [False, True])
def test_a_rank_that_cannot_write_is_named_on_every_rank(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    for write_text, meta_text in run_ranks(fail_on_rank_1, tmp_path, async_save, world_size=2):
        assert "rank 1" in write_text
        assert os.strerror(errno.EFBIG) in write_text
        assert "rank 1: ValueError: meta: only what JSON holds" in meta_text


def save_where_nothing_can_be(ranks: Ranks, root: Path) -> str:
    with process_group(ranks):
        manager = manager_of(ranks, root)
        manager.save(1, {"x": torch.zeros(1)}, {})
        with pytest.raises(CheckpointError) as caught:
            manager.save(2, {"x": torch.zeros(1)}, {})
        manager.close()
        return str(caught.value)


def test_unwritable_folder(run_ranks: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for text in run_ranks(save_where_nothing_can_be, tmp_path / "file" / "c", world_size=2):
        assert "step 1 could not be saved" in text
        assert "rank 0: NotADirectoryError" in text
        assert str(tmp_path / "file") in text


def save_on_a_disk_of_its_own(ranks: Ranks, root: Path, async_save: bool) -> list[str]:
    """From step 2 on rank 1 writes to a disk of its own; of step 3, rank 0 sees the beginning."""
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events, async_save=async_save, keep=1)
        tensors = {f"x{ranks.rank}": torch.full((1000,), float(ranks.rank))}
        save_and_wait(manager, 1, tensors, {})
        write_here = write.write_chunks

        def elsewhere(folder: Path, *args: Any, **kwargs: Any) -> Any:
            own = root.with_name("other_node") / folder.name
            files = write_here(own, *args, **kwargs)
            if folder.name == folder_name(3):
                for name in files:
                    (folder / name).write_bytes(b"half")
            return files

        if ranks.rank == 1:
            write.write_chunks = elsewhere
        texts = []
        for step in (2, 3):
            with pytest.raises(CheckpointError, match=f"step {step} could not be saved") as caught:
                save_and_wait(manager, step, tensors, {})
            texts.append(str(caught.value))
            assert manager.newest() == 1
        write.write_chunks = write_here
        save_and_wait(manager, 4, tensors, {})
        assert manager.newest() == 4
        manager.close()
        saved = [facts["step"] for name, facts in events if name == "checkpoint_saved"]
        assert saved == ([1, 4] if ranks.rank == 0 else [])
        return texts


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_nodes_do_not_share_is_named_on_every_rank(
    run_ranks: Run, tmp_path: Path, async_save: bool
) -> None:
    root = tmp_path / "c"
    (missing, cut), other = run_ranks(save_on_a_disk_of_its_own, root, async_save, world_size=2)
    assert other == [missing, cut]
    assert f"checkpoint.dir={root}: not shared by all nodes: rank 1's file __1_0.dis" in missing
    assert "is not here" in missing
    assert f"checkpoint.dir={root}: rank 1's file __1_0.distcp has 4 bytes here" in cut


# --- kill -9 -----------------------------------------------------------------------------------


def die(*_args: Any, **_kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            die()
        return function(*args, **kwargs)

    return called


def arm(moment: str) -> None:
    """Let this process die by SIGKILL at a moment of the next save."""
    if moment == "before data":
        write.write_chunks = die
    elif moment == "between two tensors":
        torch.save = die_at_call(2, torch.save)
    elif moment == "after data":
        write.new_manifest = die
    elif moment == "before manifest":
        write.write_manifest = die
    elif moment == "before the manifest's rename":
        manifest.fsync_folder = die
    elif moment == "before deleting":
        write.prune = die
    elif moment == "while deleting":
        folders.shutil.rmtree = die
    else:
        raise ValueError(moment)


MOMENTS = {
    "before data": 2,
    "between two tensors": 2,
    "after data": 2,
    "before manifest": 2,
    "before the manifest's rename": 2,
    "before deleting": 3,
    "while deleting": 3,
}
"""Moment of a save of step 3, to the step that must be chosen afterwards."""


def save_and_die(ranks: Ranks, root: Path, moment: str, who: int, async_save: bool) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2, async_save=async_save)
        for step in (1, 2, 3):
            if step == 3 and ranks.rank == who:
                arm(moment)
            tensors = {
                f"{name}{ranks.rank}": torch.full((1000,), float(step)) for name in ("x", "y")
            }
            manager.save(step, tensors, {})
            manager.wait()
        manager.close()


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_in_the_middle_of_a_save(run_ranks: Run, tmp_path: Path, moment: str) -> None:
    expected = MOMENTS[moment]
    asynchronous = moment in ("before data", "before manifest")
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_and_die, tmp_path / "c", moment, 0, asynchronous, world_size=2)
    assert caught.value.rank == 0
    assert "SIGKILL" in str(caught.value)
    for step, value, events in run_ranks(resume_and_save, tmp_path / "c", 3, world_size=2):
        assert (step, value) == (expected, float(expected))
        assert all(name == "checkpoint_saved" for name, _ in events)
    assert [path.name for path in (tmp_path / "c").iterdir()] == [folder_name(3)]


def test_kill_of_another_rank_leaves_the_one_before(run_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(save_and_die, tmp_path / "c", "between two tensors", 1, True, world_size=2)
    assert caught.value.rank == 1
    for step, value, _ in run_ranks(resume_and_save, tmp_path / "c", 3, world_size=2):
        assert (step, value) == (2, 2.0)


def save_until_killed(ranks: Ranks, root: Path, delay_s: float) -> None:
    with process_group(ranks):
        manager = manager_of(ranks, root, keep=2)
        start = (manager.newest() or 0) + 1
        timer = threading.Timer(delay_s, die)
        timer.daemon = True
        timer.start()
        for step in range(start, start + 10_000):
            manager.save(step, {"x": torch.full((200_000,), float(step))}, {"step": step})


def check_newest(ranks: Ranks, root: Path) -> tuple[int | None, Events]:
    with process_group(ranks):
        events: Events = []
        manager = manager_of(ranks, root, events=events)
        step = manager.newest()
        if step is not None:
            tensors = {"x": torch.zeros(200_000)}
            assert manager.load(step, tensors) == {"step": step}
            assert bool((tensors["x"] == step).all())
        manager.close()
        return step, events


def test_kill_at_any_time(run_ranks: Run, tmp_path: Path) -> None:
    before = 0
    for delay_s in (0.1, 0.13, 0.17, 0.22):
        with pytest.raises(RankFailed, match="SIGKILL"):
            run_ranks(save_until_killed, tmp_path / "c", delay_s, world_size=1)
        [(step, events)] = run_ranks(check_newest, tmp_path / "c", world_size=1)
        assert events == []
        assert (step or 0) >= before
        before = step or 0
    assert before > 0


# --- accelerators ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_staging_from_cuda_sees_the_moment_of_the_call() -> None:
    from phalanx.checkpoint.staging import Stager

    stager = Stager()
    tensor = torch.zeros(1 << 24, device="cuda")
    for value in (1.0, 2.0):
        for _ in range(50):
            tensor.fill_(0)
        tensor.fill_(value)
        chunk = stager.stage({"x": tensor})["x"]
        tensor.fill_(-1)
        assert chunk.local.is_pinned()
        assert bool((chunk.local == value).all())
