"""Loading the newest state of a run, in memory or in storage, so that it goes on from there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from phalanx.checkpoint.manager import CheckpointManager, Resumed
from phalanx.fault.events import EventLog
from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.engine.step import Engine
from phalanx.train.resume.check import KIND, changed_settings, check_continues, check_wanted
from phalanx.train.resume.state import random_states, restore_random_states


@dataclass(frozen=True)
class GoneOn:
    """Where a run begins."""

    step: int
    """Steps done; 0 = a new run, or one from weights alone."""
    saved_step: int | None
    """Of the newest checkpoint in storage; None = there is none of this run."""


def go_on(
    checkpoints: CheckpointManager,
    engine: Engine,
    config: Config,
    *,
    ranks: Ranks,
    events: EventLog,
) -> GoneOn:
    """Fill `engine` with the newest state there is; collective.

    Raises:
        ValueError: it does not continue into this configuration, or all there was is broken.
    """
    loading = _Loading(engine, config, ranks)
    resumed = checkpoints.resume(loading.wanted)
    if resumed is None:
        _tell_lost(Path(config.run.dir), ranks, events)
        return GoneOn(0, None)
    if resumed.meta.get("kind") != KIND:
        events.record("weights_loaded", step=resumed.step)
        return GoneOn(0, None)
    restore_random_states(loading.random, ranks.device)
    step = check_continues(resumed.meta, config)
    _tell(resumed, step, config, ranks=ranks, events=events, owes=bool(loading.owed))
    return GoneOn(step, resumed.saved_step)


class _Loading:
    """What is asked of each state that is tried."""

    def __init__(self, engine: Engine, config: Config, ranks: Ranks) -> None:
        self._engine, self._config, self._ranks = engine, config, ranks
        self._tried = False
        self.random: dict[str, Tensor] = {}
        self.owed: dict[str, Tensor] = {}
        """Roundings that gradients are owed (zero.error_feedback), where they were saved."""

    def wanted(self, step: int, names: set[str], meta: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors to fill from a state that holds `names`; see CheckpointManager.resume."""
        config, ranks = self._config, self._ranks
        check_wanted(step, config)
        if meta.get("kind") == KIND:
            check_continues(meta, config)
        tensors = self._engine.state_tensors()
        if not any(name.startswith("optim.") for name in names):
            if self._tried:  # a loading that failed has left numbers in the optimizer's states
                raise ValueError(
                    f"checkpoint.dir={config.checkpoint.dir}: of step {step} there are weights "
                    "alone, and all that is newer is broken; see `phalanx checkpoint verify "
                    "--repair`, or begin anew from the weights in another run.dir"
                )
            tensors = {n: t for n, t in tensors.items() if n.startswith("model.")}
        self._tried = True
        random = random_states(ranks.rank, ranks.device)
        self.random = {n: t for n, t in random.items() if n in names}
        residuals = self._engine.rank_tensors()
        self.owed = {n: t for n, t in residuals.items() if n in names}
        for residual in residuals.values():
            residual.zero_()  # not what a loading that failed has left
        return tensors | self.random | self.owed


def _tell(
    resumed: Resumed, step: int, config: Config, *, ranks: Ranks, events: EventLog, owes: bool
) -> None:
    changes = changed_settings(resumed.meta, config)
    events.record(
        "resumed",
        step=step,
        source="memory" if resumed.from_memory else "storage",
        saved_layout=resumed.meta["layout"],
        changed=changes,
    )
    if ranks.rank == 0:
        told = f"; changed since: {', '.join(changes)}" if changes else ""
        if config.zero.error_feedback and not owes:
            told += "; zero.error_feedback begins at zero: none was saved in this layout"
        what = "snapshot in memory" if resumed.from_memory else "checkpoint"
        print(f"phalanx: going on from the {what} of step {step}{told}", flush=True)


def _tell_lost(run_dir: Path, ranks: Ranks, events: EventLog) -> None:
    """Say so where a run that was underway has left nothing to go on from."""
    metrics = run_dir / "metrics.jsonl"
    if ranks.rank == 0 and metrics.exists() and metrics.stat().st_size:
        events.record("begun_anew")
        print(
            f"phalanx: nothing is left of the run that was in {run_dir}, in memory or in storage: "
            "beginning anew",
            flush=True,
        )
