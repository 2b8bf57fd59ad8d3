"""The bench of erasure codes: every side rebuilds, and one that does not is not timed."""

import numpy as np
import pytest

from phalanx.bench.erasure import erasure, sides
from phalanx.bench.erasure.sides import Memory, Ours
from phalanx.bench.figures import Request
from phalanx.train.bench_config import BenchConfig
from phalanx.train.config import Config

SIDES = {"isal", "pyeclib", "memcpy"}


def request() -> Request:
    config = Config(bench=BenchConfig(rounds=2, steps=1))
    return Request(config=config, world_size=1, launch=lambda *_, **__: [], arguments=[], cpu="")


def test_every_code_beside_every_side() -> None:
    contenders, _ = sides.sides()
    figures = {figure.name: figure for figure in erasure.bench(request(), size=100_000)}
    expected = {
        f"erasure.{k}+{m}.{what}.{side}"
        for k, m in ((4, 1), (4, 2), (8, 2), (10, 4))
        for what in ("encode", "rebuild", "fold")
        for side in (SIDES & contenders.keys() if what != "fold" else {"memcpy"})
    }
    assert figures.keys() == expected
    for name, figure in figures.items():
        assert figure.unit == "GB/s"
        assert name.endswith(f".{figure.peer}")
        assert figure.value > 0
        assert figure.ratio is not None
    encode, rebuild = (figures[f"erasure.4+2.{what}.memcpy"] for what in ("encode", "rebuild"))
    assert encode.value != rebuild.value


def test_every_side_rebuilds() -> None:
    contenders, _ = sides.sides()
    for side in contenders:
        memory = Memory.make(4, 2, 4096 + 64)
        made = contenders[side](memory)
        if side != "pyeclib":  # it knows what was lost by itself
            assert not made.check()
        made.encode()
        made.rebuild()
        assert made.check(), side


def test_a_side_that_rebuilds_wrong_bytes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Ours):
        def rebuild(self) -> None:
            super().rebuild()
            self._memory.rebuilt[0][7] ^= np.uint8(1)

    monkeypatch.setattr(erasure, "sides", lambda: ({"ours": Wrong}, []))
    with pytest.raises(RuntimeError, match=r"ours rebuilds wrong bytes of 4\+1"):
        erasure.bench(request(), size=10_000)


def test_who_is_left_out_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sides, "find_spec", lambda _: None)
    figures = erasure.bench(request(), size=10_000)
    assert "pyeclib (not installed); left out" in capsys.readouterr().err
    assert "pyeclib" not in {figure.peer for figure in figures}
