"""What an action of the tool has to say: to people as lines, to scripts as JSON."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phalanx.checkpoint.format.manifest import Manifest

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of an action."""

    lines: list[str] = field(default_factory=list)
    """To print."""
    content: dict[str, Any] = field(default_factory=dict)
    """The same as JSON holds it."""
    fine: bool = True
    """False: something is broken, or differs."""


def size(count: float) -> str:
    """Bytes, in units of 1000."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} {_UNITS[power]}" if power == 0 else f"{count:.3g} {_UNITS[power]}"


def age(moment: float | None) -> str:
    """Time since `moment` (seconds since 1970), in the one unit that tells most."""
    if moment is None:
        return "-"
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def when(moment: float) -> str:
    """A moment as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(moment))


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Rows of texts as lines, with the columns numbered in `right` set to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))] if rows else []
    return [
        "  ".join(
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def layout_of(manifest: Manifest) -> str:
    """The saver's degrees, as `--layout` takes them."""
    degrees = manifest.meta.get("layout")
    if not isinstance(degrees, dict):
        return "-"
    return ",".join(f"{axis}={n}" for axis, n in degrees.items() if n != 1) or "one rank"


def protection_of(manifest: Manifest) -> str:
    """What may be lost and rebuilt: data + parity nodes of each group."""
    if not manifest.num_parity or not manifest.parity:
        return "none"
    return protection(manifest.groups, manifest.num_parity)


def protection(groups: Sequence[Sequence[int]], num_parity: int) -> str:
    """`4+2`, or `2 x 4+2` for several groups."""
    if not num_parity:
        return "none"
    kinds: dict[int, int] = {}
    for group in groups:
        kinds[len(group)] = kinds.get(len(group), 0) + 1
    return ", ".join(
        (f"{count} x " if count > 1 else "") + f"{nodes - num_parity}+{num_parity}"
        for nodes, count in sorted(kinds.items(), reverse=True)
    )


def plural(count: int, what: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
