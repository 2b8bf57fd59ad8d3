"""A picture as SVG: scales without loss, and follows a reader's light or dark mode."""

from xml.sax.saxutils import escape, quoteattr

from phalanx.parallel.pipeline.draw.picture import (
    KINDS,
    SHADES,
    TEXT,
    Box,
    Line,
    Picture,
    Shape,
    Word,
    color,
)

_STYLE = f"""
svg {{ color: #1b1f24; font: {TEXT:g}px system-ui, sans-serif; }}
text {{ fill: currentColor; dominant-baseline: central; }}
.faint {{ opacity: .55; }}
.on {{ fill: #111; text-anchor: middle; pointer-events: none; }}
path {{ fill: none; stroke: currentColor; vector-effect: non-scaling-stroke; }}
path.faint {{ opacity: .25; }}
path.dashed {{ stroke-dasharray: 4 3; opacity: .6; }}
path.area {{ fill: currentColor; fill-opacity: .12; }}
.paper {{ fill: #fff; }}
@media (prefers-color-scheme: dark) {{ svg {{ color: #e6e9ee; }} .paper {{ fill: #14171c; }} }}
"""


def to_svg(picture: Picture) -> str:
    """The whole file, as text."""
    style = _STYLE + "".join(
        f".{kind.value}{chunk} {{ fill: #{''.join(f'{part:02x}' for part in color(kind, chunk))}; "
        "}\n"
        for kind in KINDS
        for chunk in range(SHADES)
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture.width:g} '
        f'{picture.height:g}" width="{picture.width:g}" height="{picture.height:g}" role="img">'
    )
    lines = [head, f"<title>{escape(picture.title)}</title>", f"<style>{escape(style)}</style>"]
    lines.append('<rect class="paper" width="100%" height="100%"/>')
    lines += [_element(shape) for shape in picture.shapes]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _element(shape: Shape) -> str:
    if isinstance(shape, Word):
        faint = ' class="faint"' if shape.faint else ""
        return (
            f'<text x="{shape.x:.2f}" y="{shape.y:.2f}" text-anchor="{shape.anchor}"{faint}>'
            f"{escape(shape.text)}</text>"
        )
    if isinstance(shape, Line):
        return _path(shape)
    return _box(shape)


def _path(line: Line) -> str:
    places = " ".join(f"{x:.2f},{y:.2f}" for x, y in line.points)
    names = [
        name
        for name, on in (("faint", line.faint), ("dashed", line.dashed), ("area", line.fill))
        if on
    ]
    return f"<path class={quoteattr(' '.join(names))} d={quoteattr(f'M{places}')}/>"


def _box(box: Box) -> str:
    hint = f"<title>{escape(box.hint)}</title>" if box.hint else ""
    rect = (
        f'<rect class="{box.kind.value}{box.chunk % SHADES}" x="{box.x:.2f}" y="{box.y:.2f}" '
        f'width="{max(box.width - 0.5, 0.3):.2f}" height="{box.height:.2f}" rx="1.5">{hint}</rect>'
    )
    if not box.text:
        return rect
    x, y = box.x + box.width / 2, box.y + box.height / 2
    return f'{rect}<text class="on" x="{x:.2f}" y="{y:.2f}">{escape(box.text)}</text>'
