"""Ranks are started, fail, are stopped and never outlive who started them."""

import ctypes
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from phalanx.launch.ranks.local import launch_local
from phalanx.launch.ranks.start import RankFailed, Stopped, launch
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Device, LaunchConfig
from tests.launch.ranks.launched import start_script, wait_for

CPU = LaunchConfig(device=Device.cpu)


def square(ranks: Ranks, offset: int) -> int:
    print(f"hello from {ranks.rank}")
    return ranks.rank**2 + offset


def reduced(ranks: Ranks) -> bytes:
    with process_group(ranks):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(ranks.rank))
        dist.all_reduce(x)
        return x.numpy().tobytes()


def fail(ranks: Ranks, who: int, how: str) -> None:
    with process_group(ranks):
        dist.barrier()
        if ranks.rank == who:
            if how == "raise":
                raise ZeroDivisionError("the culprit")
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(600)
        dist.barrier()


def fail_alone(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ZeroDivisionError("the culprit")
    time.sleep(600)


def crash(ranks: Ranks) -> None:
    """While many threads are there, whose stacks a log ends with."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for _ in range(30):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    ctypes.string_at(0)


def surroundings(ranks: Ranks) -> dict[str, Any]:
    return {
        "cwd": os.getcwd(),
        "variable": os.environ.get("A_VARIABLE"),
        "ranks": ranks,
        "sigint": signal.getsignal(signal.SIGINT),
    }


def gone(pids: list[int], within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_results_come_back_by_rank_and_logs_are_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = launch(square, 10, world_size=4, config=CPU, log_dir=tmp_path)
    assert results == [10, 11, 14, 19]
    for rank in range(4):
        assert (tmp_path / f"rank{rank}.log").read_text() == f"hello from {rank}\n"
    assert capfd.readouterr().out == "hello from 0\n"


def test_ranks_get_the_callers_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_VARIABLE", "set after the server started")
    config = LaunchConfig(device=Device.cpu, threads_per_rank=3, timeout_s=17)
    found = launch(surroundings, world_size=2, config=config)
    for rank, seen in enumerate(found):
        assert seen["cwd"] == str(tmp_path)
        assert seen["variable"] == "set after the server started"
        assert seen["sigint"] == signal.SIG_IGN
        ranks = seen["ranks"]
        assert (ranks.rank, ranks.local_rank) == (rank, rank)
        assert (ranks.world_size, ranks.local_world_size) == (2, 2)
        assert (ranks.device_type, ranks.threads, ranks.timeout_s) == ("cpu", 3, 17)


def test_all_reduce_is_bitwise_equal_on_every_rank_and_in_every_launch() -> None:
    first = launch(reduced, world_size=4, config=CPU)
    again = launch(reduced, world_size=4, config=CPU)
    assert len(set(first + again)) == 1


@pytest.mark.parametrize("who", [0, 2])
def test_an_exception_names_the_rank_that_raised_it(who: int, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=f"rank {who} on ") as error:
        launch(fail, who, "raise", world_size=3, config=CPU, log_dir=tmp_path)
    assert error.value.rank == who
    assert "ZeroDivisionError: the culprit" in error.value.traceback_text
    assert "ZeroDivisionError: the culprit" in (tmp_path / f"rank{who}.log").read_text()


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_rank_is_named_with_its_signal(who: int) -> None:
    with pytest.raises(RankFailed, match="killed by SIGKILL") as error:
        launch(fail, who, "kill", world_size=3, config=CPU)
    assert error.value.rank == who


def test_a_crash_shows_the_thread_that_crashed(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="killed by SIGSEGV") as error:
        launch(crash, world_size=1, config=CPU, log_dir=tmp_path)
    assert "Fatal Python error: Segmentation fault" in str(error.value)
    assert "in crash" in str(error.value).partition("Current thread")[2]


def test_ranks_that_do_not_notice_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.launch.ranks.local.GRACE_S", 0.5)
    with pytest.raises(RankFailed, match="the culprit") as error:
        launch_local(fail_alone, world_size=3, config=CPU)
    assert error.value.rank == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_as_sigterm(tmp_path: Path, signum: signal.Signals) -> None:
    script = start_script(tmp_path, "until_stopped")
    wait_for(tmp_path, 2)
    script.send_signal(signum)
    out, err = script.communicate(timeout=120)
    assert (out, script.returncode) == ("['SIGTERM', 'SIGTERM']\n", 0), err


def test_a_signal_ends_ranks_that_have_no_handler(tmp_path: Path) -> None:
    script = start_script(tmp_path, "report_pid_and_sleep")
    pids = wait_for(tmp_path, 2)
    script.send_signal(signal.SIGTERM)
    _, err = script.communicate(timeout=120)
    assert f"{Stopped.__name__}: stopped by SIGTERM" in err
    assert gone(pids)


def test_rank_0_sees_the_terminal_and_its_log_keeps_a_lines_last_form(tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    script = start_script(tmp_path, "sees_terminal", stdout=terminal)
    _, err = script.communicate(timeout=120)
    shown = os.read(ours, 10000).decode()
    os.close(ours)
    os.close(terminal)
    assert "[True, False]" in shown, err
    assert "\r 50%\r100%" in shown
    assert (tmp_path / "rank0.log").read_text() == "100%\n"


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    script = start_script(tmp_path, "report_pid_and_sleep")
    pids = wait_for(tmp_path, 2)
    script.kill()
    script.communicate(timeout=120)
    assert gone(pids)


def test_no_rank_outlives_a_killed_server(tmp_path: Path) -> None:
    script = start_script(tmp_path, "report_pid_and_sleep")
    pids = wait_for(tmp_path, 2)
    server = psutil.Process(pids[0]).ppid()
    os.kill(server, signal.SIGKILL)
    _, err = script.communicate(timeout=120)
    assert "the process that forks the ranks died" in err
    assert gone(pids)
