"""`phalanx bench startup`: seconds from the command to the first step, and where they go."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from phalanx.bench.figures import Figure, Request
from phalanx.bench.rounds import ROUNDS

PHASES = ("start", "join", "build", "first_step")
"""start: interpreter, configuration, torch, processes. join: process group. build: mesh, model,
optimizer, logs and the search for a checkpoint. first_step: data and one optimizer step."""

"""Where bench.rounds is empty."""


def bench(request: Request) -> list[Figure]:
    """Run the command for one step in a new process, `bench.rounds` times.

    Raises:
        RuntimeError: a run failed; carries the end of its output.
    """
    runs = [_measure(request.arguments) for _ in range(request.config.bench.rounds or ROUNDS)]
    figures = {f"startup.{phase}_s": [run[phase] for run in runs] for phase in PHASES}
    figures["startup.total_s"] = [sum(run.values()) for run in runs]
    return [
        Figure(name=name, value=median(values), unit="s", low=min(values), high=max(values))
        for name, values in figures.items()
    ]


def _measure(overrides: Sequence[str]) -> dict[str, float]:
    """Seconds of each phase of one run."""
    with tempfile.TemporaryDirectory(prefix="phalanx-startup-") as folder:
        command = [
            *(sys.executable, "-m", "phalanx.train", *overrides),
            *(f"run.dir={folder}", "training.steps=1", "training.eval_batches=0"),
            *("checkpoint.save_last=false", "monitor.sample.tokens=0"),
        ]
        begin = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        lines = (Path(folder) / "events.jsonl").read_text().splitlines()
    events = {event["event"]: event for event in map(json.loads, lines)}
    ranks = events["ranks_joined"]
    marks = [begin, ranks["entered"], ranks["joined"], ranks["ready"], events["first_step"]["time"]]
    return {
        phase: after - before
        for phase, before, after in zip(PHASES, marks, marks[1:], strict=False)
    }
