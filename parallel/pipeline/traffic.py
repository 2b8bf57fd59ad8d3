"""What the stages of a pipeline send each other under a schedule, and in which order.

Torch-free. Every rank knows every rank's order, so a receiver knows what comes next on each channel
(one sender, one receiver): the sender's results, in the sender's order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phalanx.parallel.pipeline.graph import Kind, Op

Channel = tuple[int, int]
"""Ranks that send and receive."""


class Message(NamedTuple):
    """Something on its way to the stage that needs it, on another rank or on the same."""

    kind: Kind
    """F: the activation that this stage's forward takes; B: the gradient of its output."""
    stage: int
    """Where it goes."""
    microbatch: int


def needed_by(op: Op, num_stages: int) -> Message | None:
    """What an operation waits for; None: nothing from another stage."""
    if op.kind is Kind.W:
        return None
    if op.kind is Kind.F:
        return Message(Kind.F, op.stage, op.microbatch) if op.stage > 0 else None
    return Message(Kind.B, op.stage, op.microbatch) if op.stage < num_stages - 1 else None


def result_of(op: Op, num_stages: int) -> Message | None:
    """What an operation's result is to another stage; None: nothing."""
    if op.kind is Kind.W:
        return None
    if op.kind is Kind.F:
        after = op.stage + 1
        return Message(Kind.F, after, op.microbatch) if after < num_stages else None
    return Message(Kind.B, op.stage - 1, op.microbatch) if op.stage > 0 else None


def channels_of(placement: Sequence[int]) -> list[Channel]:
    """Every pair of ranks that neighbouring stages lie on, in either direction, in order."""
    pairs = {
        pair
        for this, after in zip(placement, placement[1:], strict=False)
        if this != after
        for pair in ((this, after), (after, this))
    }
    return sorted(pairs)


@dataclass(frozen=True)
class Traffic:
    """Messages of one step, as one rank sees them."""

    incoming: dict[int, list[Message]]
    """By sending rank, in the order in which they come."""
    reach: list[dict[int, int]]
    """By place in this rank's order and sending rank: how many messages of that sender must have
    come for the operation to run."""


def traffic(placement: Sequence[int], orders: Sequence[Iterable[Op]], rank: int) -> Traffic:
    """What comes to `rank` when every rank runs its order."""
    num_stages = len(placement)
    incoming: dict[int, list[Message]] = {
        sender: [] for sender, receiver in channels_of(placement) if receiver == rank
    }
    for sender, order in enumerate(orders):
        for message in sent_by(order, placement):
            if placement[message.stage] == rank != sender:
                incoming[sender].append(message)
    number = {
        message: (sender, count)
        for sender, messages in incoming.items()
        for count, message in enumerate(messages, start=1)
    }
    reach: list[dict[int, int]] = []
    for op in orders[rank]:
        wanted = needed_by(op, num_stages)
        found = number.get(wanted) if wanted is not None else None
        reach.append({} if found is None else {found[0]: found[1]})
    return Traffic(incoming, reach)


def sent_by(order: Iterable[Op], placement: Sequence[int]) -> list[Message]:
    """Results of an order's operations, those for the same rank too."""
    results = (result_of(op, len(placement)) for op in order)
    return [message for message in results if message is not None]
