"""Pictures of boxes, lines and words: `layout.py` makes them, `svg.py` and `png.py` draw them.

Lengths are in pixels, from the upper left.
"""

from dataclasses import dataclass

from phalanx.parallel.pipeline.graph import Kind

KINDS = {Kind.F: "forward", Kind.B: "input gradient", Kind.W: "weight gradient", Kind.BW: "both"}
"""What the legend says."""
_BASES = {
    Kind.F: (91, 155, 240),
    Kind.B: (245, 166, 82),
    Kind.W: (94, 189, 122),
    Kind.BW: (190, 140, 225),
}
TEXT = 11.0
"""Height of letters, in pixels."""
_PALER = (0.0, 0.4, 0.6, 0.75)
SHADES = len(_PALER)
"""Chunks that are told apart; further ones begin again."""


def color(kind: Kind, chunk: int) -> tuple[int, int, int]:
    """Of an operation's box: its kind decides, later chunks are paler.

    Black letters are legible on all, and the boxes on white as on black.
    """
    pale = _PALER[chunk % SHADES]
    red, green, blue = (round(part + (255 - part) * pale) for part in _BASES[kind])
    return red, green, blue


@dataclass(frozen=True)
class Box:
    """One operation; kind and chunk decide the colour."""

    x: float
    y: float
    width: float
    height: float
    kind: Kind
    chunk: int
    text: str
    hint: str = ""
    """A sentence for the pointer."""


@dataclass(frozen=True)
class Word:
    """Text whose middle is at height y."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    """start, middle or end: what of the text is at x."""
    faint: bool = False


@dataclass(frozen=True)
class Line:
    """A broken line; `fill` shades what is between it and its first point's height."""

    points: tuple[tuple[float, float], ...]
    faint: bool = False
    dashed: bool = False
    fill: bool = False


Shape = Box | Word | Line


@dataclass(frozen=True)
class Picture:
    """Shapes on a sheet, the first lowest."""

    width: float
    height: float
    title: str
    shapes: list[Shape]
