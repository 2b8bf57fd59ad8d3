"""torchrun and Ray run the same function as local ranks do: same results, same failures."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from phalanx.launch.ranks.start import RankFailed, launch
from phalanx.train.config import Device, LaunchConfig, Launcher
from phalanx.train.data.config import DataConfig
from tests import ROOT
from tests.launch.ranks.launched import wait_for
from tests.launch.ranks.test_local_ranks import CPU, fail, reduced, square

ray = pytest.importorskip("ray")
RAY = LaunchConfig(launcher=Launcher.ray, device=Device.cpu)

pytestmark = [pytest.mark.slow, pytest.mark.launchers]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray that the launches of this file share."""
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


def training(folder: Path, data: DataConfig, *overrides: str) -> list[str]:
    command = [sys.executable, "-m", "phalanx.train", f"run.dir={folder}", f"data.dir={data.dir}"]
    command += ["training.steps=4", "training.seq_len=32", "training.global_batch_size=8"]
    command += ["training.microbatch_size=2", "training.eval_batches=0", "model.dim=32"]
    command += ["model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2"]
    command += ["model.ffn_dim=32", "parallel.pp=1", "parallel.dp_shard=2", "launch.device=cpu"]
    command += ["checkpoint.every=0", "checkpoint.save_last=false", "monitor.tensorboard=false"]
    return [*command, "monitor.sample.tokens=0", *overrides]


def train(folder: Path, data: DataConfig, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = training(folder, data, *overrides)
    environ = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


def started_by_torchrun(folder: Path, data: DataConfig) -> subprocess.Popen[str]:
    """A long training with launch=torchrun that has done three steps."""
    command = training(folder, data, "launch=torchrun", "training.steps=100000")
    command.append("checkpoint.save_last=true")
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 3:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return run


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in logged(folder)]


def logged(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def test_three_launchers_train_bitwise_alike(tmp_path: Path, demo_data: DataConfig) -> None:
    found = {}
    for name in ("local", "torchrun", "ray"):
        done = train(tmp_path / name, demo_data, f"launch={name}")
        assert done.returncode == 0, done.stderr
        found[name] = losses(tmp_path / name)
        assert (tmp_path / name / "logs" / "rank1.log").exists()
    assert len(found["local"]) == 4
    assert found["torchrun"] == found["local"]
    assert found["ray"] == found["local"]


@pytest.mark.parametrize("name", ["local", "torchrun", "ray"])
def test_a_failed_training_ends_with_rank_and_host(
    name: str, tmp_path: Path, demo_data: DataConfig
) -> None:
    done = train(tmp_path, demo_data, f"launch={name}", "optim.lr.peak=1e30")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("phalanx: rank "), done.stderr
    assert lines[-2].startswith("FloatingPointError: "), done.stderr


def test_sigterm_under_torchrun_saves_and_the_next_run_goes_on(
    tmp_path: Path, demo_data: DataConfig
) -> None:
    run = started_by_torchrun(tmp_path, demo_data)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "Traceback" not in err
    done = len(logged(tmp_path))
    assert (tmp_path / "checkpoints" / f"step_{done:08d}" / "manifest.json").exists()
    again = train(tmp_path, demo_data, "launch=torchrun", f"training.steps={done + 2}")
    assert again.returncode == 0, again.stderr
    assert f"going on from the checkpoint of step {done}" in again.stdout + again.stderr
    assert [line["step"] for line in logged(tmp_path)] == list(range(done + 2))


def test_a_second_signal_under_torchrun_ends_every_process(
    tmp_path: Path, demo_data: DataConfig
) -> None:
    run = started_by_torchrun(tmp_path, demo_data)
    below = psutil.Process(run.pid).children(recursive=True)
    assert len(below) >= 3  # torchrun and two ranks
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert re.search(r"^phalanx: stopped by SIG(INT|TERM) before the ranks could end", err, re.M)
    assert psutil.wait_procs(below, timeout=10)[1] == []


def test_ray_returns_results_by_rank_and_writes_logs(cluster: None, tmp_path: Path) -> None:
    assert launch(square, 10, world_size=2, config=RAY, log_dir=tmp_path) == [10, 11]
    assert (tmp_path / "rank0.log").read_text() == "hello from 0\n"
    assert (tmp_path / "rank1.log").read_text() == "hello from 1\n"


def test_ray_computes_what_local_ranks_compute(cluster: None) -> None:
    assert launch(reduced, world_size=2, config=RAY) == launch(reduced, world_size=2, config=CPU)


@pytest.mark.parametrize(("how", "said"), [("raise", "the culprit"), ("kill", "was killed")])
def test_ray_names_the_rank_that_failed(cluster: None, how: str, said: str) -> None:
    with pytest.raises(RankFailed, match=said) as error:
        launch(fail, 1, how, world_size=2, config=RAY)
    assert error.value.rank == 1


def test_ray_passes_sigterm_on(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.launch.ranks import test_launchers_ranks as t
from tests.launch.ranks.launched import until_stopped
print(t.launch(until_stopped, Path({str(tmp_path)!r}), world_size=2, config=t.RAY))
"""
    script = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path, 2)
    script.send_signal(signal.SIGTERM)
    out, err = script.communicate(timeout=120)
    assert (out, script.returncode) == ("['SIGTERM', 'SIGTERM']\n", 0), err


def test_torchrun_workers_name_the_rank_that_failed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.launch.ranks import test_local_ranks as t
t.launch(t.fail, 1, "raise", world_size=2, config=t.CPU, log_dir=Path({str(tmp_path)!r}))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError: the culprit\nphalanx: rank 1 on " in done.stderr
    assert f"rank 0 on {socket.gethostname()} failed" not in done.stderr
