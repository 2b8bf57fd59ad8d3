"""What a person at the terminal sees of a run: a live bar, or plain lines where output is kept."""

import sys
from typing import TextIO

from tqdm import tqdm

from phalanx.train.monitor.metrics import StepRecord


def describe(record: StepRecord, tokens_per_s: float, mfu: float) -> str:
    """A step's figures in one short text."""
    return (
        f"loss {record.loss:.4f}  grad_norm {record.grad_norm:.3f}  lr {record.lr:.2e}  "
        f"{tokens_per_s:,.0f} tokens/s  mfu {mfu:.1%}"
    )


class Progress:
    """Shows every step on a live bar; without one, a line for every `log_every` steps.

    Steps are shown as the number done so far, from 1 to `num_steps`.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        first_step: int,
        log_every: int,
        live: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Begin at `first_step`.

        Args:
            num_steps: steps of the whole run.
            first_step: steps that earlier processes have done.
            log_every: steps between lines; ignored by the bar.
            live: show the bar; None = where `stream` is a terminal.
            stream: where to write; None = standard error.
        """
        self._stream = sys.stderr if stream is None else stream
        self._num_steps = num_steps
        self._log_every = log_every
        self._seconds_per_step: float | None = None
        self._bar: tqdm | None = None
        if self._stream.isatty() if live is None else live:
            self._bar = tqdm(
                total=num_steps,
                initial=first_step,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed} done, {remaining} left  {desc}",
            )

    def step(self, record: StepRecord, *, tokens_per_s: float, mfu: float) -> None:
        """Show a step."""
        done, text = record.step + 1, describe(record, tokens_per_s, mfu)
        old = self._seconds_per_step
        new = record.seconds
        self._seconds_per_step = new if old is None else 0.9 * old + 0.1 * new
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif done % self._log_every == 0 or done in (1, self._num_steps):
            left = tqdm.format_interval(int(self._seconds_per_step * (self._num_steps - done)))
            self.message(f"step {done}/{self._num_steps}  {text}  {left} left")

    def evaluation(self, done: int, loss: float) -> None:
        """Show a loss on the held-out split, computed after `done` steps."""
        self.message(f"step {done}/{self._num_steps}  eval loss {loss:.4f}")

    def sample(self, done: int, text: str) -> None:
        """Show text that the model wrote after `done` steps."""
        self.message(f"step {done}/{self._num_steps}  the model writes:\n{text}\n")

    def message(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
