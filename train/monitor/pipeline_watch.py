"""A pipeline measured in a run's first steps: `auto` plans again, every schedule is held to its
prediction.

All ranks measure; rank 0 plans and tells the others, so that they agree to the bit. A run that is
resumed measures and plans again. Orders of the same stages compute the same bits, so no loss
depends on what was measured.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phalanx.fault.events import EventLog
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline.profile import (
    OpRecorder,
    RankProfile,
    measure_hops,
    measured_timeline,
    stage_profiles,
)
from phalanx.parallel.pipeline.runtime import PipelineExecutor
from phalanx.parallel.pipeline.simulate import simulate
from phalanx.train.config import Config
from phalanx.train.monitor.report import RunReport
from phalanx.train.plan.replan import Measured, decide


class PipelineWatch:
    """One rank's part in it; nothing at parallel.pp=1 or with pipeline.profile_steps=0."""

    def __init__(
        self,
        config: Config,
        executor: object,
        mesh: Mesh,
        *,
        report: RunReport,
        events: EventLog,
        run_dir: Path,
    ) -> None:
        self._config, self._mesh = config, mesh
        self._report, self._events, self._run_dir = report, events, run_dir
        self._executor: PipelineExecutor | None = None
        self._found: Measured | None = None
        self._clocks: list[RankProfile] = []
        if isinstance(executor, PipelineExecutor) and config.pipeline.profile_steps:
            self._executor = executor
            self._recorder = OpRecorder(executor.device)
            self._unrecorded = executor.recorder
            executor.recorder = self._recorder

    def is_due(self) -> bool:
        """Whether `after_step` of the step that is running has all ranks talk to each other."""
        if self._executor is None or self._recorder.warming_up:
            return False
        timed = len(self._recorder.steps) + 1
        return timed >= self._config.pipeline.profile_steps

    def after_step(self, step: int) -> bool:
        """Call it after each step, on all ranks; whether it took time.

        Raises:
            ValueError: no schedule keeps to pipeline.memory_limit, by what was measured.
        """
        if self._executor is None:
            return False
        due = self.is_due()
        self._recorder.end_step()
        if not due:
            return False
        if self._found is None:
            self._clocks = self._plan(step)
            assert self._found is not None
            if self._found.schedule.orders != self._executor.schedule.orders:
                self._executor.schedule = self._found.schedule
                return True  # one more step is recorded, to show the new schedule
        self._show(step)
        self._executor.recorder = self._unrecorded
        self._executor = None
        return True

    def measured(self, parts: Mapping[str, float]) -> dict[str, float]:
        """What a step's curves get, once there is a prediction; `parts` as StepTimer gives them."""
        if self._found is None:
            return {}
        wait = parts["comm_wait"]
        seconds = parts["forward_backward"] + (wait if wait == wait else 0.0)
        found = self._found
        return {
            "step_s_measured": seconds,
            "step_s_predicted": found.predicted_s,
            "bubble_measured": 1 - found.work_s / seconds,
            "bubble_predicted": 1 - found.work_s / found.predicted_s,
        }

    def _plan(self, step: int) -> list[RankProfile]:
        """Put together what all ranks measured, and plan; the ranks of one pipeline, in order."""
        executor, mesh = self._executor, self._mesh
        assert executor is not None
        boundary = executor.boundary
        hop, clock = measure_hops(mesh.group("pp"), boundary, executor.device)
        size = boundary.numel() * boundary.element_size()
        mine = RankProfile(stage_profiles(self._recorder, boundary_bytes=size), hop, clock)
        everyone: list[Any] = [None] * mesh.world.size()
        dist.all_gather_object(everyone, (mesh.rank("pp"), mine))
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                answer = [decide(self._config, executor.schedule, everyone)]
            except ValueError as error:  # told to every rank, so that none waits for the others
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        self._found = answer[0]
        self._tell(step)
        pipelines = dict(reversed(everyone))
        return [pipelines[rank] for rank in range(mesh.size("pp"))]

    def _tell(self, step: int) -> None:
        assert self._found is not None
        found, schedule = self._found, self._found.schedule
        auto = self._config.pipeline.schedule == "auto"
        name = "pipeline_replanned" if auto else "pipeline_profiled"
        bubble = 1 - found.work_s / found.predicted_s
        self._events.record(
            name,
            step=step,
            schedule=schedule.name,
            placement=schedule.placement,
            predicted_s=found.predicted_s,
            predicted_before_s=found.before_s,
            bubble_predicted=bubble,
            peak_bytes=found.memory.peak(schedule),
            memory_is_measured=found.memory_is_measured,
            costs_s=asdict(found.costs),
        )
        text = f"pipeline {schedule.name}: {found.predicted_s:.4g} s a step predicted"
        if auto:
            text += f" by measured costs ({found.before_s:.4g} s as planned before them)"
        if auto and not found.memory_is_measured:
            text += ", memory estimated, since this machine counts none"
        self._report.message(f"{text}, bubble {bubble:.1%}")

    def _show(self, step: int) -> None:
        """Put the last step's timeline beside the predicted one."""
        executor, found = self._executor, self._found
        assert executor is not None
        assert found is not None
        times: list[Any] = [None] * self._mesh.world.size()
        dist.all_gather_object(times, self._recorder.steps[-1])
        if dist.get_rank() != 0:
            return
        one_pipeline = dist.get_process_group_ranks(self._mesh.group("pp"))
        ranks = [
            replace(profile, last_step=times[rank])
            for profile, rank in zip(self._clocks, one_pipeline, strict=True)
        ]
        # Imported here: it costs start-up time, and one rank needs it.
        from phalanx.parallel.pipeline.draw.png import timeline_image
        from phalanx.parallel.pipeline.draw.trace import trace_events

        schedule = executor.schedule
        timeline = measured_timeline(schedule, ranks)
        trace = trace_events(timeline, schedule, found.memory, microseconds=1e6)
        (self._run_dir / "pipeline_timeline.json").write_text(json.dumps(trace) + "\n")
        if not self._config.monitor.tensorboard:
            return
        predicted = simulate(schedule, found.costs)
        panels = [
            (f"{schedule.name}, measured in step {step}", timeline, schedule),
            (f"{schedule.name}, predicted", predicted, schedule),
        ]
        self._report.image("pipeline/timeline", step, timeline_image(panels))
