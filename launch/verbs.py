"""What each verb does: one short function, given the rest of the command line.

Heavy modules are imported where they are needed, after the configuration has been checked.
"""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from phalanx.checkpoint.storage import open_storage
from phalanx.launch import env
from phalanx.launch.checkpoint_flags import EXAMPLES as CHECKPOINT_EXAMPLES
from phalanx.launch.checkpoint_flags import OPTIONS as CHECKPOINT_OPTIONS
from phalanx.launch.checkpoint_flags import USAGES as CHECKPOINT_USAGES
from phalanx.launch.compose import ranks_per_node, world_size
from phalanx.launch.failure import BadInput, user_input
from phalanx.launch.hydra_app import Job, json_option, run
from phalanx.launch.plan_flags import OPTIONS as PLAN_OPTIONS
from phalanx.launch.schedule_flags import OPTIONS
from phalanx.launch.start import launch
from phalanx.parallel.zero.partition import data_ranks_per_node
from phalanx.train.config import Config, Launcher
from phalanx.train.notes import notes
from phalanx.train.resume import check_resume

CONFIG_FILE = "config.yaml"
"""In the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A word after `phalanx`."""

    run: Callable[[list[str]], None]
    """Takes the rest of the command line; raises BadInput for bad input, SystemExit(1) for a
    failure that it has shown."""
    usage: str
    summary: str
    examples: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    """Flag and meaning, of the verb's own."""
    takes_overrides: bool = True


def train(argv: Sequence[str]) -> None:
    """Train, or under torchrun take part in a training."""
    run("train", argv, _train)


def verify(argv: Sequence[str]) -> None:
    """Compare a layout with one process."""
    json_file, rest = json_option(argv)
    run("verify", rest, partial(_verify, json_file=json_file))


def bench(argv: Sequence[str]) -> None:
    """Measure beside a peer."""
    json_file, rest = json_option(argv)
    name = rest[0] if rest else ""
    if name not in BENCHES:
        raise BadInput(f"bench {name}: unknown; choose one of {', '.join(BENCHES)}")
    job = partial(_bench, name=name, json_file=json_file)
    run("bench", rest[1:], job, starts_ranks=name not in WITHOUT_DATA)


def data(argv: Sequence[str]) -> None:
    """Prepare token files, or show what is in them."""
    action = argv[0] if argv else ""
    if action not in ("prepare", "show"):
        raise BadInput(f"data {action}: unknown; choose prepare or show")
    run("data", argv[1:], partial(_data, action=action), starts_ranks=False)


def checkpoint(argv: Sequence[str]) -> None:
    """Look after checkpoints."""
    from phalanx.launch.checkpoint_verb import checkpoint as do

    do(argv)


def schedule(argv: Sequence[str]) -> None:
    """Build, check, replay and draw a pipeline schedule."""
    from phalanx.launch.schedule_verb import schedule as do

    do(argv)


def plan(argv: Sequence[str]) -> None:
    """Say what each way to divide the model costs."""
    from phalanx.launch.plan_verb import plan as do

    do(argv)


def doctor(argv: Sequence[str]) -> None:
    """Look at the machine."""
    from phalanx.launch.doctor import doctor as do

    do(argv)


BENCHES = {
    "step": "phalanx.bench.step",
    "startup": "phalanx.bench.startup",
    "pipeline": "phalanx.bench.pipeline",
    "wgrad": "phalanx.bench.wgrad",
    "quantize": "phalanx.bench.quantize",
    "zero": "phalanx.bench.zero",
    "slow_network": "phalanx.bench.slow_network",
    "optim": "phalanx.bench.optim",
    "erasure": "phalanx.bench.erasure",
    "snapshot": "phalanx.bench.snapshot",
}
"""Benches by name: a module with `bench(request) -> list of figures`."""
WITHOUT_DATA = (
    "pipeline",
    "wgrad",
    "quantize",
    "optim",
    "zero",
    "slow_network",
    "erasure",
    "snapshot",
)
"""Benches that need no layout that divides, and no prepared data or check it themselves."""

VERBS: dict[str, Verb] = {
    "train": Verb(
        run=train,
        usage="phalanx train [OVERRIDES] [HYDRA OPTIONS]",
        summary="train; a run started again in the same run.dir resumes",
        examples=(
            "phalanx train experiment=tiny",
            "phalanx train experiment=llama3_8b parallel.dp_shard=8 run.dir=runs/first",
            "phalanx train parallel.tp=2 parallel.pp=2 pipeline.schedule=gpipe",
            "phalanx train --multirun optim.lr.peak=1e-3,3e-3",
            "phalanx train --cfg job",
            "torchrun --nproc-per-node 4 -m phalanx.train experiment=tiny",
        ),
    ),
    "verify": Verb(
        run=verify,
        usage="phalanx verify [--json FILE] [OVERRIDES]",
        summary="prove that a layout computes what one process computes",
        examples=(
            "phalanx verify parallel.dp_shard=2 parallel.tp=2",
            "phalanx verify parallel.pp=2 'verify.resume_in={tp: 2}' --json verify.json",
        ),
    ),
    "data": Verb(
        run=data,
        usage="phalanx data prepare|show [OVERRIDES]",
        summary="turn text into token files, or show them",
        examples=(
            "phalanx data prepare data=demo",
            "phalanx data prepare data=files data.dir=datasets/mine 'data.text=[corpus/*.txt]'",
            "phalanx data show data=demo",
        ),
    ),
    "checkpoint": Verb(
        run=checkpoint,
        usage=f"phalanx checkpoint {'|'.join(CHECKPOINT_USAGES)} ...",
        summary="list, check, mend, copy, recut and exchange checkpoints",
        examples=CHECKPOINT_EXAMPLES,
        options=CHECKPOINT_OPTIONS,
        takes_overrides=False,
    ),
    "bench": Verb(
        run=bench,
        usage=f"phalanx bench {'|'.join(BENCHES)} [--json FILE] [OVERRIDES]",
        summary="measure: steps, start-up, pipelines, ZeRO, networks, optimizers, snapshots, ...",
        examples=(
            "phalanx bench step parallel.dp_shard=2 parallel.pp=1 --json step.json",
            "phalanx bench startup experiment=tiny",
            "phalanx bench pipeline bench.pipeline.forward_ms=10 --json pipeline.json",
            "phalanx bench wgrad training.seq_len=512",
            "phalanx bench zero bench.ranks_per_node=4 --json zero.json",
            "phalanx bench slow_network bench.slow_network.mbit=100",
            "phalanx bench optim --json optim.json",
            "phalanx bench snapshot bench.snapshot.step_s=5 --json snapshot.json",
        ),
    ),
    "schedule": Verb(
        run=schedule,
        usage="phalanx schedule [--p P --m M --costs F,B,W,C] [OPTIONS] [OVERRIDES]",
        summary="show what a pipeline schedule costs: bubbles, memory, timeline",
        examples=(
            "phalanx schedule --p 4 --m 8 --costs 1,1,1,0 --schedule zb_h1",
            "phalanx schedule --p 8 --m 32 --costs 3,3,2,.1 --memory 1 --schedule auto --svg a.svg",
            "phalanx schedule experiment=llama3_8b parallel.pp=8 --schedule v_half",
            "phalanx schedule parallel.pp=4 training.microbatch_size=1 --trace trace.json",
        ),
        options=OPTIONS,
    ),
    "plan": Verb(
        run=plan,
        usage="phalanx plan [--memory SIZE] [--json FILE] [OVERRIDES]",
        summary="bytes that a rank holds and sends, for each way to divide parameters and states",
        examples=(
            "phalanx plan experiment=llama3_8b launch=torchrun launch.nodes=2 parallel.dp_shard=16",
            "phalanx plan parallel.pp=1 parallel.dp_shard=4 zero=zeropp --memory 1GiB",
        ),
        options=PLAN_OPTIONS,
    ),
    "doctor": Verb(
        run=doctor,
        usage="phalanx doctor [--json FILE]",
        summary="what this machine can do, and a named cause for what it cannot",
        takes_overrides=False,
    ),
}


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
            from phalanx.launch.torchrun import run_torchrun

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
        return _on_one_device(config, world_size(config))


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


def _verify(job: Job, *, json_file: Path | None) -> None:
    _need_own_launch("verify", job.config)
    size = world_size(job.config)
    degrees = job.config.verify.resume_in
    with user_input():
        config = _on_one_device(job.config, max(size, prod(degrees.values())))
        report = import_module("phalanx.train.verify").verify(config, launch, world_size=size)
    print(report.table())
    _write_json(json_file, report.to_json())
    if not report.passed:
        raise SystemExit(1)


def _bench(job: Job, *, name: str, json_file: Path | None) -> None:
    _need_own_launch("bench", job.config)
    from phalanx.bench.figures import Request, report, table

    size = world_size(job.config)
    with user_input():
        request = Request(
            config=_on_one_device(job.config, size),
            world_size=size,
            launch=launch,
            arguments=job.arguments,
        )
        figures = import_module(BENCHES[name]).bench(request)
    print(table(figures))
    _write_json(json_file, report(figures))


def _on_one_device(config: Config, size: int) -> Config:
    """launch.device=auto decided once, by the largest launch: what is compared runs on one kind."""
    device = env.resolve_device(config.launch, size)
    return replace(config, launch=replace(config.launch, device=device))


def _data(job: Job, *, action: str) -> None:
    module = import_module("phalanx.train.data.prepare")
    with user_input():
        if action == "prepare":
            module.prepare(job.config.data)
        else:
            print(module.show(job.config.data))


def _need_own_launch(verb: str, config: Config) -> None:
    """verify and bench start ranks several times over: not as one worker of torchrun."""
    if env.torchrun_place() is not None or config.launch.launcher is Launcher.torchrun:
        raise BadInput(
            f"launch.launcher=torchrun: `phalanx {verb}` starts its ranks several times; "
            "use launch=local or launch=ray"
        )


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".{path.name}.{os.getpid()}")
        partial_path.write_text(json.dumps(content, indent=2) + "\n")
        partial_path.replace(path)
        print(f"wrote {path}", file=sys.stderr)
