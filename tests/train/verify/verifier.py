"""`phalanx verify` many times over, with the lone process that layouts are compared with run once.

It computes the same whatever is compared with it, so its record is copied.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from phalanx.launch.ranks.start import launch
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.train.config import Config, LaunchConfig
from phalanx.train.verify import VerifyReport, verify


class Verifier:
    """`verify`, for configurations whose references differ in little more than their layout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Path] = {}

    def __call__(self, config: Config, *, world_size: int) -> VerifyReport:
        return verify(config, self._launch, world_size=world_size)

    def _launch(
        self, fn: Any, run: Config, folder: Path, *args: Any, world_size: int, config: LaunchConfig
    ) -> list[Any]:
        if folder.name != "reference":
            return launch(fn, run, folder, *args, world_size=world_size, config=config)
        key = _computed(run)
        if key not in self._known:
            launch(fn, run, folder, *args, world_size=world_size, config=config)
            self._known[key] = self._folder / str(len(self._known))
            shutil.copytree(folder, self._known[key])
        shutil.copytree(self._known[key], folder, dirs_exist_ok=True)
        return []


def _computed(run: Config) -> str:
    """All that a lone process's numbers can depend on: not where it saves and what resumes there,
    and no schedule, as it has no pipeline."""
    assert run.parallel.fixed_degree == run.parallel.dp_shard == 1
    return repr(
        replace(
            run,
            pipeline=PipelineConfig(),
            checkpoint=replace(run.checkpoint, dir="somewhere"),
            verify=replace(run.verify, resume_in={}),
        )
    )
