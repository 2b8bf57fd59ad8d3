"""This user's holders on this machine, and what they have in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from phalanx.checkpoint.format.job import directory_of, read_job
from phalanx.checkpoint.holder.client import HolderClient, HolderError, HolderGone, HolderSilent
from phalanx.checkpoint.holder.inventory import EpochInventory, Inventory, SlotInventory
from phalanx.checkpoint.holder.start import find_holders
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.tool.places import INSIDE_RUN
from phalanx.checkpoint.tool.report import protection

PATIENCE_S = 3.0
"""Seconds that a holder may say nothing, and then again, before it counts as silent."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """One that answered."""

    job: str
    node: int
    directory: str
    """Where its run saves; "" = unknown."""
    forgotten: bool
    """Whether that place's job.json no longer names the job, so that no start finds it."""
    inventory: Inventory


@dataclass(frozen=True, kw_only=True)
class Silent:
    """One that is there and did not answer, or not so that it is understood."""

    job: str
    node: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of asking the holders of a run, or of all runs."""

    found: list[Holder] = field(default_factory=list)
    silent: list[Silent] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    """Places that the holders of other runs know; or what to say of one that did not answer."""


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A snapshot that a holder on this machine has some of, or a holder without any."""

    directory: str
    """Where the run saves; "" = unknown."""
    job: str
    node: int
    forgotten: bool
    """See Holder."""
    step: int | None = None
    """None = the holder has no snapshot."""
    state: str = "none"
    """committed, complete (waits for the other nodes), filling or damaged."""
    time: float | None = None
    bytes: int = 0
    """Of the data that this holder has of it; parity comes on top."""
    layout: str = "-"
    protection: str = "-"
    members: tuple[int, ...] = ()
    """Places in the job whose data this holder has."""


def holders(storage: Storage | None = None) -> Asked:
    """Ask this user's holders on this machine.

    Args:
        storage: of the run that saves there alone, by its name, or by the place where it has
            forgotten that (a run's folder that is gone stands for its checkpoints'); None = of all
            runs.

    Raises:
        ValueError: the run's job.json is damaged.
        OSError: the storage cannot be read.
    """
    job = None if storage is None else read_job(storage)
    place = "" if storage is None else directory_of(storage)
    places = (place, f"{place}/{INSIDE_RUN}")
    asked = Asked()
    for name, node in find_holders():
        try:
            with HolderClient.connect(name, node, still_s=PATIENCE_S) as client:
                directory = client.directory()
                if storage is not None and name != job and directory not in places:
                    asked.others.update({directory} - {""})
                    continue
                holder = Holder(
                    job=name,
                    node=node,
                    directory=directory,
                    forgotten=storage is not None and name != job,
                    inventory=client.inventory(),
                )
                asked.found.append(holder)
        except (HolderSilent, HolderError) as error:
            verb = "does not answer" if isinstance(error, HolderSilent) else "cannot be asked"
            text = f"the holder of job {name}, node {node} {verb}: {error}"
            if storage is None or name == job:
                asked.silent.append(Silent(job=name, node=node, text=text))
            else:
                asked.others.add(text)
        except HolderGone:  # it has just ended
            pass
    return asked


def in_memory(storage: Storage | None = None) -> tuple[list[InMemory], list[str]]:
    """What holders have, and what to say of those that did not answer; see `holders`."""
    asked = holders(storage)
    items = [item for holder in asked.found for item in _of_holder(holder)]
    return items, [silent.text for silent in asked.silent]


def _of_holder(holder: Holder) -> list[InMemory]:
    none = InMemory(
        directory=holder.directory, job=holder.job, node=holder.node, forgotten=holder.forgotten
    )
    epochs = holder.inventory.epochs
    return [item for epoch in epochs for item in _of_epoch(epoch, none)] or [none]


def _of_epoch(epoch: EpochInventory, none: InMemory) -> Iterator[InMemory]:
    """What is to be said of each snapshot in it; `none`: of the holder."""
    spec = epoch.spec
    by_step: dict[int, list[tuple[int, SlotInventory]]] = {}
    for member, held in epoch.members.items():
        for slot in held:
            if slot.step is not None:
                by_step.setdefault(slot.step, []).append((member, slot))
    for step, slots in sorted(by_step.items()):
        meta: dict[str, Any] = next((slot.meta for _, slot in slots if slot.meta), {})
        degrees = meta.get("layout") or {}
        yield replace(
            none,
            step=step,
            state=" and ".join(sorted({slot.state for _, slot in slots})),
            time=meta.get("time"),
            bytes=sum(spec.length(member) for member, _ in slots),
            layout=",".join(f"{axis}={n}" for axis, n in degrees.items() if n != 1) or "-",
            protection=protection(spec.groups, spec.parity),
            members=tuple(sorted(member for member, _ in slots)),
        )
