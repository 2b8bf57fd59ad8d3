"""A torch.profiler trace of a window of steps, for chrome://tracing or ui.perfetto.dev."""

import warnings
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from phalanx.parallel.ranks import Ranks
from phalanx.train.config import ProfileConfig


class ProfileWindow:
    """Context manager around the loop; `step()` at the end of each step moves the window on.

    Rank 0 writes run.dir/profile/step_XXXX.json, named by the first step in it. On other ranks,
    and with profile.steps=0, nothing happens. A loop that ends inside the window leaves a trace
    of the steps that were; one that never reaches it says so in a warning.
    """

    def __init__(
        self, config: ProfileConfig, run_dir: Path, *, ranks: Ranks, first_step: int
    ) -> None:
        """`first_step`: the step that the loop begins with."""
        self._wanted = ranks.rank == 0 and config.steps > 0
        self._window = range(config.start, config.start + config.steps)
        self._folder = run_dir / "profile"
        self._step = first_step
        self._traced_from = first_step
        self._profiler: profile | None = None
        self._activities = [ProfilerActivity.CPU]
        if ranks.device_type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)

    def __enter__(self) -> "ProfileWindow":
        self._move()
        return self

    def step(self) -> None:
        """A step has ended."""
        self._step += 1
        self._move()

    def _move(self) -> None:
        inside = self._wanted and self._step in self._window
        if inside and self._profiler is None:
            self._traced_from = self._step
            self._profiler = profile(activities=self._activities)
            self._profiler.start()
        elif not inside and self._profiler is not None:
            self._write()

    def _write(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{self._traced_from:04d}.json"
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._profiler is not None:
            self._write()
        if self._wanted and kind is None and self._step <= self._window.start:
            warnings.warn(
                f"monitor.profile.start={self._window.start}: nothing traced, the last step was "
                f"{self._step - 1}; use an earlier start",
                stacklevel=2,
            )
