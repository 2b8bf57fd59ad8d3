"""The training loop: the function that every rank of `phalanx train` runs."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from phalanx.checkpoint.errors import CheckpointError
from phalanx.checkpoint.manager import CheckpointManager
from phalanx.fault.events import EventLog
from phalanx.fault.signals import StopRequest
from phalanx.parallel.comm_timer import CommTimer
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.tensor.traffic import TensorTraffic
from phalanx.train.config import Config
from phalanx.train.data.source import Batch, BatchSource, Prefetcher
from phalanx.train.data.tokenizer import load_tokenizer
from phalanx.train.engine.build import batch_source
from phalanx.train.engine.calendar import Calendar
from phalanx.train.engine.loss import world_sums
from phalanx.train.engine.step import Engine
from phalanx.train.model.flops import flops_per_token
from phalanx.train.monitor.metrics import StepRecord, StepTimer
from phalanx.train.monitor.pipeline_watch import PipelineWatch
from phalanx.train.monitor.profile import ProfileWindow
from phalanx.train.monitor.report import RunReport
from phalanx.train.monitor.sample import generate
from phalanx.train.optim.schedule import learning_rate
from phalanx.train.resume.go_on import go_on
from phalanx.train.resume.state import describe, progress, random_states


def train(ranks: Ranks, config: Config) -> dict[str, Any]:
    """Train to `config.training.steps`, from the newest checkpoint where there is one.

    Returns:
        `steps` done, the last `loss` (None if no step was left to do), `stopped` (who asked the
        run to stop early, or None).

    Raises:
        FloatingPointError: a loss or gradient was not finite; names step and parameters.
        ValueError: the checkpoint does not continue into this configuration.
    """
    entered = time.time()
    with StopRequest() as stop, process_group(ranks):
        joined = time.time()
        trainer = Trainer(config, ranks)
        trainer.events.record("ranks_joined", entered=entered, joined=joined, ready=time.time())
        try:
            return trainer.run(stop)
        finally:
            trainer.close()


class Trainer:
    """One rank's state of a run."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config = config
        self.calendar = Calendar(config)
        self.ranks = ranks
        config.check_nodes(ranks.world_size, ranks.ranks_per_node)  # known before, but for Ray's
        self.mesh = build_mesh(
            config.parallel,
            world_size=ranks.world_size,
            device_type=ranks.device_type,
            ranks_per_node=ranks.ranks_per_node,
        )
        self.run_dir = Path(config.run.dir)
        self.events = EventLog(self.run_dir / "events.jsonl" if ranks.rank == 0 else None)
        self.engine = Engine(config, self.mesh, ranks.device)
        self.checkpoints = CheckpointManager(
            config.checkpoint,
            ranks=ranks,
            on_event=self.events.on_event,
            racks=config.launch.racks,
            log_dir=self.run_dir / "logs",
        )
        self._about = describe(config, self.mesh, 0)
        gone_on = go_on(self.checkpoints, self.engine, config, ranks=ranks, events=self.events)
        self.first_step = gone_on.step
        self.saved_step = gone_on.saved_step
        """Of the newest checkpoint in storage."""
        self.report = RunReport(
            config,
            self.run_dir,
            first_step=self.first_step,
            ranks=ranks,
            flops_per_token=flops_per_token(config.model, config.training.seq_len),
        )
        self.comm = CommTimer(device_type=ranks.device_type)
        self.timer = StepTimer(ranks.device, comm=self.comm)
        self.tensor_traffic = TensorTraffic(
            self.mesh.meter,
            tensor_parallel=config.parallel.tp > 1,
            compiled=config.parallel.compile,
        )
        self.pipeline = PipelineWatch(
            config,
            self.engine.model.executor,
            self.mesh,
            report=self.report,
            events=self.events,
            run_dir=self.run_dir,
        )
        self.loss: float | None = None
        """Of the last step that is final."""
        self._open: deque[tuple[int, Callable[..., StepRecord]]] = deque()
        """Steps done whose loss and norm are not known here yet (pipeline.post_validation)."""
        self.finished = False

    def run(self, stop: StopRequest) -> dict[str, Any]:
        """Step until the end or until somebody asks to stop; see `train`."""
        steps, done = self.config.training.steps, self.first_step
        self.events.record("run_started", step=done, world_size=self.ranks.world_size)
        batches = Prefetcher(self._source("train"), done, self.config.data.prefetch)
        window = ProfileWindow(
            self.config.monitor.profile, self.run_dir, ranks=self.ranks, first_step=done
        )
        stopped: str | None = None
        try:
            with self.comm, self.tensor_traffic, window:
                self._prepare_saving()
                self._catch_up(done)
                self._restart_clocks()
                while done < steps and stopped is None:
                    with self.timer("data"):
                        batch = next(batches)
                    stopping = self.step(done, batch, stop)
                    window.step()
                    done += 1
                    if done == self.first_step + 1:
                        self.events.record("first_step", step=done)
                    if stopping and done < steps:
                        stopped = stop.reason or "another rank"
                    else:
                        self._after_step(done)
        finally:
            batches.close()
        self._finish(done, stopped)
        # A run that was stopped and saved nothing can only go on from memory.
        self.finished = stopped is None or self.config.checkpoint.save_last
        return {"steps": done, "loss": self.loss, "stopped": stopped}

    def close(self) -> None:
        """Complete a running save and put the logs on disk.

        After an error the snapshots stay in memory for a while, for the next start.
        """
        try:
            self.checkpoints.close(finished=self.finished)
        finally:
            self.report.close()
            self.events.close()

    def step(self, step: int, batch: Batch, stop: StopRequest) -> bool:
        """One optimizer step; whether to stop after it.

        With pipeline.post_validation its loss, its line in the logs, and a request to stop become
        known during the next step, or at once where something is due after it.
        """
        lr = learning_rate(self.config.optim.lr, step, self.config.training.steps)
        with self._named_errors(step), self.timer("forward_backward"):
            gradients = self.engine.gradients(batch, stop=stop.requested)
        stopping = self._log_settled()
        with self.timer("checkpoint"):
            self.checkpoints.before_update()
        with self._named_errors(step), self.timer("optimizer"):
            self.engine.update(gradients, lr)
            if self.calendar.reads_parameters(step + 1) or self.pipeline.is_due():
                self.engine.settle()
        seconds, parts = self.timer.take()
        training = self.config.training
        tokens = training.global_batch_size * training.seq_len
        record = partial(
            StepRecord,
            step=step,
            lr=lr,
            tokens=tokens,
            seconds=seconds,
            parts=parts,
            traffic=self.mesh.meter.take(),
            pipeline=self.pipeline.measured(parts),
            snapshot=self.checkpoints.monitor.take(),
        )
        self._open.append((step, record))
        stopping |= self._log_settled()
        if self.pipeline.after_step(step):
            self._restart_clocks()
        if self.calendar.snapshot(step + 1) or self.calendar.save(step + 1):
            # After its line is written: no resume finds a state whose steps were not logged.
            # The seconds are charged to the next line.
            with self.timer("checkpoint"):
                last = stopping or self.calendar.is_last_save(step + 1)
                self._save(step + 1, durable=self.calendar.save(step + 1), may_skip=not last)
        return stopping

    def settle(self) -> None:
        """Make every step done so far final, and log it; all ranks together."""
        if self._open:
            with self._named_errors(self._open[-1][0]):
                self.engine.settle()
        self._log_settled()

    def _log_settled(self) -> bool:
        """Log the steps that became final, each once and in order; whether one says to stop."""
        stopping = False
        for gradients in self.engine.take_settled():
            _, record = self._open.popleft()
            self.report.step(record(loss=gradients.loss, grad_norm=gradients.norm))
            self.loss = gradients.loss
            stopping |= gradients.stop
        return stopping

    @contextmanager
    def _named_errors(self, step: int) -> Iterator[None]:
        """Say of a number that is not finite which step computed it: the oldest not yet final."""
        try:
            yield
        except FloatingPointError as error:
            if self._open:
                step = self._open[0][0]
            self.events.record("not_finite", durable=True, step=step, reason=str(error))
            raise FloatingPointError(f"step {step}: {error}") from None

    def _after_step(self, done: int) -> None:
        """What is due after `done` steps, outside the time that steps are charged with."""
        if self.calendar.evaluation(done):
            self._evaluate(done)
            self._restart_clocks()
        if self.calendar.sample(done):
            self._sample(done)
            self._restart_clocks()

    def _restart_clocks(self) -> None:
        """Leave what came since the last step out of the next one."""
        self.timer.restart()
        self.mesh.meter.take()

    def _catch_up(self, done: int) -> None:
        """Evaluate and sample where the run before was stopped between a save and that."""
        owed = self.calendar.evaluation(done) and not self.report.evaluated(done)
        if world_sums([owed if self.ranks.rank == 0 else False], self.mesh)[0]:
            self._after_step(done)

    def _finish(self, done: int, stopped: str | None) -> None:
        """Complete the last step and the last save, and say how the run ended."""
        self.settle()
        if stopped and self.config.checkpoint.save_last:
            self._save(done)
        try:
            self.checkpoints.wait()
        except CheckpointError:
            if done != self.saved_step:
                raise
            self.report.message("saving once more")  # a holder may have died meanwhile
            self.saved_step = None
            self._save(done)
            self.checkpoints.wait()
        self.events.record("run_stopped" if stopped else "run_finished", step=done, reason=stopped)
        if stopped:
            self.report.message(f"stopped by {stopped} after {done} steps; run again to go on")
        elif done == self.first_step:
            self.report.message(
                f"all {done} steps are done; raise training.steps to go on, or choose another "
                "run.dir for a new run"
            )

    def _eager(self) -> dict[str, Tensor]:
        """What the next forward or backward changes of the state."""
        return self.engine.rank_tensors() | random_states(self.ranks.rank, self.ranks.device)

    def _prepare_saving(self) -> None:
        """Take the memory that saving will need, and save what the run before still owed."""
        config, done = self.config.checkpoint, self.first_step
        if config.every or config.save_last or config.snapshot.every:
            self.checkpoints.prepare(self.engine.state_tensors() | self._eager())
        if done and self.calendar.save(done):
            self._save(done)

    def _save(self, done: int, *, durable: bool = True, may_skip: bool = False) -> None:
        """Begin a snapshot, and with `durable` its way to storage; see `snapshot` on `may_skip`."""
        if durable and done == self.saved_step:
            return
        if durable:
            self.report.sync()
            self.saved_step = done
        self.engine.settle()
        self.checkpoints.snapshot(
            done,
            self.engine.state_tensors,
            self._about | progress(self.config, done),
            eager=self._eager(),
            durable=durable,
            may_skip=may_skip,
        )
        if durable and not self.config.checkpoint.async_save:
            self.checkpoints.wait()

    def _evaluate(self, done: int) -> None:
        count = self.config.training.eval_batches
        source = self._source("eval")
        batches: Iterator[Batch] = map(source.batch, itertools.count())
        self.report.evaluation(done, self.engine.evaluate(itertools.islice(batches, count)))

    def _sample(self, done: int) -> None:
        sample = self.config.monitor.sample
        text = generate(
            self.engine.next_logits,
            load_tokenizer(self.config.data),
            prompt=sample.prompt,
            num_tokens=sample.tokens,
            seq_len=self.config.training.seq_len,
            temperature=sample.temperature,
            seed=self.config.training.seed,
            step=done,
        )
        self.report.sample(done, text)

    def _source(self, split: str) -> BatchSource:
        return batch_source(
            self.config, dp_rank=self.mesh.dp_rank, dp_size=self.mesh.dp_size, split=split
        )
