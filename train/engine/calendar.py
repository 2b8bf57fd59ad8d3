"""After which steps something is due: saves, snapshots, evaluations, text samples.

A pure function of the configuration, so that every rank comes to the same answers. `done` counts
the steps that are done. Torch-free.
"""

from phalanx.train.config import Config


class Calendar:
    """What is due after `done` steps of a run."""

    def __init__(self, config: Config) -> None:
        self._steps = config.training.steps
        self._training = config.training
        self._checkpoint = config.checkpoint
        self._sample = config.monitor.sample

    def save(self, done: int) -> bool:
        """A checkpoint in storage."""
        last = self._checkpoint.save_last and done >= self._steps
        return last or _at(done, self._checkpoint.every)

    def is_last_save(self, done: int) -> bool:
        """Whether no later checkpoint will be due, where one is due now."""
        later = self._steps
        if not self._checkpoint.save_last:
            later -= later % (self._checkpoint.every or 1)
        return done >= later

    def snapshot(self, done: int) -> bool:
        """A snapshot in memory."""
        return _at(done, self._checkpoint.snapshot.every)

    def evaluation(self, done: int) -> bool:
        """An evaluation on the held-out split."""
        if not self._training.eval_batches or not done:
            return False
        return done == self._steps or _at(done, self._training.eval_every)

    def sample(self, done: int) -> bool:
        """A text sample."""
        if not self._sample.tokens or not done:
            return False
        return done == self._steps or _at(done, self._sample.every)

    def reads_parameters(self, done: int) -> bool:
        """Whether something reads parameters before the next step."""
        return done == self._steps or any(
            due(done) for due in (self.save, self.snapshot, self.evaluation, self.sample)
        )


def _at(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
