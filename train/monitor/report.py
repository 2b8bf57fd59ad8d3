"""The one place that the training loop reports to: metrics.jsonl, TensorBoard and the terminal."""

from pathlib import Path
from typing import TextIO

import numpy as np
import psutil
import torch

from phalanx.parallel.ranks import Ranks
from phalanx.train.config import Config
from phalanx.train.monitor.metrics import MetricsLog, StepRecord
from phalanx.train.monitor.peak import Peak, peak
from phalanx.train.monitor.progress import Progress


class RunReport:
    """Hands each step, evaluation and sample to every log of the run.

    Rank 0 writes:
        metrics.jsonl   a line a step
        eval.jsonl      a line an evaluation: step (the last one before it), loss
        tensorboard/    curves, texts, hyperparameters (monitor.tensorboard)
        the terminal    monitor.progress
    On the other ranks every method does nothing. Steps count from 0; what follows the step k, an
    evaluation or a sample after k + 1 steps, stands at k in every file, so that a resume at k + 1
    keeps it.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        first_step: int,
        ranks: Ranks,
        flops_per_token: float,
        live: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Open the logs, to go on at `first_step`.

        Args:
            config: the whole run's.
            run_dir: its folder.
            first_step: the first step that will be reported, 0 in a fresh run.
            ranks: this rank's place, for whether to write at all and for the devices' peak.
            flops_per_token: as phalanx.train.model.flops.flops_per_token gives it, for the MFU.
            live: draw a bar; None = where `stream` is a terminal.
            stream: the terminal; None = standard error.
        """
        self._device = ranks.device
        self._flops_per_token = flops_per_token
        self.peak: Peak | None = None
        self._metrics = self._evaluations = self._board = self._progress = None
        if ranks.rank != 0:
            return
        self.peak = peak(
            ranks.device,
            config.precision.compute.name,
            world_size=ranks.world_size,
            ranks_per_machine=ranks.local_world_size,
        )
        self._metrics = MetricsLog(run_dir / "metrics.jsonl", first_step=first_step)
        self._evaluations = MetricsLog(run_dir / "eval.jsonl", first_step=first_step)
        if config.monitor.tensorboard:
            # Imported here: it costs start-up time, and ranks without it do not need it.
            from phalanx.train.monitor.tensorboard import TensorBoardLog

            self._board = TensorBoardLog(run_dir / "tensorboard", config, first_step=first_step)
        if config.monitor.progress:
            self._progress = Progress(
                num_steps=config.training.steps,
                first_step=first_step,
                log_every=config.monitor.log_every,
                live=live,
                stream=stream,
            )
            self._progress.message(
                f"peak for MFU: {self.peak.flops / 1e12:.3g} TFLOP/s ({self.peak.source})"
            )

    def step(self, record: StepRecord) -> None:
        """Log an optimizer step."""
        if self._metrics is None or self.peak is None:
            return
        self._metrics.write_step(record)
        tokens_per_s = record.tokens / record.seconds
        mfu = tokens_per_s * self._flops_per_token / self.peak.flops
        if self._board is not None:
            self._board.step(
                record, tokens_per_s=tokens_per_s, mfu=mfu, memory_bytes=memory_in_use(self._device)
            )
        if self._progress is not None:
            self._progress.step(record, tokens_per_s=tokens_per_s, mfu=mfu)

    def evaluation(self, done: int, loss: float) -> None:
        """Log a loss on the held-out split, computed after `done` steps."""
        if self._evaluations is not None:
            self._evaluations.write(done - 1, {"loss": loss})
        if self._board is not None:
            self._board.evaluation(done - 1, loss)
        if self._progress is not None:
            self._progress.evaluation(done, loss)

    def sample(self, done: int, text: str) -> None:
        """Log text that the model wrote after `done` steps."""
        if self._board is not None:
            self._board.sample(done - 1, text)
        if self._progress is not None:
            self._progress.sample(done, text)

    def image(self, tag: str, step: int, pixels: np.ndarray) -> None:
        """Log a picture of a step, (height, width, 3) of uint8, to TensorBoard."""
        if self._board is not None:
            self._board.image(tag, step, pixels)

    def evaluated(self, step: int) -> bool:
        """Whether this rank has a line of the evaluation after `step`, from this run or before."""
        return self._evaluations is not None and self._evaluations.last_step == step - 1

    def sync(self) -> None:
        """Put the lines so far on disk, so that a checkpoint never outlives them."""
        for log in (self._metrics, self._evaluations):
            if log is not None:
                log.sync()

    def message(self, text: str) -> None:
        """Tell the person at the terminal something."""
        if self._progress is not None:
            self._progress.message(text)

    def close(self) -> None:
        """Put everything on disk and leave the terminal in order."""
        for part in (self._metrics, self._evaluations, self._board, self._progress):
            if part is not None:
                part.close()

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def memory_in_use(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors ever took on `device`, else what this process holds
    resident now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
