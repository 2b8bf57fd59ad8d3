"""A timeline in letters, for the terminal: F7 is microbatch 7's forward, a dot is idle time.

A long timeline is broken like a line of music: all ranks for a stretch of time, then all ranks for
the next.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phalanx.parallel.pipeline.draw.layout import amount, tick_step
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.simulate import Timeline

_BACKGROUNDS = {Kind.F: (44, 104), Kind.B: (43, 103), Kind.W: (42, 102), Kind.BW: (45, 105)}
"""ANSI numbers, for even and odd chunks."""


@dataclass(frozen=True)
class _Cell:
    """An operation's columns, the last one excluded."""

    begin: int
    end: int
    op: Op
    chunk: int

    @property
    def label(self) -> str:
        text = f"{self.op.kind.value}{self.op.microbatch}"
        return text.lower() if self.chunk % 2 else text


def ascii_timeline(
    schedule: Schedule,
    timeline: Timeline,
    *,
    width: int,
    color: bool = False,
    max_lines: int = 60,
    time_text: Callable[[float], str] = amount,
) -> str:
    """The timeline in lines of at most `width` columns (40 at least).

    Most operations get the columns that their label needs; what has fewer shows its kind's letter
    at least. Stretches that would not fit into `max_lines` are left out before the last one, and a
    line says so. `time_text` writes a time.
    """
    prefix = len(f"rank {schedule.num_ranks - 1} ")
    width = max(width, 40)
    columns = width - prefix
    begin = min(starts[0] for starts in timeline.start)
    scale = _scale(schedule, timeline)
    rows = [_cells(schedule, timeline, rank, begin, scale) for rank in range(schedule.num_ranks)]
    total = max(cell.end for row in rows for cell in row)
    lines: list[str] = []
    shown = 0
    for start, end in _stretches(total, columns, max(2, max_lines // (schedule.num_ranks + 2))):
        if start > shown:
            lines += [
                f"... time {time_text(shown / scale)} to {time_text(start / scale)} left out; "
                "--svg FILE and --trace FILE have all of it",
                "",
            ]
        lines.append(" " * prefix + _ruler(start, end, scale, time_text))
        for rank, row in enumerate(rows):
            lines.append(f"rank {rank}".ljust(prefix) + _line(row, start, end, color))
        lines.append("")
        shown = end
    return "\n".join([*lines, *textwrap.wrap(_legend(schedule), width)])


def _stretches(total: int, columns: int, most: int) -> list[tuple[int, int]]:
    """First and last column of each line; the last one is full where others are left out."""
    count = -(-total // columns)
    starts = [n * columns for n in range(min(count, most))]
    if count > most:
        starts[-1] = total - columns
    return [(start, min(start + columns, total)) for start in starts]


def _legend(schedule: Schedule) -> str:
    kinds = {op.kind for order in schedule.orders for op in order}
    parts = ["F forward"]
    if Kind.B in kinds or Kind.W in kinds:
        parts += ["B input gradient", "W weight gradient"]
    if Kind.BW in kinds:
        parts.append("BW both")
    text = f"{', '.join(parts)}, each with its microbatch; . idle"
    if schedule.chunks == 2:
        text += "; small letters: the rank's second stage"
    elif schedule.chunks > 2:
        text += "; small letters: the rank's second, fourth, ... stage"
    return text


def _scale(schedule: Schedule, timeline: Timeline) -> float:
    """Columns a unit of time: nine in ten operations have room for their label, half for a space
    after it too."""
    tight: list[float] = []
    wide: list[float] = []
    for order, starts, ends in zip(schedule.orders, timeline.start, timeline.end, strict=True):
        for op, start, end in zip(order, starts, ends, strict=True):
            if end > start:
                letters = len(op.kind.value) + len(str(op.microbatch))
                tight.append(letters / (end - start))
                wide.append((letters + 1) / (end - start))
    if not tight:
        return 1.0
    return max(sorted(tight)[len(tight) * 9 // 10], sorted(wide)[len(wide) // 2])


def _cells(
    schedule: Schedule, timeline: Timeline, rank: int, begin: float, scale: float
) -> list[_Cell]:
    times = zip(schedule.orders[rank], timeline.start[rank], timeline.end[rank], strict=True)
    return [
        _Cell(
            math.floor((start - begin) * scale + 0.5),
            math.floor((end - begin) * scale + 0.5),
            op,
            schedule.chunk(op.stage),
        )
        for op, start, end in times
    ]


def _line(row: Sequence[_Cell], start: int, end: int, color: bool) -> str:
    """A rank's operations between two columns."""
    parts: list[str] = []
    at = start
    for cell in row:
        left, right = max(cell.begin, start), min(cell.end, end)
        if left >= right:
            continue
        parts.append("." * (left - at))
        parts.append(_shown(cell, left, right, color))
        at = right
    return "".join(parts) + "." * (end - at)


def _shown(cell: _Cell, left: int, right: int, color: bool) -> str:
    """The part of an operation between two columns; its label stands in the larger part."""
    size, whole = right - left, cell.end - cell.begin
    has_label = 2 * size > whole or (2 * size == whole and left == cell.begin)
    label = cell.label if has_label else ""
    if len(label) > size:  # a label cut short would name another microbatch
        label = label[: min(len(cell.op.kind.value), size)]
    text = label.ljust(size)
    if not color:
        return text
    # The last space stays without colour, to tell neighbours apart.
    gap = 1 if right == cell.end and size > 1 and text[-1] == " " else 0
    number = _BACKGROUNDS[cell.op.kind][cell.chunk % 2]
    return f"\x1b[30;{number}m{text[: size - gap]}\x1b[0m" + " " * gap


def _ruler(start: int, end: int, scale: float, time_text: Callable[[float], str]) -> str:
    """Round times above the columns where they lie, as many as have room."""
    text, step = "", tick_step(16 / scale)
    for number in range(math.floor(start / scale / step), math.ceil(end / scale / step) + 1):
        column = math.floor(number * step * scale + 0.5)
        word = f"|{time_text(number * step)}"
        if len(text) <= column - start and column + len(word) <= end:
            text = text.ljust(column - start) + word
    return text
