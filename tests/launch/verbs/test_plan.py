"""`phalanx plan`: a row for each point, the configured one marked, without torch or ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.launch.cli import main
from phalanx.launch.config.compose import compose
from phalanx.launch.verbs.table import VERBS
from phalanx.parallel.zero.partition import NAMES
from phalanx.train.optim.config import OptimizerName
from phalanx.train.plan.zero import moment_bytes, setting_of, ways

Captured = pytest.CaptureFixture[str]
TWO_NODES = [
    "parallel.pp=1",
    "parallel.dp_shard=4",
    "launch.nodes=2",
    "launch.ranks_per_node=2",
    "launch.emulate_nodes=true",
]


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def rows(out: str) -> list[str]:
    lines = out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.split()[:2] == ["params", "grads"])
    return lines[begin + 1 : lines.index("", begin)]


def test_a_row_for_each_point_and_for_sending_less(capsys: Captured) -> None:
    assert main(["plan", *TWO_NODES]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == 10 + 3
    for row, name in zip(found, NAMES.values(), strict=False):
        assert name in row
    assert [row.split()[0] == "*" for row in found] == [False] * 9 + [True] + [False] * 3
    assert ["int8 weights, int4 grads" in row for row in found] == [False] * 12 + [True]


@pytest.mark.parametrize(
    ("overrides", "marked"),
    [
        (["zero.stage=1"], "ZeRO 1"),
        (["zero=hsdp"], "MiCS, HSDP"),
        (["zero=paro_nig"], "PaRO-NIG"),
        (["zero=zeropp"], "int8 weights, int4 grads"),
        (["zero.secondary_shard=2"], "secondary shard on 2 ranks"),
        (["zero.quantize_weights=fp8"], "fp8 weights"),
        (
            ["zero.quantize_gradients=int8", "zero.error_feedback=true"],
            "as configured",
        ),
    ],
)
def test_the_configured_way_is_marked(overrides: list[str], marked: str, capsys: Captured) -> None:
    assert main(["plan", *TWO_NODES, *overrides]) == 0
    [row] = [row for row in rows(capsys.readouterr().out) if row.startswith("*")]
    assert f"  {marked}  " in row


def test_memory_says_what_fits(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *TWO_NODES, "--memory", "130MB", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    fits = [row.split()[-1] for row in rows(out)]
    assert set(fits) == {"yes", "no"}
    assert "into 124 MiB" in out
    written = json.loads(file.read_text())
    assert written["memory"] == 130e6
    assert [way["fits"] for way in written["ways"]] == [text == "yes" for text in fits]
    for way in written["ways"]:
        total = way["held"]["on_device"] + written["activations"]
        assert way["fits"] == (total <= 130e6)
    zero3 = next(way for way in written["ways"] if way["name"] == "ZeRO 3")
    assert zero3["configured"]
    assert zero3["partition"] == {"params": "all", "grads": "all", "states": "all"}
    parameters = written["parameters"]
    assert zero3["held"]["masters"] == pytest.approx(parameters, rel=0.01)  # 4 bytes, 4 ranks
    assert set(zero3["sent"]) == {"params", "grads"}
    assert zero3["sent"]["params"]["between"] > 0


def test_examples_run(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in VERBS["plan"].examples:
        assert main(example.split()[1:]) == 0, example
        assert len(rows(capsys.readouterr().out)) >= 10


def test_a_large_cluster_is_planned_on_any_machine(capsys: Captured) -> None:
    assert main(["plan", "experiment=llama3_70b", "--memory", "80GiB"]) == 0
    out = capsys.readouterr().out
    assert "pipeline rank" in out
    assert len(rows(out)) == 13


def test_what_fits_holds_for_every_pipeline_rank() -> None:
    """Under 1F1B the first rank keeps most activations, though the last has a norm more."""
    overrides = ["parallel.pp=2", "parallel.dp_shard=2", "pipeline.layers_per_stage=[3,3]"]
    overrides.append("model.num_layers=6")
    setting = setting_of(compose(overrides), world_size=4, ranks_per_node=4)
    first, last = setting.parts
    assert first.activations > last.activations
    assert first.num_parameters < last.num_parameters
    assert setting.part is first
    for way in ways(setting):
        assert way.needed == way.held.on_device + first.activations


def test_points_that_nodes_do_not_allow_are_left_out() -> None:
    config = compose(["parallel.pp=1", "parallel.dp_shard=3", "training.global_batch_size=24"])
    found = ways(setting_of(config, world_size=3, ranks_per_node=2))
    assert [way.name for way in found if "node" in str(way.zero.extents)] == []
    assert [way.name for way in found if way.configured] == ["ZeRO 3"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--memory", "much"], "--memory=much: no size above 0"),
        (["--memory"], "argument --memory: expected one"),
        (["--json", "/dev/null/x.json"], "--json /dev/null/x.json: "),
        (["--depth", "3"], "unrecognized arguments: --depth"),
        (["parallel.pp=1", "parallel.dp_shard=5"], "training.global_batch_size=32: not divisible"),
        ([*TWO_NODES, "zero.secondary_shard=4"], "zero.secondary_shard=4: larger than a node"),
        (["launch=ray", "launch.nodes=3"], "launch.nodes=3: does not divide the 4 ranks"),
    ],
)
def test_bad_input_is_one_line_and_2(argv: list[str], said: str, capsys: Captured) -> None:
    assert main(["plan", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"phalanx: {said}")
    assert captured.err.count("\n") == 1


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from phalanx.launch.cli import main; code = main(['plan']); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_optimizers_bytes_a_parameter() -> None:
    shape, rows = (1024, 512), 100
    numel = rows * 512
    found = {
        name: moment_bytes(name, shape, rows, size=4) / numel
        for name in (OptimizerName.adamw, OptimizerName.adamw8bit, OptimizerName.adamw4bit)
    }
    assert found[OptimizerName.adamw] == 8
    assert 2 < found[OptimizerName.adamw8bit] < 2.2
    assert 1 < found[OptimizerName.adamw4bit] < 1.2
    assert moment_bytes(OptimizerName.adamw8bit, (1024,), 100, size=4) == 800
