"""`phalanx checkpoint gc`: delete what no run will read again.

That is: what a save or a deletion left unfinished below the newest complete step, what was saved
anew, and, where asked, all but the newest. A folder without a manifest above the newest complete
step may be a save that runs right now, and a restore can go on: both stay.
"""

from phalanx.checkpoint.format.folders import remove_folder
from phalanx.checkpoint.tool.places import CheckpointPlace
from phalanx.checkpoint.tool.report import Outcome, columns, plural
from phalanx.checkpoint.tool.state import BROKEN, COMPLETE, RESTORING, Listed, look


def gc(
    place: CheckpointPlace, *, keep: int | None = None, keep_every: int = 0, dry_run: bool = False
) -> Outcome:
    """Delete leftovers, and complete checkpoints but the newest `keep` (None = all of them stay).

    Step 0 (imported weights), multiples of `keep_every` and broken checkpoints, which a repair may
    mend, stay.

    Raises:
        ValueError: the place is one checkpoint.
        OSError: the storage cannot be read.
    """
    if place.folder is not None:
        raise ValueError(f"{place.text}: is one checkpoint; give the folder that holds it")
    listed = [look(place.storage, folder) for folder in place.folders()]
    plan = [(item, *_judge(item, listed, keep, keep_every)) for item in listed]
    problems: list[str] = []
    for item, stays, _ in plan:
        if stays or dry_run:
            continue
        try:
            remove_folder(place.storage, item.folder)
        except OSError as error:
            problems.append(f"{item.folder} could not be deleted: {error}")
    verb = "would delete" if dry_run else "deleted"
    rows = [(item.folder, "kept" if stays else verb, why) for item, stays, why in plan]
    gone = sum(not stays for _, stays, _ in plan)
    lines = [place.storage.url, *(f"  {line}" for line in columns(rows)), *problems]
    lines.append(f"{plural(gone - len(problems), 'folder')} {'to delete' if dry_run else verb}")
    content = {
        "url": place.storage.url,
        "dry_run": dry_run,
        "folders": [
            {"folder": item.folder, "step": item.step, "kept": stays, "why": why}
            for item, stays, why in plan
        ],
        "problems": problems,
    }
    return Outcome(lines=lines, content=content, fine=not problems)


def _judge(
    item: Listed, listed: list[Listed], keep: int | None, keep_every: int
) -> tuple[bool, str]:
    """Whether a folder stays, and why."""
    complete = [other for other in listed if other.state == COMPLETE]
    newest = complete[-1].step if complete else -1
    if item.state == RESTORING:
        return True, "a restore that can go on"
    if item.state == BROKEN:
        return True, f"broken, but a repair may mend it: {item.reason}"
    if item.state != COMPLETE:
        if item.step <= newest:
            return False, "unfinished"
        return True, "unfinished, but newer than all complete ones: its save may still run"
    last = [other for other in complete if other.step == item.step][-1]
    if last is not item:
        return False, f"saved anew as {last.folder}"
    steps = sorted({other.step for other in complete})
    if keep is None or item.step in steps[-keep:]:
        return True, "complete"
    if item.step == 0:
        return True, "imported weights"
    if keep_every and item.step % keep_every == 0:
        return True, f"a multiple of {keep_every}"
    return False, f"not among the newest {keep}"
