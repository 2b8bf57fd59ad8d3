"""`phalanx train`: the checks before a run, its folder, and its ranks."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from phalanx.checkpoint.storage.open import open_storage
from phalanx.launch import env
from phalanx.launch.bad_input import BadInput, user_input
from phalanx.launch.config.app import Job, run
from phalanx.launch.config.compose import ranks_per_node, world_size
from phalanx.launch.ranks.start import launch
from phalanx.launch.verbs.own_launch import on_one_device
from phalanx.parallel.zero.partition import data_ranks_per_node
from phalanx.train.config import Config, Launcher
from phalanx.train.plan.notes import notes
from phalanx.train.resume.check import check_resume

CONFIG_FILE = "config.yaml"
"""In the run's folder."""


def train(argv: Sequence[str]) -> None:
    """Train, or under torchrun take part in a training."""
    run("train", argv, _train)


def _train_rank(ranks: Any, config: Config) -> Any:
    from phalanx.train.trainer import train as train_on_rank

    return train_on_rank(ranks, config)


def _train(job: Job) -> None:
    config = job.config
    place = env.torchrun_place()
    folder = Path(config.run.dir)
    with user_input():
        check_resume(config)
    with ExitStack() as held:
        if place is None or place.rank == 0:
            _make_folders(config, folder)
            if place is not None or config.launch.launcher is not Launcher.torchrun:
                # torchrun's own start is on every machine; its rank 0 comes here again.
                held.enter_context(_alone(config, folder))
            _write_config(config, folder)
            for note in notes(_known_device(config), num_nodes=_num_nodes(config)):
                print(f"phalanx: note: {note}", file=sys.stderr)
        if config.launch.launcher is Launcher.torchrun and place is None:
            from phalanx.launch.ranks.torchrun import run_torchrun

            run_torchrun(job.arguments, config=config, world_size=world_size(config))
            return
        launch(
            _train_rank,
            config,
            world_size=world_size(config),
            config=config.launch,
            log_dir=folder / "logs",
        )


def _known_device(config: Config) -> Config:
    """launch.device=auto as it will be decided; where Ray decides, as it is."""
    if config.launch.launcher is Launcher.ray:
        return config
    with user_input():
        return on_one_device(config, world_size(config))


def _num_nodes(config: Config) -> int | None:
    """Nodes that a model's shards lie on; None where Ray is free to choose, or nodes differ."""
    per_node = ranks_per_node(config)
    if per_node is None:
        return None
    degrees = config.parallel.sized(world_size(config))
    shards = degrees["dp_shard"]
    here = data_ranks_per_node(shards, degrees["tp"], per_node)
    return None if here is None else shards // here


def _make_folders(config: Config, folder: Path) -> None:
    """Make the run's folder, and that of its checkpoints where it is one."""
    with _writing("run.dir", config.run.dir):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoints, given = config.checkpoint.dir, config.checkpoint
    place = open_storage(checkpoints, given.storage).local
    if place is not None and (given.save_last or given.every or given.snapshot.every):
        with _writing("checkpoint.dir", checkpoints):
            place.mkdir(parents=True, exist_ok=True)
            if not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _write_config(config: Config, folder: Path) -> None:
    """Write the resolved configuration to the run's folder."""
    with _writing("run.dir", config.run.dir):
        OmegaConf.save(OmegaConf.structured(config), folder / CONFIG_FILE)


@contextmanager
def _writing(key: str, value: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise BadInput(f"{key}={value}: cannot be written ({reason})") from error


@contextmanager
def _alone(config: Config, folder: Path) -> Iterator[None]:
    """Inside, no other start trains in this folder; the system forgets it with this process."""
    with _writing("run.dir", config.run.dir):
        opened = (folder / CONFIG_FILE).open("a")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"run.dir={config.run.dir}: another run is training in it; wait for it or end it, "
                "or choose another run.dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
