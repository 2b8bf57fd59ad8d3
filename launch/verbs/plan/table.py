"""What `phalanx plan` prints."""

from collections.abc import Sequence

from phalanx.train.plan.zero import Setting, Way

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def table(setting: Setting, found: Sequence[Way], memory: float | None) -> str:
    """A line for each way, under a line on the layout."""
    held_unit = _unit(max(way.held.on_device for way in found))
    sent_unit = _unit(max(max(way.total.inside, way.total.between) for way in found))
    rows = [_titles(memory), *(_row(way, memory, held_unit, sent_unit) for way in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column < 5 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*_about(setting, held_unit, sent_unit), "", *lines, "", *_legend(memory)])


def _about(setting: Setting, held_unit: str, sent_unit: str) -> list[str]:
    degrees = " ".join(f"{axis}={size}" for axis, size in setting.degrees.items() if size > 1)
    nodes = -(-setting.world_size // setting.ranks_per_node)
    whose = f"{setting.part.num_parameters:,} parameters"
    if setting.degrees["tp"] > 1:
        whose += " on a tensor-parallel rank"
    if setting.degrees["pp"] > 1:
        whose += f" of pipeline rank {setting.part.rank}, which needs most"
    size, unit = setting.part.activations, _unit(setting.part.activations)
    return [
        f"{degrees or 'one rank'} on {_count(nodes, 'node', 's')} of {setting.ranks_per_node}, "
        f"{_count(setting.microbatches, 'microbatch', 'es')}",
        f"{whose}, activations of about {_in(size, unit)} {unit}",
        f"A rank holds, in {held_unit}, and sends in a step, in {sent_unit}:",
    ]


def _count(number: int, what: str, ending: str) -> str:
    return f"{number} {what}{ending if number > 1 else ''}"


def _titles(memory: float | None) -> tuple[str, ...]:
    titles = ("", "params", "grads", "states", "")
    held = ("states", "params", "grads", "working", "all")
    return (*titles, *held, "inside", "between", *(("fits",) if memory is not None else ()))


def _row(way: Way, memory: float | None, held_unit: str, sent_unit: str) -> tuple[str, ...]:
    point, held = way.zero.extents, way.held
    states = held.masters + held.moments
    parts = (held.params, held.grads + held.feedback, held.working, held.on_device)
    fits = () if memory is None else ("yes" if way.needed <= memory else "no",)
    return (
        "*" if way.configured else "",
        point.params.name,
        point.grads.name,
        point.states.name,
        way.name,
        f"({_in(states, held_unit)})" if held.on_host else _in(states, held_unit),
        *(_in(part, held_unit) for part in parts),
        _in(way.total.inside, sent_unit),
        _in(way.total.between, sent_unit),
        *fits,
    )


def _legend(memory: float | None) -> list[str]:
    lines = [
        "* configured. states: masters and optimizer, in brackets where they lie in the host's",
        "memory. working: units gathered and gradients on their way, at most about. inside and",
        "between: parameters and gradients sent to ranks of the same node, and to others.",
        "Activations come on top.",
    ]
    if memory is not None:
        size = f"{_in(memory, _unit(memory))} {_unit(memory)}"
        lines.append(f"fits: into {size}, activations counted, on every pipeline rank.")
    return lines


def _unit(size: float) -> str:
    power = 0
    while size >= 1024 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return _UNITS[power]


def _in(size: float, unit: str) -> str:
    size /= 1024 ** _UNITS.index(unit)
    return f"{size:.3g}" if size < 999.5 else f"{size:.0f}"
