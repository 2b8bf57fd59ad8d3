"""`phalanx schedule`: its figures, its files, and what it refuses."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from phalanx.launch import env
from phalanx.launch.cli import main
from phalanx.launch.verbs.schedule.flags import OPTIONS, OUTPUTS, parse
from phalanx.parallel.pipeline.files import load_schedule
from phalanx.parallel.pipeline.graph import Op
from phalanx.parallel.pipeline.schedules.registry import GENERATORS, make_schedule
from phalanx.parallel.pipeline.validate import validate

Captured = pytest.CaptureFixture[str]

UNIT = ["--p", "4", "--m", "8", "--costs", "1,1,1,0"]
TINY = [
    "parallel.pp=2",
    "parallel.dp_shard=1",
    "training.global_batch_size=4",
    "training.microbatch_size=1",
]


def figures(argv: list[str], folder: Path) -> dict[str, Any]:
    """What --json writes."""
    assert main(["schedule", *argv, "--json", str(folder / "figures.json")]) == 0
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found


@pytest.mark.parametrize(
    ("schedule", "bubble"), [("1f1b", 0.2431), ("zb_h1", 0.1585), ("zb_h2", 0.1083)]
)
def test_bubbles_of_the_zero_bubble_paper(schedule: str, bubble: float, tmp_path: Path) -> None:
    """Qi et al., Zero Bubble Pipeline Parallelism, table of the 1.5B model at p = 8, m = 24."""
    argv = ["--p", "8", "--m", "24", "--costs", "18522,18086,9337,601", "--schedule", schedule]
    found = figures(argv, tmp_path)
    assert found["span_bubble"] == pytest.approx(bubble, abs=5e-4)
    work = 24 * (18522 + 18086 + 9337)
    assert found["longest_stage"] == pytest.approx(work / (1 - found["span_bubble"]))


@pytest.mark.parametrize("schedule", sorted(GENERATORS))
def test_figures_of_every_schedule(schedule: str, tmp_path: Path) -> None:
    found = figures([*UNIT, "--schedule", schedule], tmp_path)
    made = make_schedule(schedule, num_ranks=4, num_microbatches=8)
    assert (found["name"], found["p"], found["m"]) == (schedule, 4, 8)
    assert found["chunks"] == made.chunks
    assert found["placement"] == list(made.placement)
    assert [[Op.parse(text) for text in order] for order in found["order"]] == [
        list(order) for order in made.orders
    ]
    assert found["costs"]["f"] == [1 / made.chunks] * made.num_stages
    assert 0 <= found["steady_bubble"] <= found["makespan_bubble"] + 1e-9
    assert found["span_bubble"] <= found["makespan_bubble"] + 1e-9
    assert found["makespan"] == pytest.approx(24 / (1 - found["makespan_bubble"]))
    # With --mem 2,-1,-1 half of the memory goes with B, the other half with W.
    assert 0 < 4 * found["peak_memory"] <= found["peak_microbatches"]
    assert max(found["peak_memory_by_rank"]) == found["peak_memory"]
    assert max(found["peak_microbatches_by_rank"]) == found["peak_microbatches"]


def test_memory_is_in_multiples_of_p_times_mem_f(tmp_path: Path) -> None:
    for mem in ([], ["--mem", "2,-1,-1"], ["--mem", "34,0,-34"], ["--mem", "0.3,-0.1,-0.2"]):
        found = figures([*UNIT, *mem, "--schedule", "1f1b"], tmp_path)
        assert found["peak_memory"] == pytest.approx(1)
        assert found["peak_microbatches"] == 4
    assert found["peak_memory_bytes"] is None
    assert found["peak_memory_by_rank"] == pytest.approx([1, 0.75, 0.5, 0.25])


def test_auto_keeps_to_the_limit_and_is_no_worse_than_1f1b(tmp_path: Path) -> None:
    costs = ["--p", "4", "--m", "8", "--costs", "10,11,8,1"]
    plain = figures([*costs, "--schedule", "1f1b"], tmp_path)
    found = figures([*costs, "--schedule", "auto", "--memory", "1"], tmp_path)
    assert found["memory_limit"] == 1
    assert found["peak_memory"] <= 1 + 1e-9
    assert found["longest_stage"] < plain["longest_stage"]
    for chunks in (1, 2):
        argv = [*costs, "--schedule", "auto", "--memory", "1", "--chunks", str(chunks)]
        fixed = figures(argv, tmp_path)
        assert fixed["chunks"] == chunks
        assert fixed["longest_stage"] >= found["longest_stage"] * (1 - 1e-9)


def test_chunks_of_interleaved(tmp_path: Path) -> None:
    found = figures([*UNIT, "--schedule", "interleaved", "--chunks", "3"], tmp_path)
    assert found["placement"] == [0, 1, 2, 3] * 3


def test_every_file_is_written(tmp_path: Path, capsys: Captured) -> None:
    paths = {name: tmp_path / "new" / f"file.{name}" for name in OUTPUTS}
    argv = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    assert main(["schedule", *UNIT, "--schedule", "zb_v", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"wrote {path}" for path in paths.values()]
    assert ElementTree.parse(paths["svg"]).getroot().tag.endswith("svg")
    assert Image.open(io.BytesIO(paths["png"].read_bytes())).width >= 1000
    assert len(json.loads(paths["trace"].read_text())["traceEvents"]) > 8 * 8 * 3
    assert '"placement": [0, 1, 2, 3, 3, 2, 1, 0]' in paths["json"].read_text()
    loaded = load_schedule(paths["save"])
    validate(loaded)
    assert loaded.orders == make_schedule("zb_v", num_ranks=4, num_microbatches=8).orders


def test_a_saved_schedule_is_shown_again(tmp_path: Path) -> None:
    file = str(tmp_path / "mine.json")
    saved = figures([*UNIT, "--schedule", "v_half", "--save", file], tmp_path)
    again = figures([*UNIT, "--schedule", file], tmp_path)
    assert again == saved


def test_table_and_letters_are_printed(capsys: Captured) -> None:
    assert main(["schedule", *UNIT, "--schedule", "1f1b", "--memory", "1.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1f1b: 4 ranks, 1 stage each, 8 microbatches"
    assert [line.split() for line in lines[2:10]] == [
        ["bubble", "span", "27.27%"],
        ["makespan", "27.27%"],
        ["steady", "27.27%"],
        ["time", "longest", "stage", "33"],
        ["makespan", "33"],
        ["steady", "step", "33"],
        ["peak", "memory,", "p", "x", "mem_F", "1", "of", "1.5"],
        ["microbatches", "4"],
    ]
    assert [line.split() for line in lines[12:16]] == [
        ["0", "0", "24", "27.27%", "1", "4"],
        ["1", "1", "24", "27.27%", "0.75", "3"],
        ["2", "2", "24", "27.27%", "0.5", "2"],
        ["3", "3", "24", "27.27%", "0.25", "1"],
    ]
    assert any(line.startswith("rank 3 .........F0 BW0") for line in lines)


def test_the_configured_layout(tmp_path: Path, capsys: Captured) -> None:
    found = figures([*TINY, "pipeline.schedule=zb_h1"], tmp_path)
    assert "estimates from the model's shape" in capsys.readouterr().out
    assert (found["name"], found["p"], found["m"]) == ("zb_h1", 2, 4)
    assert found["peak_memory_bytes"] > 1000
    assert found["costs"]["w"][0] < found["costs"]["b"][0]
    other = figures([*TINY, "--schedule", "zb_v", "model.num_layers=4"], tmp_path)
    assert (other["name"], other["chunks"]) == ("zb_v", 2)


def test_auto_of_the_configured_layout_keeps_to_its_limit(tmp_path: Path) -> None:
    found = figures([*TINY, "--schedule", "auto", "pipeline.memory_limit=2GiB"], tmp_path)
    assert found["peak_memory_bytes"] <= 2 * 2**30
    multiple = found["peak_memory_bytes"] / found["peak_memory"]
    assert found["memory_limit"] == pytest.approx(2 * 2**30 / multiple)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--p", "0"], "schedule: --p needs --m and --costs too"),
        (["--memory", "1"], "schedule: --memory needs --p and --m and --costs too; of a conf"),
        ([*UNIT], "schedule: --schedule is missing; choose gpipe, 1f1b"),
        ([*UNIT, "--schedule", "zb9"], "--schedule zb9: unknown; choose one of gpipe"),
        ([*UNIT, "--p", "0", "--schedule", "1f1b"], "--p 0: must be a whole number, 2 or more"),
        ([*UNIT, "--p", "x", "--schedule", "1f1b"], "--p x: must be a whole number, 2 or more"),
        ([*UNIT, "--m", "-3", "--schedule", "1f1b"], "--m -3: must be a whole number, 1 or"),
        ([*UNIT, "--costs", "1,2,3"], "--costs 1,2,3: give 4 finite numbers, F,B,W,C"),
        ([*UNIT, "--costs", "1,2,3,nan"], "--costs 1,2,3,nan: give 4 finite numbers"),
        ([*UNIT, "--costs", "1,2,x,3"], "--costs 1,2,x,3: give 4 finite numbers"),
        ([*UNIT, "--costs", "-1,2,3,4"], "--costs -1,2,3,4: times must be 0 or more"),
        ([*UNIT, "--costs", "0,0,0,4"], "--costs 0,0,0,4: times must be 0 or more, and not all"),
        ([*UNIT, "--costs", "1e308,1,1,0"], "--costs 1e308,1,1,0: must be 0 or between"),
        ([*UNIT, "--costs", "1,1e-320,1,0"], "--costs 1,1e-320,1,0: must be 0 or between"),
        ([*UNIT, "--p", "100000", "--m", "100000"], "--p 100000 --m 100000: p x m must be at"),
        ([*UNIT, "--mem", "1e308,-1e308,0"], "--mem 1e308,-1e308,0: must be 0 or between"),
        ([*UNIT, "--schedule", "1f1b", "--chunks", ""], "--chunks : must be a whole number"),
        (
            [*UNIT, "--schedule", "1f1b", "--json", "a.json", "--svg", "a.json"],
            "--svg a.json: --json writes to it already; name another file",
        ),
        ([*UNIT, "--mem", "2,-1"], "--mem 2,-1: give 3 finite numbers, F,B,W"),
        ([*UNIT, "--mem", "-2,1,1"], "--mem -2,1,1: F must take memory"),
        ([*UNIT, "--mem", "2,-1,0"], "--mem 2,-1,0: must add up to 0"),
        ([*UNIT, "--memory", "0"], "--memory 0: must be above 0"),
        ([*UNIT, "--memory", "-1"], "--memory -1: must be above 0"),
        ([*UNIT, "--memory", "inf"], "--memory inf: give one finite number"),
        ([*UNIT, "--schedule", "1f1b", "--chunks", "0"], "--chunks 0: must be a whole number"),
        ([*UNIT, "--schedule", "1f1b", "--chunks", "2"], "--chunks 2: does not go with --sched"),
        ([*UNIT, "--schedule", "auto", "--chunks", "3"], "--chunks 3: does not go with --sched"),
        ([*UNIT, "--schedule", "1f1b", "--fast"], "schedule: --fast: unknown option"),
        ([*UNIT, "--schedule", "1f1b", "parallel.pp=2"], "schedule: parallel.pp=2: an override"),
        ([*UNIT, "--schedule"], "schedule: argument --schedule: expected one argument"),
        (
            [*UNIT, "--schedule", "1f1b", "--memory", "0.5"],
            "--memory 0.5: schedule 1f1b: rank 0 holds 0.75 after 0F2, over the limit of 0.5; it "
            "needs 1, or take --schedule auto",
        ),
        (
            [*UNIT, "--schedule", "auto", "--memory", "0.1"],
            "--memory 0.1: no schedule keeps to it; the least that would do is 0.25",
        ),
        ([*UNIT, "--schedule", "nowhere.json"], "--schedule nowhere.json: No such file"),
        ([*UNIT, "--schedule", "./"], "--schedule ./: Is a directory"),
        ([*UNIT, "--schedule", "1f1b", "--json", "/dev/null/x"], "--json /dev/null/x: cannot be"),
        (["parallel.pp=1"], "parallel.pp=1: no pipeline; set parallel.pp=2 or more"),
        (["--schedule", "zb9", *TINY], "pipeline.schedule=zb9"),
        (
            [*TINY, "--multirun", "pipeline=zb_v,1f1b", "--json", "a.json"],
            "--json a.json: each job of --multirun would overwrite it; run them one by one",
        ),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        ([*TINY, "--schedule", "v_min", "model.num_layers=3"], "parallel.pp=2 x 2 stages per"),
        ([*TINY, "--schedule", "a b.json"], "pipeline.schedule=a b.json: no such file"),
    ],
)
def test_bad_input_is_one_line_and_2(argv: list[str], said: str, capsys: Captured) -> None:
    assert main(["schedule", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"phalanx: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--p", "2", "--p 2: the schedule in"), ("--m", "9", "--m 9: the schedule in")],
)
def test_a_file_for_another_pipeline_is_refused(
    flag: str, value: str, said: str, tmp_path: Path, capsys: Captured
) -> None:
    file = str(tmp_path / "mine.json")
    assert main(["schedule", *UNIT, "--schedule", "zb_h1", "--save", file]) == 0
    capsys.readouterr()
    assert main(["schedule", *UNIT, flag, value, "--schedule", file]) == 2
    assert capsys.readouterr().err.startswith(f"phalanx: {said} {file} is for")


def test_a_file_that_is_no_schedule_is_refused(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"half": ')
    assert main(["schedule", *UNIT, "--schedule", str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert error.count("\n") == 1


def test_a_file_nested_too_deep_is_refused(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "deep.json"
    file.write_text("[" * 100_000)
    assert main(["schedule", *UNIT, "--schedule", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"phalanx: --schedule {file}: no JSON")


@pytest.mark.parametrize("costs", ["1e-9,1,1e9,0", "1,1,1,1e12", "1e30,1e-30,1,0", "1,0,0,1e30"])
def test_costs_of_very_different_size_are_shown(costs: str, capsys: Captured) -> None:
    argv = ["--p", "4", "--m", "8", "--costs", costs, "--schedule", "1f1b"]
    assert main(["schedule", *argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) <= 100


def test_files_are_written_though_nobody_reads_the_output(tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    code = "import sys; from phalanx.launch.cli import main; sys.exit(main())"
    argv = ["schedule", *UNIT, "--schedule", "zb_v", "--save", str(file)]
    command = shlex.join([sys.executable, "-c", code, *argv])
    subprocess.run(["bash", "-c", f"{command} | true"], check=True, capture_output=True)
    validate(load_schedule(file))


def test_a_picture_that_was_asked_for_twice_is_the_same(tmp_path: Path) -> None:
    texts = []
    for name in ("a.svg", "b.svg"):
        path = tmp_path / name
        assert main(["schedule", *UNIT, "--schedule", "zb_h2", "--svg", str(path)]) == 0
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("argv", [[*UNIT, "--schedule", "zb_v"], TINY])
def test_torch_is_not_imported(argv: list[str]) -> None:
    code = (
        "import sys; from phalanx.launch.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(99 if {'torch', 'PIL'} & set(sys.modules) else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "schedule", *argv], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_names_every_flag(capsys: Captured) -> None:
    assert main(["schedule", "--help"]) == 0
    out = capsys.readouterr().out
    flags = {flag.split()[0] for flag, _ in OPTIONS if flag}
    values = {"--p", "--m", "--costs", "--mem", "--memory", "--schedule", "--chunks"}
    assert flags == values | {f"--{name}" for name in OUTPUTS}
    assert all(f"  {flag} " in out for flag in flags)
    for flag in values:
        with pytest.raises(ValueError, match="expected one argument"):
            parse([flag])


@pytest.mark.parametrize(
    ("terminal", "environ", "wanted"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False)],
)
def test_colours_only_on_a_terminal(terminal: bool, environ: dict[str, str], wanted: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    assert env.wants_color(Stream(), environ) is wanted
