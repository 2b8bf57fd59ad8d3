"""`phalanx checkpoint gc --memory`: end holders of a run that outlived it, and free their memory.

A run that is in use keeps all its holders, and so does one that may just be starting: between two
of its connections a holder looks as if it were left alone. So does one with a holder that does not
answer: nobody knows.
"""

from dataclasses import dataclass

from phalanx.checkpoint.holder.client import HolderClient, HolderError, HolderGone, HolderSilent
from phalanx.checkpoint.tool.holders import PATIENCE_S, Asked, Holder, holders
from phalanx.checkpoint.tool.places import CheckpointPlace
from phalanx.checkpoint.tool.report import Outcome, columns, plural, size

QUIET_S = 30.0
"""Seconds without a rank after which a run counts as gone."""


@dataclass(kw_only=True)
class _Item:
    """A holder, and what becomes of it."""

    holder: Holder
    bytes: int
    """Of memory that ends with it."""
    kept: str | None
    """Why it stays."""


def gc_memory(place: CheckpointPlace, *, dry_run: bool = False) -> Outcome:
    """End the holders of a place's run on this machine; what they hold is lost.

    Not fine: the run is in use, or a holder does not answer.

    Raises:
        ValueError: the place is one checkpoint, or its job.json is damaged.
        OSError: the storage cannot be read.
    """
    if place.folder is not None:
        raise ValueError(f"{place.text}: is one checkpoint; give the folder that holds it")
    asked = holders(place.storage)
    items = [_look(holder) for holder in asked.found]
    why = {silent.job: f"node {silent.node} does not answer" for silent in asked.silent}
    for item in items:
        _spread(item, why)
    for item in items:
        if item.kept is None:
            item.kept = why.get(item.holder.job)
        if item.kept is None and not dry_run:
            item.kept = _end(item.holder)
            _spread(item, why)
    return _outcome(place, items, asked, dry_run=dry_run)


def _spread(item: _Item, why: dict[str, str]) -> None:
    """Where a holder stays, all of its job stay; `why` by job."""
    if item.kept is not None:
        why.setdefault(item.holder.job, f"its run is in use, see node {item.holder.node}")


def _look(holder: Holder) -> _Item:
    try:
        with HolderClient.connect(holder.job, holder.node, still_s=PATIENCE_S) as client:
            why = client.in_use(QUIET_S)
    except HolderSilent as error:
        why = f"it does not answer: {error}"
    except HolderGone:  # it has just ended by itself
        why = None
    return _Item(holder=holder, bytes=holder.inventory.taken, kept=why)


def _end(holder: Holder) -> str | None:
    """End a holder; why not, where it is used again. A large one takes its time to be gone."""
    try:
        with HolderClient.connect(holder.job, holder.node) as client:
            client.retire(QUIET_S)
    except HolderSilent as error:
        return f"it does not answer: {error}"
    except HolderGone:
        return None
    except HolderError as error:
        return str(error)
    return None


def _unknown(asked: Asked) -> list[str]:
    """What to say where no holder knows the place: its name may be misspelled."""
    if asked.found or asked.silent:
        return []
    lines = ["  no holder on this machine knows this place"]
    lines += ["  what others know:"] * bool(asked.others)
    return lines + [f"    {other}" for other in sorted(asked.others)]


def _outcome(place: CheckpointPlace, items: list[_Item], asked: Asked, *, dry_run: bool) -> Outcome:
    verb = "would end" if dry_run else "ended"
    silent = [silent.text for silent in asked.silent]
    rows = [
        (
            f"job {item.holder.job}",
            f"node {item.holder.node}",
            size(item.bytes),
            f"kept: {item.kept}" if item.kept else verb,
        )
        for item in items
    ]
    gone = [item for item in items if item.kept is None]
    freed = sum(item.bytes for item in gone)
    told = f"{plural(len(gone), 'holder')} {'to end' if dry_run else 'ended'}, {size(freed)} "
    lines = [f"{place.storage.url}, in this machine's memory"]
    lines += [f"  {line}" for line in columns(rows, right=(2,))]
    lines += [*silent, *_unknown(asked)]
    lines.append(told + ("to free" if dry_run else "freed"))
    content = {
        "url": place.storage.url,
        "dry_run": dry_run,
        "holders": [
            {
                "job": item.holder.job,
                "node": item.holder.node,
                "pid": item.holder.inventory.pid,
                "bytes": item.bytes,
                "kept": item.kept is not None,
                "why": item.kept,
            }
            for item in items
        ],
        "freed": 0 if dry_run else freed,
        "silent": silent,
        "others": sorted(asked.others),
    }
    return Outcome(lines=lines, content=content, fine=len(gone) == len(items) and not silent)
