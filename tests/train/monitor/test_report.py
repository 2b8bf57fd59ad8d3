"""What a run reports: event files read back, the terminal's text, and nothing on other ranks."""

import io
import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from phalanx.fault.events import read_lines
from phalanx.parallel.comm_meter import Traffic
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config, MonitorConfig, RunConfig, TrainingConfig
from phalanx.train.monitor.metrics import StepRecord
from phalanx.train.monitor.progress import Progress
from phalanx.train.monitor.report import RunReport

CONFIG = Config(
    run=RunConfig(name="test", dir="runs/test"),
    training=TrainingConfig(steps=6, seq_len=8),
    monitor=MonitorConfig(log_every=2),
)
FIRST = Ranks(rank=0, world_size=2, local_world_size=2)


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        loss=5.0 - step,
        grad_norm=0.5,
        lr=1e-3,
        tokens=1000,
        seconds=0.5,
        parts={"data": 0.1, "forward_backward": 0.3, "comm_wait": math.nan},
        traffic={
            "params": Traffic(inside=4096, between=512),
            "grads": Traffic(inside=100, between=0),
        },
    )


def report(folder: Path, *, first_step: int = 0, ranks: Ranks = FIRST) -> RunReport:
    return RunReport(
        CONFIG,
        folder,
        first_step=first_step,
        ranks=ranks,
        flops_per_token=1e6,
        stream=io.StringIO(),
    )


def read_back(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_every_curve_is_in_the_event_file(tmp_path: Path) -> None:
    with report(tmp_path) as run:
        assert run.peak is not None
        run.step(record(0))
        run.step(record(1))
        run.evaluation(2, 4.25)
        run.sample(2, "To be, or not")
        mfu = 1000 / 0.5 * 1e6 / run.peak.flops
    events = read_back(tmp_path)
    values = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    memory = values.pop("perf/memory_gb")
    assert all(0.01 < value < 1000 for _, value in memory)
    assert values.pop("perf/mfu") == [(s, pytest.approx(mfu)) for s in (0, 1)]
    assert values == {
        "train/loss": [(0, 5.0), (1, 4.0)],
        "train/grad_norm": [(0, 0.5), (1, 0.5)],
        "train/lr": [(0, pytest.approx(1e-3)), (1, pytest.approx(1e-3))],
        "perf/tokens_per_s": [(0, 2000.0), (1, 2000.0)],
        "time/step_s": [(0, 0.5), (1, 0.5)],
        "time/data_s": [(0, pytest.approx(0.1)), (1, pytest.approx(0.1))],
        "time/forward_backward_s": [(0, pytest.approx(0.3)), (1, pytest.approx(0.3))],
        "comm/params_inside_bytes": [(0, 4096.0), (1, 4096.0)],
        "comm/params_between_bytes": [(0, 512.0), (1, 512.0)],
        "comm/grads_inside_bytes": [(0, 100.0), (1, 100.0)],
        "comm/grads_between_bytes": [(0, 0.0), (1, 0.0)],
        "comm/inside_bytes": [(0, 4196.0), (1, 4196.0)],
        "comm/between_bytes": [(0, 512.0), (1, 512.0)],
        "eval/loss": [(1, 4.25)],
    }
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert "To be, or not" in texts["sample/text_summary"]
    assert "global_batch_size: 16" in texts["config/text_summary"]


def test_hyperparameters_are_the_configuration(tmp_path: Path) -> None:
    with report(tmp_path):
        pass
    events = read_back(tmp_path)
    contents = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(contents["_hparams_/session_start_info"])
    found = start.session_start_info.hparams
    assert found["training.seq_len"].number_value == 8
    assert found["optim.lr.schedule"].string_value == "cosine"
    assert found["optim.lr.peak"].number_value == 3e-4
    # In the run itself, not in one beside it.
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]


def test_no_step_appears_twice_after_a_resume(tmp_path: Path) -> None:
    with report(tmp_path) as run:
        for step in range(5):
            run.step(record(step))
        run.evaluation(3, 3.0)
        run.evaluation(5, 2.0)
    with report(tmp_path, first_step=3) as run:
        for step in range(3, 6):
            run.step(record(step))
        run.evaluation(5, 1.0)
    events = read_back(tmp_path)
    for tag in ("train/loss", "time/data_s", "perf/mfu"):
        assert [event.step for event in events.Scalars(tag)] == list(range(6)), tag
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(2, 3.0), (4, 1.0)]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(6))
    evaluations = list(read_lines(tmp_path / "eval.jsonl"))
    assert evaluations == [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 1.0}]


def test_a_run_from_scratch_hides_the_one_before(tmp_path: Path) -> None:
    for num_steps in (4, 2):
        with report(tmp_path) as run:
            for step in range(num_steps):
                run.step(record(step))
    assert [event.step for event in read_back(tmp_path).Scalars("train/loss")] == [0, 1]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with report(tmp_path, ranks=Ranks(rank=1, world_size=2)) as run:
        run.step(record(0))
        run.evaluation(0, 1.0)
        run.sample(0, "text")
        run.message("hello")
    assert list(tmp_path.iterdir()) == []


def test_metrics_lines_have_every_key(tmp_path: Path) -> None:
    with report(tmp_path) as run:
        run.step(record(0))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == [
        *("step", "loss", "grad_norm", "lr", "tokens", "seconds"),
        *("data_s", "forward_backward_s", "comm_wait_s"),
        *("comm_grads_inside_bytes", "comm_grads_between_bytes"),
        *("comm_params_inside_bytes", "comm_params_between_bytes"),
    ]


def progress(stream: io.StringIO, *, live: bool | None = None, first_step: int = 0) -> Progress:
    return Progress(num_steps=6, first_step=first_step, log_every=2, live=live, stream=stream)


def test_plain_lines_where_output_is_no_terminal() -> None:
    stream = io.StringIO()
    shown = progress(stream)
    for step in range(6):
        shown.step(record(step), tokens_per_s=2000.0, mfu=0.25)
    shown.evaluation(6, 2.5)
    shown.sample(6, "To be")
    shown.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [
        f"step {done}/6" for done in (1, 2, 4, 6)
    ]
    assert lines[2] == (
        "step 4/6  loss 2.0000  grad_norm 0.500  lr 1.00e-03  2,000 tokens/s  mfu 25.0%  00:01 left"
    )
    assert lines[4:] == ["step 6/6  eval loss 2.5000", "step 6/6  the model writes:", "To be", ""]


def test_the_bar_stays_whole_around_messages() -> None:
    stream = io.StringIO()
    shown = progress(stream, live=True, first_step=2)
    shown.step(record(2), tokens_per_s=2000.0, mfu=0.25)
    shown.evaluation(3, 2.5)
    for step in range(3, 6):
        shown.step(record(step), tokens_per_s=2000.0, mfu=0.25)
    shown.close()
    lines = stream.getvalue().split("\n")
    # The bar's line is wiped (carriage return, blanks, carriage return) before the message.
    assert lines[0].rpartition("\r")[2] == "step 3/6  eval loss 2.5000"
    last = lines[1].rpartition("\r")[2]
    assert last.startswith("6/6 |")
    assert "loss 0.0000" in last
    assert "2,000 tokens/s" in last
