"""`phalanx checkpoint restore`, killed -9 again and again, goes on where it was."""

import filecmp
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phalanx.checkpoint.boxes import whole
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.check import examine
from phalanx.checkpoint.tool.reading import Reader, tensors_of
from tests import ROOT
from tests.checkpoint.stored import Arrays, make
from tests.checkpoint.tool.counted_restore import new_counter
from tests.killed_run import wait_until

pytestmark = pytest.mark.storage

STEP = "step_00000100"


def big_tensors() -> dict[str, np.ndarray]:
    """96 MB in a few large and many small ones."""
    noise = np.random.default_rng(0)
    found = {f"model.w{i}": noise.random((2000, 2001), np.float32) for i in range(5)}
    found["optim.m"] = noise.random((1_400_003,), np.float64)
    found |= {f"model.norm{i}": noise.random((501,), np.float32) for i in range(600)}
    found |= {f"optim.step{i}": np.float32(i)[()].reshape(()) for i in range(600)}
    return found


def start(counter: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.checkpoint.tool.counted_restore",
            str(counter),
            "3",
            *arguments,
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_often(
    folder: Path, *flags: str, kills: int, seed: int, mb_s: int, seconds: tuple[float, float]
) -> float:
    """Restore `folder`/src to `folder`/dst; returns bytes asked of the source / bytes there."""
    moments = random.Random(seed)
    counter = new_counter(folder / "counter")
    places = (str(folder / "src"), str(folder / "dst"))
    stood: list[int] = []
    for _ in range(kills):
        before = int(counter[0])
        process = start(folder / "counter", *places, *flags, "--limit", str(mb_s))
        if moments.random() < 0.75:  # the others are killed while they start
            wait_until(lambda before=before: counter[0] > before)
        time.sleep(moments.uniform(*seconds))  # the moment is what is random here
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "dst" / STEP / "manifest.json").exists()
        journal = folder / "dst" / STEP / "restore.journal"
        stood.append(journal.read_bytes().count(b"unit") if journal.exists() else 0)
    assert stood == sorted(stood)
    assert stood[-1] > stood[0], "the kills let something be done"
    last = start(folder / "counter", *places, *flags)
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, out + err
    assert "stood from earlier calls" in out
    manifest = read_manifest(open_storage(folder / "src"), STEP)
    return float(counter[0]) / sum(part.table.nbytes for part in manifest.parts)


def assert_same_values(root: Path, arrays: Arrays) -> None:
    storage = open_storage(root)
    manifest = read_manifest(storage, STEP)
    reader = Reader(storage, STEP, manifest)
    assert tensors_of(manifest).keys() == arrays.keys()
    for name, array in arrays.items():
        found = reader.read(name, whole(array.shape))
        assert np.array_equal(found, array.view(found.dtype)), name
    assert examine(storage, STEP).state == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--layout", "tp=3")], ids=["as it is", "recut"])
def test_20_kills_move_every_byte_about_once(tmp_path: Path, flags: tuple[str, ...]) -> None:
    arrays = big_tensors()
    make(tmp_path / "src", 100, arrays, ranks=4)
    ratio = kill_often(tmp_path, *flags, kills=20, seed=os.getpid(), mb_s=12, seconds=(0.0, 0.5))
    print(f"moved {ratio:.4f} times once")
    assert 1 <= ratio <= 1.1
    assert_same_values(tmp_path / "dst", arrays)
    if not flags:
        files = [path.name for path in (tmp_path / "src" / STEP).iterdir()]
        assert sorted(files) == sorted(path.name for path in (tmp_path / "dst" / STEP).iterdir())
        same, other, odd = filecmp.cmpfiles(
            tmp_path / "src" / STEP, tmp_path / "dst" / STEP, files, shallow=False
        )
        assert (len(same), other, odd) == (len(files), [], [])


def test_a_few_kills(tmp_path: Path) -> None:
    arrays = {"w": np.random.default_rng(1).random((3000, 1001), np.float32)}
    make(tmp_path / "src", 100, arrays, ranks=2)
    ratio = kill_often(tmp_path, "--layout", "tp=3", kills=3, seed=1, mb_s=4, seconds=(0.2, 0.5))
    assert 1 <= ratio <= 1.1
    assert_same_values(tmp_path / "dst", arrays)
