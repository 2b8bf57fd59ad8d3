"""`phalanx checkpoint ls`: what stands in a folder and in this machine's memory, and in what state.

Of files only the sizes are looked at; contents are `verify`'s.
"""

from phalanx.checkpoint.tool.holders import InMemory, in_memory
from phalanx.checkpoint.tool.places import CheckpointPlace
from phalanx.checkpoint.tool.report import (
    Outcome,
    age,
    columns,
    layout_of,
    plural,
    protection_of,
    size,
)
from phalanx.checkpoint.tool.state import BROKEN, Listed, look


def ls(place: CheckpointPlace | None) -> Outcome:
    """What stands at a place, and what holders here have of its run; without a place, of all runs.

    Not fine: a checkpoint is broken, or a holder does not answer.

    Raises:
        ValueError: the place's job.json is damaged.
        OSError: the storage cannot be read.
    """
    listed: list[Listed] = []
    lines: list[str] = []
    if place is not None:
        listed = [look(place.storage, folder) for folder in place.folders()]
        table = _table(listed) if listed else ["  no checkpoints yet"]
        lines += [place.storage.url, *table]
    memory, silent = in_memory(None if place is None else place.storage)
    if memory:
        lines += [*([""] if lines else []), "in this machine's memory", *_memory_table(memory)]
    elif place is None and not silent:
        lines.append("no snapshot in this machine's memory")
    lines += silent
    return Outcome(
        lines=lines,
        content={
            "url": None if place is None else place.storage.url,
            "checkpoints": [item.content() for item in listed],
            "memory": [vars(item) | {"members": list(item.members)} for item in memory],
            "silent": silent,
        },
        fine=not silent and not any(item.state == BROKEN for item in listed),
    )


def _table(listed: list[Listed]) -> list[str]:
    rows = [("step", "age", "size", "files", "layout", "protection", "state")]
    for item in listed:
        manifest = item.manifest
        kind = "" if manifest is None else str(manifest.meta.get("kind", ""))
        state = item.state + (f" ({kind})" if kind == "weights" else "")
        if manifest is None:
            known = ("-", "-", "-", "-", "-")
        else:
            known = (
                age(manifest.time),
                size(manifest.nbytes),
                str(len(manifest.files)),
                layout_of(manifest),
                protection_of(manifest),
            )
        name = str(item.step) if item.folder == f"step_{item.step:08d}" else item.folder
        rows.append((name, *known, f"{state}: {item.reason}" if item.reason else state))
    return [f"  {line}" for line in columns(rows, right=(0, 1, 2, 3))]


def _memory_table(memory: list[InMemory]) -> list[str]:
    rows = [("step", "age", "size", "job", "node", "layout", "protection", "state", "of")]
    rows += [
        (
            "-" if item.step is None else str(item.step),
            age(item.time),
            size(item.bytes),
            item.job,
            str(item.node),
            item.layout,
            item.protection,
            item.state
            + (f", {plural(len(item.members), 'node')}' data" if len(item.members) > 1 else "")
            + (", forgotten" if item.forgotten else ""),
            item.directory or "-",
        )
        for item in memory
    ]
    return [f"  {line}" for line in columns(rows, right=(0, 1, 2))]
