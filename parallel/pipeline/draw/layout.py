"""Timelines laid out as a picture.

Above, a row of operations for each rank; below, on the same time axis, what memory each rank holds.
Several timelines stand one under another on one scale, so that a measured one can be compared with
the one that was predicted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from phalanx.parallel.pipeline.draw.picture import (
    KINDS,
    SHADES,
    TEXT,
    Box,
    Line,
    Picture,
    Shape,
    Word,
)
from phalanx.parallel.pipeline.graph import Op, Schedule
from phalanx.parallel.pipeline.simulate import Memory, Timeline

ROW = 20.0
"""Height of a rank's row."""
CURVES = 110.0
"""Height of the memory curves."""
LEFT, RIGHT, GAP = 78.0, 16.0, 10.0
LETTER = 6.4
"""Width of a letter, on average."""


def amount(value: float, unit: str = "") -> str:
    """A time or an amount of memory, for people: thousands apart, or k, M, G, T before the unit."""
    if unit:
        power = min(int(math.log10(abs(value)) // 3), 5) if abs(value) >= 1000 else 0
        return f"{value / 1000**power:.4g} {' kMGTP'[power].strip()}{unit}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One timeline and what is drawn with it."""

    title: str
    schedule: Schedule
    timeline: Timeline
    memory: Memory | None = None
    """Draws memory curves."""
    limit: float | None = None
    """Drawn across the memory curves."""
    memory_text: Callable[[float], str] = amount
    """Writes an amount of memory."""
    memory_unit: str = ""
    """Of what `memory_text` writes, where it does not say so itself."""
    time_text: Callable[[float], str] = amount
    """Writes a time with its unit."""


def natural_width(
    panels: Sequence[Panel], *, at_least: float = 1000, at_most: float = 16000
) -> int:
    """Width at which most operations have room for their number."""
    shortest = math.inf
    for panel in panels:
        lengths = sorted(
            end - start
            for starts, ends in zip(panel.timeline.start, panel.timeline.end, strict=True)
            for start, end in zip(starts, ends, strict=True)
            if end > start
        )
        if lengths:
            shortest = min(shortest, lengths[len(lengths) // 10])
    letters = max(len(str(panel.schedule.num_microbatches - 1)) for panel in panels)
    wanted = _span(panels) / shortest * (letters * LETTER + 4) if shortest < math.inf else 0.0
    return round(min(max(wanted + LEFT + RIGHT, at_least), at_most))


def lay_out(panels: Sequence[Panel], width: float) -> Picture:
    """Place everything; all panels share the longest one's time scale.

    Raises:
        ValueError: there is no panel, or no operation in one.
    """
    if not panels or not all(panel.schedule.orders and panel.timeline.end[0] for panel in panels):
        raise ValueError("nothing to draw: give at least one timeline with operations")
    sheet = _Sheet(width, (width - LEFT - RIGHT) / (_span(panels) or 1.0))
    sheet.legend(panels)
    for panel in panels:
        sheet.panel(panel)
    title = ", ".join(panel.title for panel in panels)
    return Picture(width, sheet.y + GAP, title, sheet.shapes)


def memory_curve(
    order: Sequence[Op], start: Sequence[float], end: Sequence[float], memory: Memory
) -> Iterator[tuple[float, float]]:
    """Times at which a rank's memory changes, and what it holds from then on.

    What an operation takes, it takes at its start; what it frees, it frees at its end.
    """
    held, before = 0.0, None
    for op, begin, finish in zip(order, start, end, strict=True):
        change = memory.of(op)
        time = begin if change > 0 else finish
        if before is not None and before[0] < time:  # of changes at one time only the last shows
            yield before
        held += change
        before = (time, held)
    if before is not None:
        yield before


def _span(panels: Sequence[Panel]) -> float:
    return max(panel.timeline.makespan for panel in panels)


@dataclass
class _Sheet:
    """A picture that grows downwards."""

    width: float
    scale: float
    """Pixels a unit of time."""
    y: float = GAP
    shapes: list[Shape] = field(default_factory=list)

    def legend(self, panels: Sequence[Panel]) -> None:
        used = {op.kind for panel in panels for order in panel.schedule.orders for op in order}
        chunks = min(max(panel.schedule.chunks for panel in panels), SHADES)
        x, y = LEFT, self.y + ROW / 2
        for kind, meaning in KINDS.items():
            if kind not in used:
                continue
            for chunk in range(chunks):
                self.shapes.append(Box(x, self.y + 2, 26, ROW - 4, kind, chunk, kind.value))
                x += 28
            self.shapes.append(Word(x + 4, y, meaning))
            x += 4 + LETTER * len(meaning) + 2 * GAP
        note = "numbers: microbatch" + ("; paler: later chunk" if chunks > 1 else "")
        self.shapes.append(Word(x, y, note, faint=True))
        self.y += ROW + GAP

    def panel(self, panel: Panel) -> None:
        self.shapes.append(Word(LEFT, self.y + ROW / 2, panel.title))
        self.y += ROW
        begin = min(starts[0] for starts in panel.timeline.start)
        self._time_axis(panel)
        for rank, order in enumerate(panel.schedule.orders):
            self._rank(panel, rank, order, begin)
        if panel.memory is not None:
            self._memory(panel, panel.memory, begin)
        self.y += GAP

    def _rank(self, panel: Panel, rank: int, order: Sequence[Op], begin: float) -> None:
        self.shapes.append(Word(LEFT - 6, self.y + ROW / 2, f"rank {rank}", "end"))
        middle = self.y + ROW / 2
        self.shapes.append(Line(((LEFT, middle), (self.width - RIGHT, middle)), faint=True))
        times = zip(order, panel.timeline.start[rank], panel.timeline.end[rank], strict=True)
        for op, start, end in times:
            width = (end - start) * self.scale
            text = str(op.microbatch)
            hint = (
                f"{op} on rank {rank}: {panel.time_text(start - begin)} to "
                f"{panel.time_text(end - begin)}"
            )
            self.shapes.append(
                Box(
                    x=LEFT + (start - begin) * self.scale,
                    y=self.y + 1,
                    width=width,
                    height=ROW - 2,
                    kind=op.kind,
                    chunk=panel.schedule.chunk(op.stage),
                    text=text if len(text) * LETTER <= width else "",
                    hint=hint,
                )
            )
        self.y += ROW

    def _time_axis(self, panel: Panel) -> None:
        length = panel.timeline.makespan
        below = ROW * (1 + panel.schedule.num_ranks)
        for tick in ticks(length, (self.width - LEFT - RIGHT) * length / (_span([panel]) or 1)):
            x = LEFT + tick * self.scale
            self.shapes.append(Word(x, self.y + ROW / 2, panel.time_text(tick), "middle", True))
            self.shapes.append(Line(((x, self.y + ROW - 2), (x, self.y + below)), faint=True))
        self.y += ROW

    def _memory(self, panel: Panel, memory: Memory, begin: float) -> None:
        """Every rank's curve faint, over them the one that holds most."""
        orders = panel.schedule.orders
        peaks = [max(memory.after(order), default=0.0) for order in orders]
        worst = peaks.index(max(peaks))
        unit = f" in {panel.memory_unit}" if panel.memory_unit else ""
        text = f"memory{unit}: rank {worst} holds most, {panel.memory_text(peaks[worst])}"
        if panel.limit is not None:
            text += f"; dashed: the limit, {panel.memory_text(panel.limit)}"
        self.shapes.append(Word(LEFT, self.y + GAP + ROW / 2, text))
        self.y += GAP + ROW
        floor = self.y + CURVES
        top = max(peaks[worst], panel.limit or 0.0) or 1.0
        for rank in [*(r for r in range(len(orders)) if r != worst), worst]:
            points = [(LEFT, floor)]
            start, end = panel.timeline.start[rank], panel.timeline.end[rank]
            for time, held in memory_curve(orders[rank], start, end, memory):
                x, y = LEFT + (time - begin) * self.scale, floor - held / top * CURVES
                points += [(x, points[-1][1]), (x, y)]
            points.append((LEFT + (end[-1] - begin) * self.scale, points[-1][1]))
            self.shapes.append(Line(tuple(points), faint=rank != worst, fill=rank == worst))
        self._across(floor)
        self.shapes.append(Word(LEFT - 6, floor - TEXT / 2, "0", "end", True))
        if panel.limit is not None:
            self._across(floor - panel.limit / top * CURVES)
        self.y = floor

    def _across(self, y: float) -> None:
        self.shapes.append(Line(((LEFT, y), (self.width - RIGHT, y)), dashed=True))


def ticks(length: float, pixels: float, *, apart: float = 90.0) -> list[float]:
    """Round times from 0 to `length`, at least `apart` pixels from each other."""
    if not 0 < length < math.inf:
        return [0.0]
    step = tick_step(length * apart / max(pixels, apart))
    return [step * n for n in range(int(length / step * (1 + 1e-12)) + 1)]


def tick_step(least: float) -> float:
    """The round time of `least` or a little more, for ticks to lie apart."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))
