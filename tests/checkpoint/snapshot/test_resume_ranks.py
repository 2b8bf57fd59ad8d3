"""Whatever of a run is killed, the next start goes on from memory as if nothing had happened: the
same losses, bit for bit, in the same layout."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phalanx.train.data.config import DataConfig
from tests.checkpoint.ranks import committed_steps
from tests.killed_run import Run, alive, end_all, going_on_from, wait_until

pytestmark = pytest.mark.holders

STEPS = 60
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path, demo_data: DataConfig) -> Iterator[MakeRun]:
    """`make_run(name, *overrides)`: a run in a folder of its own; nothing of it stays behind."""
    runs: list[Run] = []

    def make(name: str, *overrides: str) -> Run:
        runs.append(Run(tmp_path / name, demo_data, f"training.steps={STEPS}", *overrides))
        return runs[-1]

    yield make
    for run in runs:
        run.clean_up()


def kill_and_go_on(run: Run, kills: list[tuple[str, int]], *last: str) -> None:
    """Kill at these lines of the log, start again each time, and train to the end.

    Args:
        last: what is overridden in the last start.
    """
    logged: int | None = None
    for who, at in kills:
        run.start()
        run.wait_for_lines(at)
        check_resumed(run.kill(who), logged)
        logged = len(run.metrics())
        assert at <= logged < STEPS
    text = run.finish(*last)
    check_resumed(text, logged)
    assert not run.events("snapshot_failed", "snapshot_lost", "snapshot_rejected")
    assert not run.holders()


def check_resumed(text: str, logged: int | None) -> None:
    """A start after `logged` lines went on from memory; the last one had to be computed again, at
    most, and the one that was being copied."""
    if logged is None:
        assert "going on" not in text
        return
    source, step = going_on_from(text)
    assert source == "snapshot in memory"
    assert logged - 2 <= step <= logged


def check_kills(make_run: MakeRun, kills: list[tuple[str, int]], *layout: str) -> None:
    whole, broken = make_run("whole", *layout), make_run("broken", *layout)
    whole.finish_here("checkpoint.snapshot.every=0")
    kill_and_go_on(broken, kills)
    assert broken.metrics() == whole.metrics()
    assert [step for step, _, _ in whole.metrics()] == list(range(STEPS))


ONE_OF_EACH = [("one rank", 5), ("launcher", 14)]


def test_whoever_is_killed(make_run: MakeRun) -> None:
    check_kills(make_run, ONE_OF_EACH, "parallel.dp_shard=2")


BY_NODE = """
    parallel.dp_shard=4 zero.stage=3 zero.partition.params=node launch.nodes=2
    launch.ranks_per_node=2 launch.emulate_nodes=true checkpoint.snapshot.parity=xor
"""
IN_ANOTHER_ORDER = [("everything", 3), ("launcher", 11), ("all ranks", 24), ("one rank", 30)]
COARSE = "zero.stage=2 zero.quantize_gradients=int4 zero.error_feedback=true"


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "parallel.pp=2 parallel.dp_shard=2",
        "parallel.tp=2",
        "parallel.dp_replicate=2",
        "parallel.dp_shard=2 zero.stage=1",
        BY_NODE,
        "parallel.dp_shard=2 optim.name=adamw8bit",
        f"parallel.dp_shard=2 {COARSE}",
    ],
)
def test_whoever_is_killed_in_other_layouts(make_run: MakeRun, layout: str) -> None:
    check_kills(make_run, IN_ANOTHER_ORDER, *layout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("parallel.dp_shard=4", "parallel.dp_shard=1 parallel.tp=2"),
        ("parallel.dp_shard=2", "parallel.pp=2"),
        (BY_NODE, "parallel.tp=2 parallel.dp_shard=2"),
        (
            "parallel.tp=2 optim.name=adamw8bit",
            "parallel.dp_shard=2 zero.stage=1 optim.name=adamw8bit",
        ),
    ],
)
def test_goes_on_in_another_layout(make_run: MakeRun, before: str, after: str) -> None:
    whole = make_run("whole", *before.split())
    whole.finish_here("checkpoint.snapshot.every=0")
    moved = make_run("moved")
    moved.start(*before.split())
    moved.wait_for_lines(9)
    moved.kill("everything")
    logged = len(moved.metrics())
    text = moved.finish(*after.split())
    check_resumed(text, logged)
    _, done = going_on_from(text)
    assert moved.metrics()[:done] == whole.metrics()[:done]
    for ours, theirs in zip(moved.metrics(), whole.metrics(), strict=True):
        # fp32 sums in another order: rounding of 1e-7 that up to 60 optimizer steps amplify.
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], rel=1e-3)


def test_a_stop_that_saves_nothing_leaves_the_memory(make_run: MakeRun) -> None:
    run = make_run("run", "parallel.dp_shard=2")
    run.start()
    run.wait_for_lines(7)
    run.process.send_signal(signal.SIGTERM)
    text = run.wait()
    assert run.process.returncode == 0, text
    done = len(run.metrics())
    assert going_on_from(run.finish(f"training.steps={done + 2}")) == ("snapshot in memory", done)
    assert [step for step, _, _ in run.metrics()] == list(range(done + 2))
    assert not run.holders()


@pytest.mark.slow
def test_two_runs_at_once_do_not_touch_each_other(make_run: MakeRun) -> None:
    whole = make_run("whole", "parallel.dp_shard=2", "training.seed=3")
    whole.finish_here("checkpoint.snapshot.every=0")
    runs = [make_run(name, "parallel.dp_shard=2", "training.seed=3") for name in ("one", "other")]
    for run in runs:
        run.start()
    for run in runs:
        run.wait_for_lines(5)
    held = [set(run.holders().values()) for run in runs]
    assert len(held[0] | held[1]) == 2
    runs[0].kill("everything")
    logged = len(runs[0].metrics())
    assert runs[1].process.poll() is None
    text = runs[1].wait()
    assert runs[1].process.returncode == 0, text
    assert not runs[1].holders()
    assert set(runs[0].holders().values()) == held[0]
    check_resumed(runs[0].finish(), logged)
    assert runs[0].metrics() == runs[1].metrics() == whole.metrics()
    for run in runs:
        assert not run.events("snapshot_failed", "snapshot_lost", "snapshot_rejected")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["a rank", "everything"])
def test_under_torchrun(make_run: MakeRun, who: str) -> None:
    layout = ("parallel.dp_shard=2", "launch=torchrun")
    whole, broken = make_run("whole", *layout), make_run("broken", *layout)
    whole.finish("checkpoint.snapshot.every=0")
    broken.start()
    broken.wait_for_lines(9)
    if who == "everything":
        broken.kill(who)
    else:
        broken.ranks()[-1].kill()
        broken.wait()
        assert broken.process.returncode == 1
    logged = len(broken.metrics())
    check_resumed(broken.finish(), logged)
    assert broken.metrics() == whole.metrics()


@pytest.mark.slow
def test_nodes_that_are_lost_with_their_ranks(make_run: MakeRun) -> None:
    """One of four nodes comes back from parity, two send the run back to its checkpoint."""
    layout = ["parallel.dp_shard=4", "launch.nodes=4", "launch.ranks_per_node=1"]
    layout += ["launch.emulate_nodes=true", "checkpoint.snapshot.parity=xor", "checkpoint.every=8"]
    whole, broken = make_run("whole", *layout), make_run("broken", *layout)
    whole.finish_here("checkpoint.snapshot.every=0", "checkpoint.every=0")
    broken.start()
    broken.wait_for_lines(5)
    broken.kill("everything")
    end_all([broken.holders()[2]])
    logged = len(broken.metrics())
    broken.start()
    broken.wait_for_lines(21)
    check_resumed(broken.kill("everything"), logged)
    assert not broken.events("snapshot_lost")
    saved = broken.events("checkpoint_saved")[-1]["step"]
    end_all([broken.holders()[1], broken.holders()[3]])
    text = broken.finish()
    assert going_on_from(text) == ("checkpoint", saved)
    assert "2 are lost (nodes 1, 3), and its parity makes up for 1" in text
    assert broken.events("snapshot_lost")
    assert broken.metrics() == whole.metrics()


@pytest.mark.slow
def test_without_a_holder_and_without_a_checkpoint_it_begins_anew(make_run: MakeRun) -> None:
    run = make_run("run", "parallel.dp_shard=2")
    run.start()
    run.wait_for_lines(5)
    run.kill("everything")
    end_all(run.holders().values())
    check_resumed(run.finish("training.steps=4"), None)
    assert [step for step, _, _ in run.metrics()] == list(range(4))


@pytest.mark.slow
def test_holders_end_with_the_run_and_when_nobody_comes_back(make_run: MakeRun) -> None:
    run = make_run("run", "parallel.dp_shard=2", "checkpoint.snapshot.linger_s=6")
    run.start()
    run.wait_for_lines(3)
    [pid] = run.holders().values()
    run.kill("everything")
    assert alive(pid)
    wait_until(lambda: not alive(pid), within_s=20)
    assert "going on" not in run.finish("training.steps=4")
    assert not run.holders()
    assert [step for step, _, _ in run.metrics()] == list(range(4))


SLOW = "checkpoint.storage.limit_mb_s=0.02"
"""A checkpoint takes some ten seconds."""


@pytest.mark.slow
def test_an_end_that_storage_is_too_slow_for(make_run: MakeRun) -> None:
    """The ranks evaluate together while the last checkpoints wait for storage."""
    run = make_run("run", "parallel.dp_shard=2", SLOW, "training.steps=12")
    text = run.finish(
        "checkpoint.every=11",
        "checkpoint.save_last=true",
        "training.eval_batches=1",
        "launch.timeout_s=5",
    )
    assert "eval loss" in text
    saved = [event["step"] for event in run.events("checkpoint_saved")]
    assert saved == [11, 12]


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 1])
def test_a_stop_that_is_killed_before_storage_is_done(make_run: MakeRun, every: int) -> None:
    run = make_run("run", "parallel.dp_shard=2", SLOW, "checkpoint.save_last=true")
    run.start("checkpoint.every=2", f"checkpoint.snapshot.every={every}")
    run.wait_for_lines(7)
    run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: len(run.metrics()) in committed_steps(run.folder / "checkpoints"))
    run.kill("everything")
    done = len(run.metrics())
    text = run.finish(f"training.steps={done + 2}", "checkpoint.save_last=false")
    assert going_on_from(text) == ("snapshot in memory", done)


@pytest.mark.slow
def test_a_holder_that_dies_while_the_last_checkpoint_waits(make_run: MakeRun) -> None:
    run = make_run("run", "parallel.dp_shard=2", SLOW, "checkpoint.save_last=true")
    run.start("checkpoint.every=2")
    run.wait_for_lines(7)
    run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: len(run.metrics()) in committed_steps(run.folder / "checkpoints"))
    time.sleep(1)  # until the stop has asked for its checkpoint
    end_all(run.holders().values())
    text = run.wait()
    assert run.process.returncode == 0, text
    assert "saving once more" in text
    done = len(run.metrics())
    assert going_on_from(run.finish(f"training.steps={done + 2}")) == ("checkpoint", done)
