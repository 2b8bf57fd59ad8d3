"""What this user's holders on this machine have in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from phalanx.checkpoint.format import PartTable
from phalanx.checkpoint.holder_client import HolderClient, HolderError, HolderGone, find_holders
from phalanx.checkpoint.tool.report import protection


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A snapshot that a holder on this machine has some of."""

    job: str
    node: int
    step: int
    state: str
    """committed, complete (waits for the other nodes) or filling."""
    time: float | None
    bytes: int
    """Of the data that this holder has of it; parity comes on top."""
    layout: str
    protection: str
    members: tuple[int, ...]
    """Places in the job whose data this holder has."""


def in_memory(job: str | None = None) -> tuple[list[InMemory], list[str]]:
    """What this user's holders on this machine have, and which did not answer.

    Args:
        job: of this job alone; None = of all.
    """
    found: list[InMemory] = []
    silent: list[str] = []
    for name, node in find_holders():
        if job not in (None, name):
            continue
        try:
            with HolderClient.connect(name, node) as client:
                found += _of_holder(name, node, client.inventory())
        except (HolderGone, HolderError) as error:
            silent.append(f"the holder of job {name}, node {node} does not answer: {error}")
    return found, silent


def _of_holder(job: str, node: int, inventory: dict[str, Any]) -> Iterator[InMemory]:
    for epoch in inventory["epochs"]:
        spec = epoch["spec"]
        sizes = [PartTable.from_json(rows).nbytes for rows in spec["parts"]]
        by_step: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for member, held in epoch["members"].items():
            for slot in held["slots"]:
                if slot["state"] != "empty":
                    by_step.setdefault(int(slot["step"]), []).append((int(member), slot))
        for step, slots in sorted(by_step.items()):
            meta: dict[str, Any] = next((slot["meta"] for _, slot in slots if slot.get("meta")), {})
            degrees = meta.get("layout") or {}
            yield InMemory(
                job=job,
                node=node,
                step=step,
                state=" and ".join(sorted({slot["state"] for _, slot in slots})),
                time=meta.get("time"),
                bytes=sum(
                    sizes[rank] for member, _ in slots for rank in spec["nodes"][member]["ranks"]
                ),
                layout=",".join(f"{axis}={n}" for axis, n in degrees.items() if n != 1) or "-",
                protection=protection(spec["groups"], spec["parity"]),
                members=tuple(sorted(member for member, _ in slots)),
            )
