"""metrics.jsonl keeps one exact line a step; the step clock splits a step's seconds."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from phalanx.fault.events import read_lines
from phalanx.parallel.comm_meter import Traffic
from phalanx.train.monitor.metrics import PARTS, MetricsLog, StepRecord, StepTimer


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        grad_norm=1 / 3,
        lr=1e-4,
        tokens=4096,
        seconds=0.5,
        parts={"data": 0.1, "comm_wait": math.nan},
        traffic={
            "params": Traffic(inside=4096, between=2**60 + 1),
            "tensor": Traffic(inside=math.nan, between=math.nan),
        },
    )


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_a_line_a_step_with_exact_floats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, first_step=0)
    losses = [0.1 + 0.2, 1e-17, 123456789.123456789]
    for step, loss in enumerate(losses):
        log.write_step(record(step, loss))
    log.close()
    lines = list(read_lines(path))
    assert [line["loss"] for line in lines] == losses
    assert lines[0] == {
        "step": 0,
        "loss": 0.1 + 0.2,
        "grad_norm": 1 / 3,
        "lr": 1e-4,
        "tokens": 4096,
        "seconds": 0.5,
        "data_s": 0.1,
        "comm_wait_s": "nan",
        "comm_params_inside_bytes": 4096,
        "comm_params_between_bytes": 2**60 + 1,
        "comm_tensor_inside_bytes": "nan",
        "comm_tensor_between_bytes": "nan",
    }


def test_resume_drops_what_will_be_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, first_step=0)
    for step in range(10):
        log.write_step(record(step, 0.1 * step))
    log.close()
    kept = path.read_text().splitlines()[:6]
    resumed = MetricsLog(path, first_step=6)
    resumed.write_step(record(6, 99.0))
    resumed.close()
    assert path.read_text().splitlines()[:6] == kept
    assert steps(path) == list(range(7))
    assert list(read_lines(path))[6]["loss"] == 99.0
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_half_and_repeated_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 1}\n{"step": 2, "lo')
    MetricsLog(path, first_step=5).close()
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_steps_must_rise(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", first_step=3)
    log.write_step(record(3))
    for step in (2, 3):
        with pytest.raises(ValueError, match=f"step {step}: the last line is of step 3"):
            log.write_step(record(step))
    log.close()
    again = MetricsLog(tmp_path / "metrics.jsonl", first_step=4)
    assert again.last_step == 3
    again.close()


def test_kill_loses_no_written_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = f"""
from pathlib import Path
from phalanx.train.monitor.metrics import MetricsLog
log = MetricsLog(Path({str(path)!r}), first_step=0)
for step in range(10**9):
    log.write(step, {{"loss": step / 3}})
    print(step, flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 50:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    written = steps(path)
    assert len(written) > 50
    resumed = MetricsLog(path, first_step=40)
    resumed.write_step(record(40))
    resumed.close()
    assert steps(path) == list(range(41))


class Waits:
    """Counts seconds up as it is told."""

    seconds = 0.0


def test_timer_splits_a_step() -> None:
    waits = Waits()
    timer = StepTimer(torch.device("cpu"), comm=waits)
    for _ in range(2):
        with timer("data"):
            time.sleep(0.02)
    with timer("forward_backward"):
        time.sleep(0.05)
        waits.seconds += 0.03
    waits.seconds += 0.01
    seconds, parts = timer.take()
    assert tuple(parts) == PARTS
    assert parts["data"] >= 0.04
    assert parts["comm_wait"] == pytest.approx(0.04)
    assert 0.02 <= parts["forward_backward"] <= seconds - parts["data"] - 0.03
    assert parts["optimizer"] == parts["checkpoint"] == 0.0
    assert sum(parts.values()) <= seconds + 0.01  # the wait outside any part was not slept


def test_timer_starts_anew() -> None:
    timer = StepTimer(torch.device("cpu"))
    with timer("data"):
        time.sleep(0.02)
    timer.restart()
    _, parts = timer.take()
    assert parts["data"] == 0.0
    assert math.isnan(parts["comm_wait"])


def test_timer_refuses_unknown_and_nested_parts() -> None:
    timer = StepTimer(torch.device("cpu"))
    with pytest.raises(ValueError, match="choose one of data, forward_backward"), timer("date"):
        pass
    with timer("data"), pytest.raises(RuntimeError, match="inside 'data'"), timer("optimizer"):
        pass
    with timer("optimizer"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timer_measures_the_device() -> None:
    device = torch.device("cuda", 0)
    timer = StepTimer(device)
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    timer.restart()
    with timer("forward_backward"):
        for _ in range(50):
            x = x @ x / 4096
    with timer("optimizer"):
        x.add_(1)
    seconds, parts = timer.take()
    assert parts["forward_backward"] > parts["optimizer"] > 0
    assert parts["forward_backward"] + parts["optimizer"] <= seconds * 1.05
