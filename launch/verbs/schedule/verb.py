"""`phalanx schedule`: build a pipeline schedule, check, replay, print and draw it.

Torch-free: of a pipeline given by --p, --m and --costs as of a configured one.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phalanx.launch import env
from phalanx.launch.bad_input import BadInput, user_input
from phalanx.launch.config.app import Job, run
from phalanx.launch.verbs.schedule.case import Case, configured, given
from phalanx.launch.verbs.schedule.flags import Flags, parse
from phalanx.parallel.pipeline.draw.ascii import ascii_timeline
from phalanx.parallel.pipeline.draw.layout import Panel, lay_out, natural_width
from phalanx.parallel.pipeline.draw.svg import to_svg
from phalanx.parallel.pipeline.draw.table import table
from phalanx.parallel.pipeline.draw.trace import trace_events
from phalanx.parallel.pipeline.files import save_schedule
from phalanx.parallel.pipeline.simulate import Memory, ScheduleReport, report

_LIST = re.compile(r"\[\n([^\[\]{}]*)\]")
"""A list without lists in it."""


def schedule(argv: Sequence[str]) -> None:
    """Show one schedule.

    Raises:
        BadInput: a flag, a file or the configuration is wrong, or the schedule does not fit it.
    """
    flags = parse(argv)
    if flags.setting is not None:
        with user_input():
            case = given(flags.setting, flags)
        _show(case, flags)
        return
    overrides = [*flags.rest]
    if flags.schedule is not None:
        overrides.append(f"pipeline.schedule={_quoted(flags.schedule)}")
    if flags.chunks is not None:
        overrides.append(f"pipeline.stages_per_rank={flags.chunks}")
    run("schedule", overrides, partial(_show_configured, flags=flags), starts_ranks=False)


def _quoted(text: str) -> str:
    """A value as Hydra reads it, whatever is in it."""
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", "\\'") + "'"


def _show_configured(job: Job, *, flags: Flags) -> None:
    with user_input():
        case = configured(job.config)
    print("Times in FLOPs and memory in bytes are estimates from the model's shape.\n")
    _show(case, flags)


def _show(case: Case, flags: Flags) -> None:
    found, panel = report(case.schedule, case.costs, case.memory), case.panel()
    _write(_writers(case, found, panel), flags.outputs)  # first: a pager may close the output
    print(table(panel, case.costs, found))
    print()
    letters = ascii_timeline(
        case.schedule,
        panel.timeline,
        width=shutil.get_terminal_size((100, 24)).columns,
        color=env.wants_color(sys.stdout),
        time_text=panel.time_text,
    )
    print(letters)


def _write(writers: dict[str, Callable[[Path], None]], outputs: dict[str, Path]) -> None:
    for name, path in outputs.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[name](path)
        except OSError as error:
            raise BadInput(f"--{name} {path}: cannot be written ({error.strerror})") from error
        print(f"wrote {path}", file=sys.stderr)


def figures(case: Case, found: ScheduleReport) -> dict[str, Any]:
    """What --json writes: the report, and the order of operations by rank."""
    made, costs = case.schedule, case.costs
    held = Memory.microbatches(made)
    by_rank = [max(case.memory.after(order)) for order in made.orders]
    return {
        "name": made.name,
        "p": made.num_ranks,
        "m": made.num_microbatches,
        "chunks": made.chunks,
        "span_bubble": found.span_bubble,
        "makespan_bubble": found.makespan_bubble,
        "steady_bubble": found.steady_bubble,
        "longest_stage": found.longest_stage,
        "makespan": found.makespan,
        "steady_time": found.steady_time,
        "peak_microbatches": round(found.peak_microbatches, 9),  # thirds add up to nearly 1
        "peak_memory": found.peak_memory / case.multiple,
        "peak_memory_bytes": found.peak_memory if case.estimated else None,
        "memory_limit": None if case.limit is None else case.limit / case.multiple,
        "peak_microbatches_by_rank": [round(max(held.after(order)), 9) for order in made.orders],
        "peak_memory_by_rank": [peak / case.multiple for peak in by_rank],
        "costs": {"f": costs.f, "b": costs.b, "w": costs.w, "hop": costs.hop},
        "placement": made.placement,
        "order": [[str(op) for op in order] for order in made.orders],
    }


def _writers(case: Case, found: ScheduleReport, panel: Panel) -> dict[str, Callable[[Path], None]]:
    """What writes the file of each flag."""

    def text(content: Callable[[], str]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_text(content())

        return write

    return {
        "json": text(lambda: _json(figures(case, found))),
        "svg": text(lambda: to_svg(lay_out([panel], natural_width([panel])))),
        "png": lambda path: _write_png(path, panel),
        "trace": text(lambda: json.dumps(_trace(case, panel))),
        "save": lambda path: save_schedule(case.schedule, path),
    }


def _trace(case: Case, panel: Panel) -> dict[str, Any]:
    """A unit of the costs is shown as a microsecond; of FLOPs, a million are."""
    microseconds = 1e-6 if case.estimated else 1.0
    return trace_events(panel.timeline, case.schedule, case.memory, microseconds=microseconds)


def _json(content: dict[str, Any]) -> str:
    """Indented, but lists of numbers and words each on one line."""
    text = json.dumps(content, indent=2) + "\n"
    return _LIST.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)


def _write_png(path: Path, panel: Panel) -> None:
    from phalanx.parallel.pipeline.draw.png import to_png

    path.write_bytes(to_png(lay_out([panel], natural_width([panel], at_most=8000))))
