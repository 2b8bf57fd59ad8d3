"""A lost member's data and parity, made again of what the others of its group hold.

What the others give is in `neighbours`. Torch-free.
"""

import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from phalanx.checkpoint.erasure.codec import Codec
from phalanx.checkpoint.holder.inventory import COMMITTED
from phalanx.checkpoint.holder.memory import check_free
from phalanx.checkpoint.holder.server.slots import (
    Generation,
    Member,
    Slot,
    combined,
    digest_of,
    part_digests_of,
)
from phalanx.checkpoint.holder.spec import HolderError, Spec
from phalanx.checkpoint.holder.transport import (
    CHUNK_BYTES,
    FETCH,
    PEER_LIMIT,
    Address,
    dial,
    receive,
    receive_into,
    send,
)

logger = logging.getLogger(__name__)


def rebuild(
    spec: Spec,
    number: int,
    step: int,
    *,
    meta: Any,
    digests: Sequence[int],
    sources: Mapping[int, Address],
) -> Member:
    """A member as it was when `step` was committed, with memory for that slot alone.

    Args:
        meta, digests: those that the snapshot was committed with.
        sources: the holder of each member of the group that is left; k of them are enough, and one
            that fails on the way is left out.

    Raises:
        HolderError: too few are left, or what they gave does not have the member's digest.
    """
    member = Member(spec, number)
    left = {other: sources[other] for other in member.peers if other in sources}
    check_free(member.slot_bytes, f"member {number}'s snapshot, to be rebuilt")
    reasons: list[str] = []
    while True:
        if not spec.parity or len(left) < member.stripes.k:
            raise HolderError(
                f"member {number} of step {step} cannot be rebuilt: {member.stripes.k} of the "
                f"{len(member.group)} members {member.group} are needed, with {spec.parity} of "
                f"parity; there are {sorted(left)}" + "".join(f"; {reason}" for reason in reasons)
            )
        try:
            slot = _rebuilt(member, step, left)
            break
        except _LostError as lost:
            logger.warning("rebuilding member %d: %s", number, lost)
            reasons.append(str(lost))
            del left[lost.member]
    part_digests = part_digests_of(slot)
    if combined(part_digests.values()) != digests[number]:
        raise HolderError(
            f"member {number} of step {step}, rebuilt from members {sorted(left)}, does not have "
            f"its digest {digests[number]:016x}"
        )
    generation = slot.generation = Generation(slot, step, ranks=member.ranks)
    generation.part_digests = part_digests
    generation.parity_digest = digest_of(slot.parity.view)
    generation.state = COMMITTED
    generation.digests, generation.meta = list(digests), meta
    return member


class _LostError(Exception):
    """A source gives nothing more."""

    def __init__(self, member: int, why: object) -> None:
        super().__init__(f"member {member}: {why}")
        self.member = member


class _Source:
    """A member that is left, at its holder."""

    def __init__(self, member: int, sock: socket.socket, *, place: int, step: int) -> None:
        self.place = place
        self._member, self._sock, self._step = member, sock, step
        self._left = 0

    def seek(self) -> None:
        """Ask for the slot that has the step; `found` hears it."""
        self._ask({"slot": [self._member, self._step]})

    def found(self) -> int:
        """Hear which slot has the step; the parity in it was compared with its digest."""
        return int(self._answer()["slot"])

    def begin(self, kind: str, unit: int, most: int) -> None:
        """Ask for the first `most` bytes of a unit; `into` receives them."""
        self._ask({"unit": [self._member, self._step, kind, unit, most]})

    def begun(self) -> None:
        """Hear how many bytes there are."""
        self._left = int(self._answer()["bytes"])

    def into(self, view: memoryview) -> bool:
        """Receive the next bytes, zeros behind the end; False where all would be zeros."""
        count = min(self._left, len(view))
        if not count:
            return False
        try:
            receive_into(self._sock, view[:count])
        except OSError as error:
            raise _LostError(self._member, error) from None
        self._left -= count
        view[count:] = bytes(len(view) - count)
        return True

    def _ask(self, request: Mapping[str, Any]) -> None:
        try:
            send(self._sock, request)
        except OSError as error:
            raise _LostError(self._member, error) from None

    def _answer(self) -> dict[str, Any]:
        try:
            answer, _ = receive(self._sock, limit=PEER_LIMIT)
        except OSError as error:
            raise _LostError(self._member, error) from None
        if "error" in answer:
            raise _LostError(self._member, answer["error"])
        return answer


def _rebuilt(member: Member, step: int, sources: Mapping[int, Address]) -> Slot:
    """The member's memory, from these sources.

    Raises:
        _LostError: one of them failed.
        HolderError: there is too little memory.
    """
    with ExitStack() as stack:
        connected: list[_Source] = []
        for other, address in sources.items():
            greeting = {"epoch": member.spec.epoch, "token": member.spec.token, "role": FETCH}
            try:
                sock = stack.enter_context(dial(address, greeting, patience_s=0))
            except OSError as error:
                raise _LostError(other, error) from None
            place = member.group.index(other)
            connected.append(_Source(other, sock, place=place, step=step))
        for source in connected:  # all of them at a time: each looks through its parity
            source.seek()
        number = max(source.found() for source in connected)
        try:
            slot = member.allocate(number, populate=True)
        except MemoryError as error:
            raise HolderError(str(error)) from None
        try:
            codec = Codec(member.stripes.k, member.stripes.m)
            for stripe in range(member.stripes.n):
                _rebuild_unit(member, slot, stripe, connected, codec)
        except BaseException:
            member.free(number)
            raise
        return slot


def _rebuild_unit(
    member: Member, slot: Slot, stripe: int, sources: Sequence[_Source], codec: Codec
) -> None:
    """The member's unit of one stripe."""
    stripes = member.stripes
    role = (member.place - stripe) % stripes.n
    begin, end = 0, stripes.unit_bytes
    if role >= stripes.m:
        begin, end = stripes.data_range(role - stripes.m, member.length)
    size = end - begin
    if not size:
        return
    roles = {(source.place - stripe) % stripes.n: source for source in sources}
    used = sorted(roles, key=lambda role: _in_codec(role, codec))[: stripes.k]  # data first
    for other in used:
        is_data = other >= stripes.m
        unit = other - stripes.m if is_data else other
        roles[other].begin("data" if is_data else "parity", unit, size)
    for other in used:
        roles[other].begun()
    buffers = {other: memoryview(bytearray(CHUNK_BYTES)) for other in (*used, role)}
    for at in range(0, size, CHUNK_BYTES):
        count = min(CHUNK_BYTES, size - at)
        present = {
            _in_codec(other, codec): buffers[other][:count]
            if roles[other].into(buffers[other][:count])
            else None
            for other in used
        }
        made = buffers[role][:count]
        codec.rebuild(present, {_in_codec(role, codec): made})
        if role < stripes.m:
            target = member.parity_chunk(slot, role, at)
            target[:] = made
            slot.zero[member.chunk_number(role, at)] = 0
            continue
        for view in member.views(slot, begin + at, begin + at + count):
            view[:] = made[: len(view)]
            made = made[len(view) :]


def _in_codec(role: int, codec: Codec) -> int:
    """The codec's number of a stripe's role: it counts data first."""
    return codec.k + role if role < codec.m else role - codec.m
