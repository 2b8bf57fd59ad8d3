"""A picture as pixels, for PNG files and TensorBoard."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from phalanx.parallel.pipeline.draw.layout import Panel, lay_out
from phalanx.parallel.pipeline.draw.picture import (
    TEXT,
    Box,
    Line,
    Picture,
    Shape,
    Word,
    color,
)
from phalanx.parallel.pipeline.graph import Schedule
from phalanx.parallel.pipeline.simulate import Timeline

PAPER, INK, FAINT, GRID, AREA = "#ffffff", "#1b1f24", "#6d737b", "#d5d8dc", "#e2e4e7"
_ANCHORS = {"start": "lm", "middle": "mm", "end": "rm"}

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_image(picture: Picture) -> Image.Image:
    """Draw a picture, one pixel a unit, on white."""
    image = Image.new("RGB", (round(picture.width), round(picture.height)), PAPER)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    for shape in picture.shapes:
        _draw(canvas, font, shape)
    return image


def to_png(picture: Picture) -> bytes:
    """The whole file."""
    file = io.BytesIO()
    to_image(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def timeline_image(
    timelines: Sequence[tuple[str, Timeline, Schedule]], *, width: int = 1600
) -> np.ndarray:
    """Timelines one under another on one time scale, as TensorBoard takes an image.

    `timelines` are title, times and schedule of each, such as the measured and the simulated one,
    times in the same unit. Returns (height, width, 3), uint8.

    Raises:
        ValueError: there is no timeline, or no operation in one.
    """
    panels = [Panel(title=title, timeline=t, schedule=s) for title, t, s in timelines]
    return np.asarray(to_image(lay_out(panels, width)))


def timeline_png(
    timelines: Sequence[tuple[str, Timeline, Schedule]], *, width: int = 1600
) -> bytes:
    """As `timeline_image`, as a PNG file."""
    panels = [Panel(title=title, timeline=t, schedule=s) for title, t, s in timelines]
    return to_png(lay_out(panels, width))


def _draw(canvas: ImageDraw.ImageDraw, font: Font, shape: Shape) -> None:
    if isinstance(shape, Word):
        fill = FAINT if shape.faint else INK
        place = (shape.x, shape.y)
        canvas.text(place, shape.text, fill=fill, font=font, anchor=_ANCHORS[shape.anchor])
    elif isinstance(shape, Line):
        _draw_line(canvas, shape)
    else:
        _draw_box(canvas, font, shape)


def _draw_line(canvas: ImageDraw.ImageDraw, line: Line) -> None:
    points = list(line.points)
    if line.fill:
        floor = points[0][1]
        canvas.polygon([*points, (points[-1][0], floor)], fill=AREA)
    if line.dashed:
        (x, y), (end, _) = points
        while x < end:
            canvas.line([(x, y), (min(x + 4, end), y)], fill=FAINT)
            x += 7
        return
    canvas.line(points, fill=GRID if line.faint else INK)


def _draw_box(canvas: ImageDraw.ImageDraw, font: Font, box: Box) -> None:
    # The last column stays free, to tell neighbours apart, unless it is the only one.
    left, right = round(box.x), max(round(box.x + box.width) - 2, round(box.x))
    corners = (left, round(box.y), right, round(box.y + box.height))
    canvas.rectangle(corners, fill=color(box.kind, box.chunk))
    if box.text:
        middle = (box.x + box.width / 2, box.y + box.height / 2)
        canvas.text(middle, box.text, fill="#111111", font=font, anchor="mm")
