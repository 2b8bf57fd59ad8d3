"""Sends and receives between pipeline stages, beside the computation.

A channel has one sender, one receiver and a process group of its own: on NCCL a communicator and a
stream, so that nothing ever waits behind a message of another channel or the other direction.
Receives are posted some operations ahead; sends are never waited for within a step. All messages
have one shape, agreed on beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from phalanx.parallel.comm_meter import CommMeter
from phalanx.parallel.pipeline.graph import Kind
from phalanx.parallel.pipeline.traffic import Channel, Message, Traffic, channels_of

AHEAD = 4
"""Operations before its own that a receive is posted: enough for a message to be there by then,
few enough that waiting buffers take little memory."""


class Channels:
    """One pipeline rank's ends of its channels, and what passes between stages of its own."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        placement: Sequence[int],
        device: torch.device,
        meter: CommMeter,
    ) -> None:
        """Make the channels' process groups; collective over `group`, the pipeline ranks."""
        self._meter = meter
        self.rank = group.rank()
        self.placement = tuple(placement)
        self.device = device
        self._members = dist.get_process_group_ranks(group)
        self._groups = _groups(group, channels_of(placement))
        self._inboxes: dict[int, _Inbox] = {}
        self._reach: list[dict[int, int]] = []
        self._local: dict[Message, Tensor] = {}
        self._sending: dict[Message, _Transfer] = {}
        self._void: list[_Transfer] = []

    def begin(self, traffic: Traffic, boundary: Tensor) -> None:
        """Start a step; every message is like `boundary` (shape and dtype)."""
        assert not self._inboxes, "the step before has not ended"
        self._reach = traffic.reach
        self._inboxes = {
            sender: _Inbox(
                self._groups[sender, self.rank],
                self._members[sender],
                messages,
                boundary,
                self.device,
            )
            for sender, messages in traffic.incoming.items()
        }

    def advance(self, place: int) -> None:
        """Post the receives of the operations from `place` in the order to AHEAD after it."""
        for reach in self._reach[place : place + AHEAD + 1]:
            for sender, count in reach.items():
                self._inboxes[sender].post(count)

    def receive(self, message: Message) -> Tensor:
        """The tensor of a message, a leaf without a gradient; on CUDA the current stream waits."""
        if message in self._local:
            return self._local.pop(message)
        kind, stage, microbatch = message
        sender = self.placement[stage - 1 if kind is Kind.F else stage + 1]
        tensor = self._inboxes[sender].take(message)
        if kind is Kind.B:  # who answers has received
            self._settle(Message(Kind.F, stage + 1, microbatch))
        return tensor

    def send(self, message: Message, tensor: Tensor) -> None:
        """Pass a result on without waiting."""
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
        tensor = tensor.detach()
        receiver = self.placement[message.stage]
        if receiver == self.rank:
            self._local[message] = tensor
            return
        tensor = tensor.contiguous()
        self._meter.sent("pipeline", self._members[receiver], tensor.nbytes)
        work = dist.isend(tensor, self._members[receiver], group=self._groups[self.rank, receiver])
        assert work is not None
        while self._sending:  # gloo does not say before it is waited for
            oldest, transfer = next(iter(self._sending.items()))
            if not transfer.work.is_completed():
                break
            del self._sending[oldest]
        self._sending[message] = _Transfer(tensor, work)

    def restart(self, void: dict[int, int]) -> None:
        """Begin the step anew: the first `void[sender]` messages of every sender are discarded."""
        self._local.clear()
        self._void += self._sending.values()
        self._sending.clear()
        for sender, inbox in self._inboxes.items():
            inbox.restart(void.get(sender, 0))

    def end(self) -> None:
        """Finish the step: everything has been received, and what was sent may be freed."""
        assert not self._local, f"never used: {list(self._local)}"
        for inbox in self._inboxes.values():
            inbox.end()
        for transfer in (*self._void, *self._sending.values()):
            transfer.work.wait()
        self._inboxes = {}
        self._sending.clear()
        self._void.clear()

    def _settle(self, message: Message) -> None:
        """Free what was sent; its receiver is known to have it."""
        transfer = self._sending.pop(message, None)
        if transfer is not None:
            transfer.work.wait()


@dataclass(frozen=True)
class _Transfer:
    """A tensor under way; kept until then, since another stream reads or writes it."""

    tensor: Tensor
    work: dist.Work


@dataclass
class _Inbox:
    """The receiving end of a channel; messages are numbered in the order in which they come."""

    group: dist.ProcessGroup
    sender: int
    """World's rank."""
    messages: list[Message]
    like: Tensor
    device: torch.device
    first: int = 0
    """Number of the first message that counts; those before belong to a discarded attempt."""
    posted: int = 0
    arriving: dict[int, _Transfer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number = {message: number for number, message in enumerate(self.messages)}

    def post(self, count: int) -> None:
        """Have the receives of the first `count` messages that count under way."""
        while self.posted < self.first + count:
            buffer = torch.empty(self.like.shape, dtype=self.like.dtype, device=self.device)
            work = dist.irecv(buffer, self.sender, group=self.group)
            assert work is not None
            self.arriving[self.posted] = _Transfer(buffer, work)
            self.posted += 1

    def take(self, message: Message) -> Tensor:
        """Wait for a message."""
        transfer = self.arriving.pop(self.first + self.number[message])
        transfer.work.wait()
        return transfer.tensor

    def restart(self, void: int) -> None:
        """Discard the first `void` messages, received or not; the same ones follow once more."""
        assert self.first == 0, "a step restarts once"
        self.post(void)
        for number in [n for n in self.arriving if n < void]:
            self.arriving.pop(number).work.wait()
        self.first = void

    def end(self) -> None:
        """Nothing is left over."""
        assert self.posted == self.first + len(self.messages), "messages that nobody asked for"
        assert not self.arriving, "messages that nobody took"


def _groups(
    group: dist.ProcessGroup, channels: Sequence[Channel]
) -> dict[Channel, dist.ProcessGroup]:
    """A process group for each channel that this rank is an end of; collective over `group`."""
    rank, members = group.rank(), dist.get_process_group_ranks(group)
    world = dist.group.WORLD
    assert world is not None
    # With a communicator bound to its device, new_group splits it, and every rank of the world
    # would have to take part; splitting the pipeline's own group takes its ranks only.
    bound = world.bound_device_id is not None
    groups: dict[Channel, dist.ProcessGroup] = {}
    for pairs in _rounds(channels):
        busy = {end for pair in pairs for end in pair}
        # torch names a group by how many its ranks have made before, so all have to make one.
        alone = [(other,) for other in range(len(members)) if other not in busy]
        mine = next(part for part in (*pairs, *alone) if rank in part)
        if bound:
            parts = [sorted(part) for part in (*pairs, *alone)]
            made = dist.split_group(group, parts, group_desc="pipeline channel")
        else:
            made = dist.new_group(
                [members[end] for end in mine],
                use_local_synchronization=True,
                group_desc="pipeline channel",
            )
        assert made is not None
        if len(mine) == 2:
            groups[mine] = made
    return groups


def _rounds(channels: Sequence[Channel]) -> list[list[Channel]]:
    """The channels in rounds in which no rank comes twice."""
    rounds: list[list[Channel]] = []
    for channel in channels:
        for pairs in rounds:
            if not any(end in pair for pair in pairs for end in channel):
                pairs.append(channel)
                break
        else:
            rounds.append([channel])
    return rounds
