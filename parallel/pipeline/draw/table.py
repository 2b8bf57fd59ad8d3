"""What a schedule costs, in a few lines for the terminal."""

from phalanx.parallel.pipeline.draw.layout import Panel
from phalanx.parallel.pipeline.simulate import Costs, Memory, ScheduleReport


def table(panel: Panel, costs: Costs, report: ScheduleReport) -> str:
    """The report, then a line for each rank.

    A rank's idle share is of the makespan.
    """
    schedule, time = panel.schedule, panel.time_text
    assert panel.memory is not None
    stages = f"{schedule.chunks} stage{'s' if schedule.chunks > 1 else ''} each"
    limit = "" if panel.limit is None else f" of {panel.memory_text(panel.limit)}"
    memory = f"memory, {panel.memory_unit}" if panel.memory_unit else "memory"
    width = max(len(memory), len("longest stage"))
    rows = [
        ("bubble", "span", f"{report.span_bubble:.2%}"),
        ("", "makespan", f"{report.makespan_bubble:.2%}"),
        ("", "steady", f"{report.steady_bubble:.2%}"),
        ("time", "longest stage", time(report.longest_stage)),
        ("", "makespan", time(report.makespan)),
        ("", "steady step", time(report.steady_time)),
        ("peak", memory, panel.memory_text(report.peak_memory) + limit),
        ("", "microbatches", f"{report.peak_microbatches:.4g}"),
    ]
    lines = [
        f"{panel.title}: {schedule.num_ranks} ranks, {stages}, {schedule.num_microbatches} "
        "microbatches",
        "",
    ]
    lines += [f"{group:<6} {name:<{width}} {value}" for group, name, value in rows]
    return "\n".join([*lines, "", *_ranks(panel, costs)])


def _ranks(panel: Panel, costs: Costs) -> list[str]:
    schedule, memory = panel.schedule, panel.memory
    assert memory is not None
    held = Memory.microbatches(schedule)
    rows = [("rank", "stages", "computes", "idle", "peak memory", "microbatches")]
    for rank, order in enumerate(schedule.orders):
        work = costs.work(schedule, rank)
        rows.append(
            (
                str(rank),
                " ".join(map(str, schedule.stages_of(rank))),
                panel.time_text(work),
                f"{1 - work / panel.timeline.makespan:.2%}",
                panel.memory_text(max(memory.after(order))),
                f"{max(held.after(order)):.4g}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    ]
