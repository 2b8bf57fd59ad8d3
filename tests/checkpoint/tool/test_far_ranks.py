"""`phalanx checkpoint` on what is not a folder here: S3 over a real connection, holders' memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx.checkpoint.format.job import NAME as JOB
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage
from phalanx.launch.cli import main
from phalanx.launch.verbs.checkpoint import verb
from tests.checkpoint.holder.nodes import Cluster
from tests.checkpoint.storage.s3_server import BUCKET, Link, Server, open_bucket, options
from tests.checkpoint.stored import make, tensors
from tests.checkpoint.tool.counted_restore import cut_by_columns

STEP = "step_00000100"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


def run(captured: Captured, *argv: str, port: int | None = None) -> tuple[int, Any, str]:
    """Exit code, JSON, standard error."""
    flags = [f"--option={k}={v}" for k, v in options(port).items()] if port is not None else []
    try:
        code = main(["checkpoint", *argv, *flags, "--json", "-"])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = captured.readouterr()
    return code, json.loads(out) if out else None, err


def far(folder: str) -> str:
    return f"s3://{BUCKET}/{folder}"


def storage_config(server: Server) -> StorageConfig:
    return StorageConfig(options=options(server.port))


def test_every_verb_takes_a_url(server: Server, tmp_path: Path, capsys: Captured) -> None:
    arrays, port = tensors(1, scale=20), server.port
    make(far("a"), 100, arrays, ranks=6, nodes=3, parity=1, config=storage_config(server))
    code, found, _ = run(capsys, "ls", far("a"), port=port)
    assert (code, found["checkpoints"][0]["state"]) == (0, "complete")
    assert run(capsys, "show", far(f"a/{STEP}"), port=port)[1]["step"] == 100
    storage = open_bucket(port, "a")
    storage.delete(f"{STEP}/part-00004.safetensors")
    storage.write(f"{STEP}/manifest.json", [b"{}"])
    code, found, _ = run(capsys, "verify", far("a"), port=port)
    assert (code, len(found["checkpoints"][0]["files"])) == (1, 2)
    code, found, _ = run(capsys, "verify", "--repair", far("a"), port=port)
    assert (code, found["checkpoints"][0]["state"]) == (0, "mended")
    code, found, _ = run(capsys, "restore", far("a"), str(tmp_path / "here"), port=port)
    assert (code, found["state"]) == (0, "complete")
    assert run(capsys, "show", "--diff", far("a"), str(tmp_path / "here"), port=port)[0] == 0
    code, found, _ = run(capsys, "restore", str(tmp_path / "here"), far("b"), port=port)
    assert (code, found["moved_bytes"] > 0) == (0, True)
    assert run(capsys, "verify", far("b"), port=port)[0] == 0
    assert not open_bucket(port, "b").exists(f"{STEP}/restore.journal")
    code, found, _ = run(capsys, "gc", far("b"), port=port)
    assert (code, [item["kept"] for item in found["folders"]]) == (0, [True])


def test_recut_into_a_bucket_by_way_of_a_folder_here(
    server: Server, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "_cut_for", verb._cut_for)  # put back after
    cut_by_columns(3)
    make(tmp_path / "src", 100, tensors(1, scale=20), ranks=6)
    argv = ("restore", str(tmp_path / "src"), far("recut"), "--layout", "tp=3")
    code, _, err = run(capsys, *argv, port=server.port)
    assert code == 2
    assert "takes whole files only; name a folder on this machine" in err
    code, found, _ = run(capsys, *argv, "--staging", str(tmp_path / "room"), port=server.port)
    assert (code, found["layout"]) == (0, {"tp": 3})
    assert list((tmp_path / "room").iterdir()) == []
    code, found, _ = run(
        capsys, "show", "--diff", str(tmp_path / "src"), far("recut"), port=server.port
    )
    assert (code, found["tensors"]) == (0, [])
    assert run(capsys, *argv, port=server.port)[1]["state"] == "complete"


def test_a_link_that_is_cut_and_comes_back(
    server: Server, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the retries nobody notices; beyond, the next call goes on."""
    monkeypatch.setattr(verb, "StorageConfig", _two_tries)
    make(far("cut"), 100, tensors(1, scale=800), ranks=4, config=storage_config(server))
    link = Link(server.port)
    link.cut_after(40_000)  # of requests: some dozens
    code, _, err = run(capsys, "restore", far("cut"), str(tmp_path / "dst"), port=link.port)
    assert link.is_cut.is_set()
    assert code == 1
    assert "run the same command again and it goes on" in err
    stood = (tmp_path / "dst" / STEP / "restore.journal").read_bytes().count(b"unit") - 1
    assert stood > 0
    link.mend()
    code, found, _ = run(capsys, "restore", far("cut"), str(tmp_path / "dst"), port=link.port)
    assert code == 0
    assert found["stood_bytes"] > 0
    assert found["stood_bytes"] + found["moved_bytes"] == found["bytes"]


def test_an_upload_that_is_cut_goes_on_with_the_next_file(
    server: Server, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "StorageConfig", _two_tries)
    make(tmp_path / "src", 100, tensors(1, scale=2000), ranks=12)
    link = Link(server.port)
    link.cut_after(12_000_000)  # of 20 MB
    argv = ("restore", str(tmp_path / "src"), far("up"))
    code, _, err = run(capsys, *argv, port=link.port)
    assert (code, link.is_cut.is_set()) == (1, True)
    assert "run the same command again and it goes on" in err
    assert run(capsys, "ls", far("up"), port=server.port)[1]["checkpoints"][0]["state"] == (
        "restoring"
    )
    link.mend()
    code, found, _ = run(capsys, *argv, port=link.port)
    assert code == 0
    assert found["stood_bytes"] > 5_000_000
    assert run(capsys, "verify", far("up"), port=server.port)[0] == 0


def _two_tries(**settings: Any) -> StorageConfig:
    return StorageConfig(retries=1, **settings)


def test_ls_asks_the_holders_of_the_run(tmp_path: Path, capsys: Captured) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.open([[1000], [1200, 300], [800]], parity=1)
        cluster.snapshot(0, 7)
        cluster.begin(1, 8, nodes=[0])
        found = [item for item in run(capsys, "ls")[1]["memory"] if item["job"] == cluster.job]
        committed = {item["node"]: item for item in found if item["state"] == "committed"}
        assert sorted(committed) == [0, 1, 2]
        assert {item["step"] for item in committed.values()} == {7}
        assert {item["protection"] for item in committed.values()} == {"2+1"}
        assert [(i["node"], i["step"]) for i in found if i["state"] == "filling"] == [(0, 8)]
        checkpoints = tmp_path / "run" / "checkpoints"
        open_storage(checkpoints).write(JOB, [b'{"job": "0123456789abcdef"}'])
        code, listed, _ = run(capsys, "ls", str(tmp_path / "run"))
        assert (code, listed["checkpoints"], listed["memory"]) == (0, [], [])
