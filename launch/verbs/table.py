"""The words after `phalanx`: what each takes, says of itself and does.

Heavy modules are imported where they are needed, after the configuration has been checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phalanx.launch.verbs.bench import BENCHES, bench
from phalanx.launch.verbs.checkpoint.flags import EXAMPLES as CHECKPOINT_EXAMPLES
from phalanx.launch.verbs.checkpoint.flags import OPTIONS as CHECKPOINT_OPTIONS
from phalanx.launch.verbs.checkpoint.flags import USAGES as CHECKPOINT_USAGES
from phalanx.launch.verbs.data import data
from phalanx.launch.verbs.plan.flags import OPTIONS as PLAN_OPTIONS
from phalanx.launch.verbs.schedule.flags import OPTIONS
from phalanx.launch.verbs.train import train
from phalanx.launch.verbs.verify import verify


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


def checkpoint(argv: Sequence[str]) -> None:
    """Look after checkpoints."""
    from phalanx.launch.verbs.checkpoint.verb import checkpoint as do

    do(argv)


def schedule(argv: Sequence[str]) -> None:
    """Build, check, replay and draw a pipeline schedule."""
    from phalanx.launch.verbs.schedule.verb import schedule as do

    do(argv)


def plan(argv: Sequence[str]) -> None:
    """Say what each way to divide the model costs."""
    from phalanx.launch.verbs.plan.verb import plan as do

    do(argv)


def doctor(argv: Sequence[str]) -> None:
    """Look at the machine."""
    from phalanx.launch.verbs.doctor.verb import doctor as do

    do(argv)


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
        usage="phalanx verify [--random N [--seed S]] [--json FILE] [OVERRIDES]",
        summary="prove that a layout computes what one process computes",
        examples=(
            "phalanx verify parallel.dp_shard=2 parallel.tp=2",
            "phalanx verify parallel.pp=2 'verify.resume_in={tp: 2}' --json verify.json",
            "phalanx verify --random 20 parallel.pp=2",
        ),
        options=(
            ("--random N", "N layouts, shapes and options that the checks allow, in fp64; what"),
            ("", "OVERRIDES say is the same in all of them"),
            ("--seed S", "draw the same again"),
            ("--json FILE", "write what was found"),
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
