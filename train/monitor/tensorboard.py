"""A run as TensorBoard shows it: event files in run.dir/tensorboard."""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from phalanx.train.config import Config
from phalanx.train.monitor.metrics import StepRecord, traffic_figures

HPARAM_METRICS = ("train/loss", "eval/loss", "perf/tokens_per_s")
"""Curves that the hyperparameter page sets runs side by side with."""


def flat_hyperparameters(config: Any, prefix: str = "") -> dict[str, str | float | bool]:
    """Every leaf of a configuration by its dotted key, as the hyperparameter page takes it."""
    leaves: dict[str, str | float | bool] = {}
    for item in dataclasses.fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            leaves |= flat_hyperparameters(value, f"{key}.")
        elif isinstance(value, bool | int | float | str):
            leaves[key] = value
        elif isinstance(value, Enum):
            leaves[key] = value.name
        else:
            leaves[key] = "" if value is None else str(value)
    return leaves


class TensorBoardLog:
    """Writes a run's curves and texts; tags stand in the groups train, eval, perf, time, comm,
    pipeline and snapshot."""

    def __init__(self, folder: Path, config: Config, *, first_step: int) -> None:
        """Go on at `first_step`: what earlier processes wrote of it and later steps is hidden."""
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        self._writer.add_text("config", f"```yaml\n{text}```", first_step)
        metrics = dict.fromkeys(HPARAM_METRICS, 0.0)
        # add_hparams would open a run of its own beside this one; its three records do not.
        for summary in hparams(flat_hyperparameters(config), metrics):
            self._writer._get_file_writer().add_summary(summary, first_step)

    def step(
        self, record: StepRecord, *, tokens_per_s: float, mfu: float, memory_bytes: int
    ) -> None:
        """Add a step to every curve; what is not measurable (NaN) has no point."""
        scalars = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/lr": record.lr,
            "perf/tokens_per_s": tokens_per_s,
            "perf/mfu": mfu,
            "perf/memory_gb": memory_bytes / 1e9,
            "time/step_s": record.seconds,
        }
        scalars |= {
            f"time/{part}_s": seconds
            for part, seconds in record.parts.items()
            if seconds == seconds
        }
        if record.traffic:
            figures = traffic_figures(record.traffic)
            for link in ("inside", "between"):
                figures[f"{link}_bytes"] = sum(getattr(t, link) for t in record.traffic.values())
            scalars |= {f"comm/{n}": value for n, value in figures.items() if value == value}
        scalars |= {f"pipeline/{name}": value for name, value in record.pipeline.items()}
        scalars |= {f"snapshot/{name}": value for name, value in record.snapshot.items()}
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, record.step)

    def evaluation(self, step: int, loss: float) -> None:
        """Add a loss on the held-out split."""
        self._writer.add_scalar("eval/loss", loss, step)
        self._writer.flush()

    def sample(self, step: int, text: str) -> None:
        """Add text that the model wrote."""
        self._writer.add_text("sample", f"```\n{text}\n```", step)
        self._writer.flush()

    def image(self, tag: str, step: int, pixels: np.ndarray) -> None:
        """Add a picture, (height, width, 3) of uint8."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Put everything on disk."""
        self._writer.close()
