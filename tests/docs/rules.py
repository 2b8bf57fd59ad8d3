"""How a test runs the commands of README and docs, and what it looks for in what they print."""

import re
from dataclasses import dataclass

FEW_STEPS = "training.steps=3 training.eval_batches=1 monitor.sample.tokens=4"
"""Appended to `phalanx train`: nothing else of a line changes."""
LONGER = "training.seq_len=16 training.eval_batches=1 monitor.sample.tokens=4"

FIRST = {"docs/checkpoints.md": f"phalanx train training.steps=100 {LONGER}"}
"""What ran before a document's first line, in place of a short `phalanx train`."""

APPENDED = {
    "phalanx train run.name=back": f"training.steps=101 {LONGER}",
    "tensorboard --logdir runs": "--inspect",
}
"""By line, in place of FEW_STEPS."""

SMALLEST = {
    "step": "bench.rounds=1 bench.steps=1",
    "startup": "bench.rounds=1",
    "pipeline": "bench.rounds=1 bench.steps=1 bench.pipeline.ranks=2 bench.pipeline.microbatches=4 "
    "bench.pipeline.forward_ms=5",
    "wgrad": "bench.rounds=1 bench.steps=1",
    "quantize": "bench.rounds=1 bench.steps=1",
    "zero": "bench.rounds=1 bench.steps=1",
    "slow_network": "bench.rounds=1 bench.steps=1 bench.slow_network.loss_steps=2",
    "optim": "bench.rounds=1 bench.steps=1",
    "erasure": "bench.rounds=1 bench.steps=1",
    "snapshot": "bench.rounds=1 bench.steps=1 bench.snapshot.state_mb=8 bench.snapshot.step_s=0.3",
}
"""Overrides that make a benchmark as short as it can be."""

COMPOSED = (
    "experiment=1b",
    "experiment=llama3_8b model=llama3_8b",
    "experiment=llama3_70b",
    "experiment=ours",
    "model=300m",
)
"""Runs for GPUs or several machines: composed and checked as far as one CPU can, with --cfg job."""

LEFT_OUT = {
    "phalanx verify --random N": "a placeholder",
    "make train": "it is this run, with its environment; README's first line",
    "make test": "it runs these tests",
    "make test-slow": "it runs these tests",
    "make lint": "CI runs it",
    ".ci/run": "it runs these tests",
    'make test ARGS="-k resume"': "it runs these tests",
    'make test-slow ARGS="-m zero"': "it runs these tests",
    'make test-slow ARGS="-m docs"': "it runs these tests",
    "make train ARGS=data=stdlib": "`make -n`, and the data's own tests",
    "make train ARGS=run.name=second": "`make -n`",
    'make env TORCH="torch --index-url https://download.pytorch.org/whl/cu128"': "a network, GPUs",
    "make dev": "the environment that runs these tests",
    "source .venv/bin/activate": "the folder of the tests has no environment of its own",
    "torchrun ... -m phalanx.train experiment=...": "says how a scheduler's line looks",
    "phalanx checkpoint import Llama-3.2-1B checkpoints/llama": "weights to be downloaded",
    "phalanx checkpoint verify --repair": "a flag, explained",
    "phalanx schedule --schedule NAME": "a placeholder",
}
"""Commands that do not run here, and why; `make` lines are read by `make -n` all the same."""


@dataclass(frozen=True)
class Expected:
    """What a command prints, and how it ends."""

    pattern: str
    code: int = 0


EXPECTED = (
    (r"-sc install", Expected(r"complete .* phalanx$")),
    (r"--help", Expected(r"(?s)usage: phalanx|phalanx [\d.]+: |\w+\.\w+ = ")),
    (r"--cfg job", Expected(r"(?s)^training:\n.*^  steps: \d+")),
    (r"^phalanx train .*--multirun", Expected(r"(?s)job 1: .*step 3/3  loss \d\.\d+")),
    (
        r"^phalanx train run\.name=back ",
        Expected(r"(?s)checkpoint of step 100.*step 101/101  loss \d"),
    ),
    (r"^phalanx train", Expected(r"step 3/3  loss \d\.\d+")),
    (r"^phalanx verify .*inject=drop_grad", Expected(r"dropped gradient: zero for layers\.", 1)),
    (r"^phalanx verify .*--random", Expected(r"^\d+ verified, 0 failed")),
    (r"^phalanx verify", Expected(r"equal to one process \(tolerance 1e-05\)")),
    (r"^phalanx data show", Expected(r"[\d,]+ tokens of a vocabulary of [\d,]+")),
    (r"^phalanx data prepare", Expected(r"[\d,]+ tokens of a vocabulary of [\d,]+")),
    (r"^phalanx plan", Expected(r"(?m)^.*zeropp|int8.*[\d.]+")),
    (r"^phalanx schedule", Expected(r"\d+\.\d+ ?%")),
    (r"^phalanx bench", Expected(r"(?m)^\w+\.\w\S* +[\d.,e+-]+ \S")),
    (r"^phalanx doctor", Expected(r"(?m)^ok +gloo")),
    (r"^phalanx checkpoint ls$", Expected(r"memory")),
    (r"^phalanx checkpoint ls", Expected(r"^ +\d+ .*complete")),
    (r"^phalanx checkpoint show --diff", Expected(r"\d+ tensors equal, [1-9]\d* not", 1)),
    (r"^phalanx checkpoint show", Expected(r"part-00000\.safetensors")),
    (r"^phalanx checkpoint verify", Expected(r"step_0+\d+")),
    (r"^phalanx checkpoint gc", Expected(r".")),
    (r"^phalanx checkpoint (export|import)", Expected(r"^wrote (exported|imported)")),
    (r"^phalanx checkpoint (restore|convert)", Expected(r"[\d.]+ \w?B|step \d+")),
    (r"^tensorboard", Expected(r"loss")),
)
"""By what a command looks like; the first that fits."""


def expected(command: str) -> Expected:
    """What the command, as it is run, must print."""
    return next(found for pattern, found in EXPECTED if re.search(pattern, command))


def as_run(text: str) -> str:
    """The command with what the tests append to it."""
    words = text.split()
    if text in APPENDED:
        return f"{text} {APPENDED[text]}"
    if words[:2] == ["phalanx", "train"] and not {"--help", "--cfg"} & set(words):
        if any(part in text for part in COMPOSED):
            return f"{text} --cfg job"
        return f"{text} {FEW_STEPS}"
    if words[:2] == ["phalanx", "bench"]:
        return f"{text} {SMALLEST[words[2]]}"
    return text
