"""Optimizer steps that do not wait for the whole pipeline, checked once it has spoken.

Qi et al., Zero Bubble Pipeline Parallelism, section 4 ("Bypassing optimizer synchronizations"). A
pipeline rank steps on the loss and norm of the ranks up to itself: not at all where they are not
finite or the norm is above the clipping limit already, else unclipped. It learns of all ranks
before the next step's first backward, and takes its step back where that was wrong.
"""

from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from typing import NamedTuple

from torch import Tensor, nn

from phalanx.parallel.grad_norm import clip_gradients
from phalanx.parallel.mesh import Mesh
from phalanx.parallel.pipeline.prefix import PrefixSums
from phalanx.train.engine.gradients import Gradients
from phalanx.train.optim.adamw import AdamW


class Action(Enum):
    """What the optimizer does with a step's gradients."""

    skip = "skip"
    """Nothing: they are not finite, or, on a prefix, the clipping factor is not known."""
    plain = "plain"
    """Steps with them as they are."""
    clipped = "clipped"
    """Steps with them scaled down to the limit."""


def right_action(gradients: Gradients, max_norm: float) -> Action:
    """What to do with gradients over all ranks; `max_norm` 0 = never clip."""
    if not gradients.finite:
        return Action.skip
    return Action.clipped if 0 < max_norm < gradients.norm else Action.plain


class _Pending(NamedTuple):
    """A step that was taken, or not, on a prefix."""

    action: Action
    num_tokens: int
    lr: float


class PostValidation:
    """Eager steps of one rank's optimizer, at most one of them unchecked.

    The gradients stay in place from a step to its check, since undoing it needs them; the next
    backward must not begin before.
    """

    def __init__(
        self,
        mesh: Mesh,
        optimizer: AdamW,
        parameters: Mapping[str, nn.Parameter],
        *,
        max_norm: float,
        timeout: timedelta,
    ) -> None:
        """Collective over all ranks. `max_norm`: as in `right_action`."""
        self._sums = PrefixSums(mesh, timeout=timeout)
        self._optimizer = optimizer
        self._parameters = parameters
        self._max_norm = max_norm
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a step waits for its check."""
        return self._pending is not None

    def prefix(self, values: list[float | Tensor], num_tokens: int) -> Gradients:
        """This rank's loss, squared norms and stop request over the ranks up to this one."""
        return Gradients.of(self._sums.prefix(values), num_tokens)

    def step(self, prefix: Gradients, lr: float) -> None:
        """Do what the prefix asks for; on the last pipeline rank, which knows all, what is right.

        Every parallel rank of a place in the pipeline does the same.
        """
        action = right_action(prefix, self._max_norm)
        if action is Action.clipped and not self._sums.is_last:
            action = Action.skip
        self._do(action, prefix.norm, lr)
        self._pending = _Pending(action, prefix.num_tokens, lr)

    def check(self) -> tuple[Gradients, Action]:
        """Make the pending step right, waiting for the last pipeline rank: the step over all ranks,
        and what was right, both the same on every rank.

        After `skip` parameters are those before the step and the gradients stay; else they are
        freed.
        """
        assert self._pending is not None, "no step to check"
        pending, self._pending = self._pending, None
        whole = Gradients.of(self._sums.whole(), pending.num_tokens)
        right = right_action(whole, self._max_norm)
        if right is not pending.action:
            if pending.action is Action.plain:
                self._optimizer.rollback(pending.lr)
            self._do(right, whole.norm, pending.lr)
        if right is not Action.skip:
            self._optimizer.drop_gradients()
        return whole, right

    def _do(self, action: Action, norm: float, lr: float) -> None:
        if action is Action.skip:
            return
        if action is Action.clipped:
            clip_gradients(self._parameters.values(), norm, self._max_norm)
        self._optimizer.step(lr, keep_gradients=True)
