"""A run that fails for what the user can mend ends in the message alone; a defect does not."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from phalanx.checkpoint.boxes import whole
from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.peers import Peers
from phalanx.launch.ranks.start import RankFailed, launch
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Device, LaunchConfig
from phalanx.train.data.config import DataConfig
from tests.killed_run import Run

pytestmark = pytest.mark.storage

CPU = LaunchConfig(device=Device.cpu, threads_per_rank=1, timeout_s=60)
SAVING = ("training.steps=2", "parallel.dp_shard=2", "checkpoint.save_last=true")


@pytest.fixture
def run(tmp_path: Path, demo_data: DataConfig) -> Iterator[Run]:
    """A run of two ranks that saves its last step; nothing of it stays behind."""
    found = Run(tmp_path / "run", demo_data, *SAVING)
    yield found
    found.clean_up()


def last_words(run: Run, *overrides: str) -> list[str]:
    """The last two lines of a start that fails; there is no traceback of ours before them."""
    run.start(*overrides)
    text = run.wait()
    assert run.process.returncode == 1, text
    assert "train/trainer.py" not in text
    return text.splitlines()[-2:]


@pytest.mark.parametrize(
    "launcher",
    [
        "local",
        pytest.param("torchrun", marks=pytest.mark.slow),
        pytest.param("ray", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_job_file(run: Run, launcher: str) -> None:
    job = run.folder / "checkpoints" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text("{")
    message, who = last_words(run, f"launch={launcher}", "launch.device=cpu")
    assert message.startswith("phalanx: error: look for the run's name: rank 0: ")
    assert f"{job}: is damaged; remove it (snapshots in memory" in message
    assert who.startswith("phalanx: rank ")
    log = Path(who.rpartition(" its traceback is in ")[2])
    assert log.parent.samefile(run.folder / "logs")
    assert "Traceback (most recent call last)" in log.read_text()
    job.unlink()


def test_nothing_is_left_that_can_be_loaded(run: Run) -> None:
    run.finish_here()
    [part, *_] = run.folder.glob("checkpoints/step_*/part-00000.safetensors")
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    message, _ = last_words(run)
    assert message.startswith(f"phalanx: error: checkpoint.dir={run.folder}/checkpoints: no checkp")
    assert "part-00000.safetensors is damaged: " in message


@pytest.mark.slow
def test_a_second_start_that_shares_the_checkpoints(
    run: Run, tmp_path: Path, demo_data: DataConfig
) -> None:
    run.start("training.steps=100000", "checkpoint.save_last=false")
    run.wait_for_lines(2)
    other = Run(tmp_path / "other", demo_data, *SAVING)
    message, _ = last_words(other, f"checkpoint.dir={run.folder}/checkpoints")
    assert message.startswith(
        "phalanx: error: start the snapshots' holders: rank 0: checkpoint.dir="
    )
    assert "another start of this run is alive on node 0 (ranks 0, 1); end it first" in message


# --- which errors ---------------------------------------------------------------------------------


def refuse(ranks: Ranks) -> None:
    if ranks.rank == 1:
        CheckpointConfig(every=-1)


def call_torch(ranks: Ranks) -> None:
    if ranks.rank == 1:
        torch.optim.AdamW([torch.zeros(1)], lr=-1.0)


def misuse_a_box(ranks: Ranks) -> None:
    if ranks.rank == 1:
        whole([1]).overlap(whole([1, 1]))


def agree(ranks: Ranks, action: Callable[[Ranks], None]) -> None:
    with process_group(ranks):
        Peers(torch.distributed.group.WORLD).agree("look", partial(action, ranks))


def agree_to_refuse(ranks: Ranks) -> None:
    agree(ranks, refuse)


def agree_on_a_defect(ranks: Ranks) -> None:
    agree(ranks, call_torch)


def failed(fn: Callable[[Ranks], None], log_dir: Path | None) -> str:
    with pytest.raises(RankFailed) as caught:
        launch(fn, world_size=2, config=CPU, log_dir=log_dir)
    return caught.value.last_words


REFUSED = "checkpoint.every=-1: must be 0 or more"


@pytest.mark.parametrize(
    ("fn", "message"), [(refuse, REFUSED), (agree_to_refuse, f"look: rank 1: {REFUSED}")]
)
def test_what_phalanx_raises_on_purpose_is_told_alone(
    fn: Callable[[Ranks], None], message: str, tmp_path: Path
) -> None:
    first, second = failed(fn, tmp_path).splitlines()
    assert first == f"phalanx: error: {message}"
    assert f"its traceback is in {tmp_path}/rank" in second
    assert "Traceback (most recent call last)" in (tmp_path / "rank1.log").read_text()
    assert "Traceback (most recent call last)" in failed(fn, None)  # it is nowhere else


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (call_torch, "ValueError: Invalid learning rate: -1.0"),
        (misuse_a_box, "ValueError: zip() argument 3 is longer"),
        (agree_on_a_defect, "CheckpointError: look: rank 1: ValueError: Invalid learning rate"),
    ],
)
def test_a_defect_keeps_its_traceback(
    fn: Callable[[Ranks], None], message: str, tmp_path: Path
) -> None:
    text = failed(fn, tmp_path)
    assert text.startswith("Traceback (most recent call last)")
    assert message in text.splitlines()[-2]
