"""A thousand single faults in real checkpoints: each is found, none is loaded, and what parity, the
backup or the other files allow is mended to the byte."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from phalanx.checkpoint.config import SnapshotConfig
from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.format.folders import folder_name
from phalanx.checkpoint.format.manifest import BACKUP, NAME, read_manifest
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.check import verify
from phalanx.checkpoint.tool.places import find
from phalanx.parallel.ranks import Ranks, process_group
from tests.checkpoint.ranks import LINGER_S, Run, holder_pids, manager_of

pytestmark = pytest.mark.storage

RANKS = 6
KINDS = {"none": RANKS, "xor": 2, "rs(2)": 1}
"""Parity, and ranks of a node: one node, groups of 2 + 1 nodes, and of 4 + 2."""
STEP, OTHER_STEP = 2, 1
FOLDER = folder_name(STEP)
RUNS = {"mine": 0, "foreign": 1}
"""Runs that save, and what their values are made of."""


def state(seed: int, step: int) -> dict[str, Tensor]:
    """Whole tensors of several types; `own` ones are of uneven size and belong to one rank each."""
    chance = torch.Generator().manual_seed(100 * seed + step)
    tensors = {f"own{rank}": torch.randn(50 + 37 * rank, generator=chance) for rank in range(RANKS)}
    tensors["wide"] = torch.randn(31, 7, dtype=torch.float64, generator=chance)
    tensors["half"] = torch.randn(9, 5, generator=chance).bfloat16()
    tensors["codes"] = torch.randint(0, 256, (401,), generator=chance).to(torch.uint8)
    tensors["step"] = torch.tensor(float(step))
    return tensors


def meta(seed: int, step: int) -> dict[str, object]:
    return {"seed": seed, "step": step}


def save_all(ranks: Ranks, root: Path) -> None:
    """Two steps of two runs, with every kind of parity."""
    with process_group(ranks):
        for kind, ranks_per_node in KINDS.items():
            for run, seed in RUNS.items():
                manager = manager_of(
                    replace(ranks, node_size=ranks_per_node),
                    root / kind / run,
                    snapshot=SnapshotConfig(every=1, parity=kind, linger_s=LINGER_S),
                )
                for step in (OTHER_STEP, STEP):
                    others = [f"own{rank}" for rank in range(RANKS) if rank != ranks.rank]
                    tensors = state(seed, step)
                    mine = {name: tensors[name] for name in tensors if name not in others}
                    manager.save(step, mine, meta(seed, step))
                manager.close()


# --- faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """A checkpoint as it was saved, a copy that is damaged, and what else there is."""

    good: Path
    copy: Path
    foreign: tuple[Path, ...]
    """Another step's folder, another run's, and another step's of that."""

    def restore(self) -> None:
        """Make the copy what was saved, file by file the same inode."""
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir(parents=True)
        for path in self.good.iterdir():
            os.link(path, self.copy / path.name)

    def write(self, name: str, content: bytes | bytearray) -> None:
        """Replace a file of the copy alone."""
        (self.copy / name).unlink()
        (self.copy / name).write_bytes(content)

    @property
    def same(self) -> bool:
        """Whether the copy is what was saved: these files, and no others."""
        return contents(self.good) == contents(self.copy)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(files: Files, name: str, chance: random.Random) -> list[str]:
    content = bytearray((files.copy / name).read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    files.write(name, content)
    return [name]


def truncate(files: Files, name: str, chance: random.Random) -> list[str]:
    content = (files.copy / name).read_bytes()
    files.write(name, content[: chance.randrange(len(content))])
    return [name]


def zero(files: Files, name: str, chance: random.Random) -> list[str]:
    content = bytearray((files.copy / name).read_bytes())
    begin = chance.randrange(len(content))
    end = min(len(content), begin + chance.choice([1, 64, 512, 4096]))
    content[begin:end] = bytes(end - begin)
    files.write(name, content)
    return [name]


def delete(files: Files, name: str, chance: random.Random) -> list[str]:
    (files.copy / name).unlink()
    return [name]


def swap(files: Files, name: str, chance: random.Random) -> list[str]:
    other = chance.choice(sorted(path.name for path in files.copy.iterdir() if path.name != name))
    mine, others = (files.good / name).read_bytes(), (files.good / other).read_bytes()
    files.write(name, others)
    files.write(other, mine)
    return [name, other]


def replace_by_foreign(files: Files, name: str, chance: random.Random) -> list[str]:
    files.write(name, (chance.choice(files.foreign) / name).read_bytes())
    return [name]


FAULTS: dict[str, Callable[[Files, str, random.Random], list[str]]] = {
    "flip": flip,
    "truncate": truncate,
    "zero": zero,
    "delete": delete,
    "swap": swap,
    "foreign": replace_by_foreign,
}
"""Each damages the file of that name, and returns the names of all files that it damaged."""


def damage(files: Files, what: str, chance: random.Random) -> list[str]:
    """One fault that changes something, in any file; the names of the damaged files."""
    while True:
        files.restore()
        name = chance.choice(sorted(path.name for path in files.good.iterdir()))
        damaged = FAULTS[what](files, name, chance)
        if not files.same:  # a manifest and its backup are the same, and so may zeros be
            return damaged


# --- what becomes of them -------------------------------------------------------------------------


@dataclass
class Tally:
    """What was counted, and what should not have been."""

    counts: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    """Damaged ones, by what they are."""
    wrong: list[str] = field(default_factory=list)


class Trial:
    """Faults of one kind of checkpoint, in this process."""

    def __init__(self, ranks: Ranks, root: Path, kind: str) -> None:
        runs = root / kind
        here = root / "damaged" / kind
        self.files = Files(
            good=runs / "mine" / FOLDER,
            copy=here / FOLDER,
            foreign=tuple(
                runs / run / folder_name(step)
                for run in RUNS
                for step in (OTHER_STEP, STEP)
                if (run, step) != ("mine", STEP)
            ),
        )
        self._kind = kind
        here.mkdir(parents=True)
        self._manager: CheckpointManager = manager_of(ranks, here)
        self._expected = state(RUNS["mine"], STEP)
        manifest = read_manifest(open_storage(runs / "mine"), FOLDER)
        self._parts = {part.file for part in manifest.parts}
        self._parity = {file.file for file in manifest.parity}

    def run(self, what: str, number: int, tally: Tally) -> None:
        """One fault, from injection to repair."""
        damaged = damage(self.files, what, random.Random(f"{self._kind} {what} {number}"))
        label = f"{self._kind}, {what} {number} of {', '.join(damaged)}"
        counts = tally.counts
        counts["injected"] += 1
        counts[f"injected, {what}"] += 1
        tally.files.update(self._sort_of(name) for name in damaged)
        counts["detected"] += self._detected(damaged, label, tally)
        self._load(label, tally, must=not {*damaged} & {*self._parts, NAME})
        mendable = self._mendable(what, damaged)
        counts["repairable"] += mendable
        report = verify(find(str(self.files.copy)), repair=True)
        if report.fine != self.files.same:
            tally.wrong.append(f"{label}: said fine={report.fine} after the repair")
        elif mendable and self.files.same and verify(find(str(self.files.copy))).fine:
            counts["repaired"] += 1
        elif mendable or report.fine:
            tally.wrong.append(f"{label}: {report.lines}, though repairable={mendable}")
        else:
            self._load(f"{label}, not repaired", tally, must=False)

    def check_untouched(self) -> None:
        """The good one is loaded and found fine, with repair or without, and left as it is."""
        self.files.restore()
        tally = Tally()
        self._load("untouched", tally, must=True)
        assert tally.wrong == []
        assert verify(find(str(self.files.copy)), repair=True).fine
        assert all(
            (self.files.copy / path.name).samefile(path) for path in self.files.good.iterdir()
        )

    def _detected(self, damaged: list[str], label: str, tally: Tally) -> bool:
        """Whether `verify` finds the checkpoint broken, and says which files are."""
        report = verify(find(str(self.files.copy)))
        text = "\n".join(report.lines)
        if report.fine or not all(name in text for name in damaged):
            tally.wrong.append(f"{label}: verify says {report.lines}")
            return False
        return True

    def _load(self, label: str, tally: Tally, *, must: bool) -> None:
        """Load as a run does; either it is refused, or everything is exactly what was saved."""
        tensors = {name: torch.zeros_like(tensor) for name, tensor in self._expected.items()}
        try:
            found = self._manager.load(STEP, tensors)
        except (CheckpointError, ValueError) as error:
            tally.counts["refused"] += 1
            if must:
                tally.wrong.append(f"{label}: does not hurt a load, but {error}")
            return
        same = all(torch.equal(tensors[name], self._expected[name]) for name in tensors)
        if same and found == meta(RUNS["mine"], STEP):
            tally.counts["loaded, exact"] += 1
        else:
            tally.counts["loaded, wrong"] += 1
            tally.wrong.append(f"{label}: was loaded")

    def _mendable(self, what: str, damaged: list[str]) -> bool:
        """Whether parity, the backup, or the exchanged file itself allows to mend it."""
        return bool(self._parity) or not {*damaged} & self._parts or what == "swap"

    def _sort_of(self, name: str) -> str:
        if name in (NAME, BACKUP):
            return name
        return "part" if name in self._parts else "parity"


def inject(ranks: Ranks, root: Path, count: int) -> Tally:
    """`count` faults, in turn of every sort in every kind of checkpoint."""
    tally = Tally()
    # That files are durable is another test's matter.
    os.fsync = lambda fd: None  # type: ignore[assignment]
    with process_group(ranks):
        trials = [Trial(ranks, root, kind) for kind in KINDS]
        before = [contents(trial.files.good) for trial in trials]
        for trial in trials:
            trial.check_untouched()
        kinds = list(FAULTS)
        for number in range(count):
            trial = trials[number % len(trials)]
            trial.run(kinds[number // len(trials) % len(kinds)], number, tally)
        assert [contents(trial.files.good) for trial in trials] == before
    return tally


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_single_faults(run_ranks: Run, saved: Path, tmp_path: Path, count: int) -> None:
    root = tmp_path / "c"
    shutil.copytree(saved, root)
    [tally] = run_ranks(inject, root, count, world_size=1)
    print("", dict(tally.counts), f"damaged files: {dict(tally.files)}", *tally.wrong, sep="\n")
    assert tally.wrong == []
    counts = tally.counts
    assert counts["detected"] == counts["injected"] == count
    assert counts["loaded, wrong"] == 0
    assert counts["repaired"] == counts["repairable"] > count / 2
    assert all(counts[f"injected, {what}"] >= count // len(FAULTS) - len(KINDS) for what in FAULTS)
    assert tally.files.keys() == {"part", "parity", NAME, BACKUP}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints of every kind are; not to be touched."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(autouse=True)
def _save(run_ranks: Run, saved: Path) -> None:
    """Once, with the launcher that the tests share."""
    if not any(saved.iterdir()):
        run_ranks(save_all, saved, world_size=RANKS)
        for kind in KINDS:
            for run in RUNS:
                assert holder_pids(saved / kind / run) == {}
