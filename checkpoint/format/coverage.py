"""Whether the boxes of a checkpoint cover every tensor exactly once."""

from collections.abc import Iterable, Sequence
from math import prod

from phalanx.checkpoint.boxes import Box
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.format.table import PartTable


def uncovered(manifest: Manifest) -> str | None:
    """Why some tensor is not covered exactly once by the boxes of all parts; None when all are."""
    return uncovered_by(part.table for part in manifest.parts)


def uncovered_by(tables: Iterable[PartTable]) -> str | None:
    """As `uncovered`, of parts that stand nowhere yet."""
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, list[Box]] = {}
    for table in tables:
        for entry in table.entries:
            shapes[entry.name] = entry.info.shape
            if entry.box.numel:
                boxes.setdefault(entry.name, []).append(entry.box)
    for name, shape in shapes.items():
        reason = why_uncovered(shape, boxes.get(name, ()))
        if reason is not None:
            return f"{name}: {reason}"
    return None


def why_uncovered(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Why boxes within a shape, none of them empty, do not cover it exactly once; None if so."""
    found = list(boxes)
    covered, numel = sum(box.numel for box in found), prod(shape)
    double = _overlapping(found)
    if double is not None:
        return f"{_text(double[0])} and {_text(double[1])} overlap"
    if covered != numel:
        return f"the boxes hold {covered} of {numel} elements"
    return None


def _overlapping(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share elements.

    A sweep along the dim with the most cuts: a box is compared with those that reach into it there,
    which are few unless the tensor is cut as finely along another dim too.
    """
    if len(boxes) < 2:
        return None
    if not boxes[0].sizes:
        return boxes[0], boxes[1]
    dim = max(range(len(boxes[0].sizes)), key=lambda d: len({box.offsets[d] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        begin = box.offsets[dim]
        open_boxes = [old for old in open_boxes if old.offsets[dim] + old.sizes[dim] > begin]
        for old in open_boxes:
            if old.overlap(box) is not None:
                return old, box
        open_boxes.append(box)
    return None


def _text(box: Box) -> str:
    ranges = (f"{a}:{a + n}" for a, n in zip(box.offsets, box.sizes, strict=True))
    return f"[{','.join(ranges)}]"
