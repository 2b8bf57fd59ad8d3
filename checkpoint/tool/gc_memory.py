"""`phalanx checkpoint gc --memory`: end holders of a run that outlived it, and free their memory.

A run that is in use keeps all its holders, and so does one that may just be starting: between two
of its connections a holder looks as if it were left alone.
"""

from dataclasses import dataclass

from phalanx.checkpoint.holder_client import HolderClient, HolderError, HolderGone
from phalanx.checkpoint.tool.memory import Holder, holders
from phalanx.checkpoint.tool.places import Place
from phalanx.checkpoint.tool.report import Report, columns, plural, size

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


def gc_memory(place: Place, *, dry_run: bool = False) -> Report:
    """End the holders of a place's run on this machine; what they hold is lost.

    Not fine: the run is in use, or a holder does not answer.

    Raises:
        ValueError: the place is one checkpoint, or its job.json is damaged.
        OSError: the storage cannot be read.
    """
    if place.folder is not None:
        raise ValueError(f"{place.text}: is one checkpoint; give the folder that holds it")
    found, silent = holders(place.storage)
    items = [_look(holder) for holder in found]
    in_use = {item.holder.job: item.holder.node for item in items if item.kept}
    for item in items:
        if item.kept is None and item.holder.job in in_use:
            item.kept = f"its run is in use, see node {in_use[item.holder.job]}"
        if item.kept is None and not dry_run:
            item.kept = _end(item.holder)
    return _report(place, items, silent, dry_run=dry_run)


def _look(holder: Holder) -> _Item:
    taken = sum(epoch["taken"] for epoch in holder.inventory["epochs"])
    try:
        with HolderClient.connect(holder.job, holder.node) as client:
            why = client.in_use(QUIET_S)
    except HolderGone:  # it has just ended by itself
        why = None
    return _Item(holder=holder, bytes=taken, kept=why)


def _end(holder: Holder) -> str | None:
    """End a holder; why not, where it is used again."""
    try:
        with HolderClient.connect(holder.job, holder.node) as client:
            client.retire(QUIET_S)
    except HolderGone:
        return None
    except HolderError as error:
        return str(error)
    return None


def _report(place: Place, items: list[_Item], silent: list[str], *, dry_run: bool) -> Report:
    verb = "would end" if dry_run else "ended"
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
    lines += [f"  {line}" for line in columns(rows, right=(2,))] + silent
    lines.append(told + ("to free" if dry_run else "freed"))
    content = {
        "url": place.storage.url,
        "dry_run": dry_run,
        "holders": [
            {
                "job": item.holder.job,
                "node": item.holder.node,
                "pid": item.holder.inventory["pid"],
                "bytes": item.bytes,
                "kept": item.kept is not None,
                "why": item.kept,
            }
            for item in items
        ],
        "freed": 0 if dry_run else freed,
        "silent": silent,
    }
    return Report(lines=lines, content=content, fine=len(gone) == len(items) and not silent)
