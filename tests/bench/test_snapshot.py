"""The bench of snapshots: what it makes of its times, what it refuses, and that it would notice a
snapshot that is not of one moment."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from phalanx.bench.figures import Figure, Request, table
from phalanx.bench.snapshot import peer_dcp, peer_torch_checkpointing, snapshot
from phalanx.bench.snapshot.ranks import SnapshotTurns, Turn, loaded_wrong, take_turn
from phalanx.bench.snapshot.state import COMPUTING, KINDS, SLEEPING, State, make_work
from phalanx.launch.ranks.start import launch
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.bench_config import BenchConfig, SnapshotBenchConfig
from phalanx.train.config import Config, Device, LaunchConfig, Launcher

MEGA = 1 << 20


def by_name(figures: Any) -> dict[str, Figure]:
    listed = list(figures)
    named = {figure.name: figure for figure in listed}
    assert len(named) == len(listed), "two figures of one name"
    assert len(table(listed).splitlines()) == len(listed)
    return named


def turn(call: float, gate: float, step: float) -> Turn:
    return Turn(call=[call, 3 * call], gate=[gate, gate], step=[step, step])


def test_a_step_is_as_slow_as_its_slowest_rank() -> None:
    ranks = [
        Turn(call=[0.001, 0.004], gate=[0.010, 0.0], step=[1.0, 5.0]),
        Turn(call=[0.003, 0.001], gate=[0.002, 0.001], step=[2.0, 1.0]),
    ]
    call, gate = snapshot.blocked([ranks, ranks[:1]])
    assert call == pytest.approx([2.5, 2.5]), "of the rank that was blocked longest, not of each"
    assert gate == pytest.approx([5.0, 5.0])
    assert snapshot.step_times([ranks, ranks[:1]]) == [3.5, 3.0]


def test_figures_compare_with_every_peer() -> None:
    turns = {
        "without": [turn(0, 0, 1.0)] * 2,
        "phalanx": [turn(0.001, 0.0, 1.01)] * 2,
        "async_save": [turn(0.1, 0.05, 1.5), turn(0.1, 0.05, 2.02)],
    }
    found = SnapshotTurns(
        turns={SLEEPING: turns, COMPUTING: turns},
        wrong={"phalanx": 0, "async_save": 3},
        save={"phalanx": [1.0, 2.0], "dcp": [2.0, 2.0]},
        load={"phalanx": [1.0, 1.0], "dcp": [3.0, 4.0]},
        copy=[0.08, 0.08],
        num_bytes=10**9,
    )
    figures = by_name(snapshot.figures([found, found], step_s=1.0))
    stall = figures["snapshot.sleeping.stall.vs_async_save"]
    assert (stall.value, stall.peer_value) == pytest.approx((2.0, 250.0))
    assert stall.ratio == pytest.approx(125)
    overhead = figures["snapshot.computing.overhead.vs_async_save"]
    assert (overhead.value, overhead.peer_value) == pytest.approx((1.01, 1.76))
    assert (overhead.ratio_min, overhead.ratio_max) == pytest.approx((1.5 / 1.01, 2.0))
    assert figures["snapshot.sleeping.step"].value == 1.0
    assert figures["snapshot.sleeping.call.async_save"].value == pytest.approx(200)
    assert figures["snapshot.sleeping.gate.async_save"].value == pytest.approx(50)
    assert figures["snapshot.work"].value == 1.0
    assert figures["snapshot.plain_copy"].value == 80
    assert figures["snapshot.durable_save"].ratio == 1.5
    assert figures["snapshot.durable_load"].ratio == 3.5
    assert figures["snapshot.wrong.async_save"].value == 3
    assert figures["snapshot.torch_checkpointing.here"].value == 0, "it says that it was left out"
    here = replace(found, wrong=found.wrong | {"torch_checkpointing": 0})
    named = by_name(snapshot.figures([here], step_s=1.0))
    assert named["snapshot.torch_checkpointing.here"].value == 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"ranks": 0}, "ranks=0"), ({"state_mb": 0}, "state_mb=0"), ({"step_s": 0.0}, "step_s=0.0")],
)
def test_settings_are_checked(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"bench.snapshot.{word}: must be"):
        SnapshotBenchConfig(**settings)


def small() -> Config:
    return Config(
        bench=BenchConfig(rounds=1, steps=1, snapshot=SnapshotBenchConfig(state_mb=2, step_s=0.01)),
        launch=LaunchConfig(device=Device.cpu, threads_per_rank=1, timeout_s=60.0),
    )


def request(config: Config) -> Request:
    return Request(config=config, world_size=1, launch=launch, arguments=[], cpu="")


def test_what_cannot_be_measured_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="launch.launcher=ray.*launch=local"):
        snapshot.bench(request(Config(launch=LaunchConfig(launcher=Launcher.ray))))
    memory = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match="state_mb=1024: .* GiB of host memory, 1.0 GiB are free"):
        snapshot.bench(request(Config()))


def test_peers_save_to_memory_that_has_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(snapshot, "MEMORY", tmp_path)
    assert snapshot._memory_folder(small()) == tmp_path
    assert not capsys.readouterr().err
    monkeypatch.setattr(snapshot, "MEMORY", tmp_path / "nowhere")
    assert snapshot._memory_folder(small()) == Path(tempfile.gettempdir())
    assert "the peers save to" in capsys.readouterr().err


class Kept:
    """A saver in the process's own memory; with `late`, one that copies after the update."""

    def __init__(self, *, late: bool) -> None:
        self._late = late
        self._tensors: dict[str, Tensor] = {}

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        if not self._late:
            self.drain()

    def gate(self) -> None:
        pass

    def drain(self) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(self._tensors[name])

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


def two_savers(ranks: Ranks) -> tuple[int, int, Turn, int]:
    with process_group(ranks):
        parallel = ParallelConfig(dp_shard=ranks.world_size)
        mesh = build_mesh(parallel, world_size=ranks.world_size, device_type="cpu")
        state = State(mesh.axis("dp_shard"), num_bytes=2 * MEGA)
        work = make_work(ranks, step_s=0.01)
        assert work.keys() == set(KINDS)
        right = []
        for late in (False, True):
            side = Kept(late=late)
            taken = take_turn(side, state, work[COMPUTING], ranks, steps=3)
            right.append(loaded_wrong(side, state))
        return right[0], right[1], taken, state.num_bytes


def test_a_snapshot_of_another_moment_is_noticed(run_ranks: Callable[..., list[Any]]) -> None:
    for on_time, late, taken, num_bytes in run_ranks(two_savers, world_size=2):
        assert on_time == 0
        assert late == 102 * 2, "every tensor on both ranks"
        assert len(taken.call) == len(taken.gate) == len(taken.step) == 3, "the first is left out"
        assert all(whole > 0.001 for whole in taken.step)
        assert num_bytes == pytest.approx(2 * MEGA, rel=0.25)


def test_all_sides_run(capsys: pytest.CaptureFixture[str]) -> None:
    figures = by_name(snapshot.bench(request(small())))
    peers = list(peer_dcp.STAGINGS)
    if peer_torch_checkpointing.installed():
        peers.append(peer_torch_checkpointing.NAME)
    else:
        assert "torch_checkpointing is not installed" in capsys.readouterr().err
    for kind in KINDS:
        for peer in peers:
            for what in ("stall", "overhead"):
                figure = figures[f"snapshot.{kind}.{what}.vs_{peer}"]
                assert figure.peer == peer
                assert figure.value > 0
    assert all(figures[f"snapshot.durable_{way}"].value > 0 for way in ("save", "load"))
    wrong = {name: figure.value for name, figure in figures.items() if ".wrong." in name}
    assert wrong == {
        f"snapshot.wrong.{name}": 0
        for name in ("phalanx", *peers, "phalanx.durable", "dcp.durable")
    }
