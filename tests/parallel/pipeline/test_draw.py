"""Timelines drawn: what stands in the letters, the SVG, the pixels and the trace."""

import io
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from phalanx.parallel.pipeline.draw.ascii import ascii_timeline
from phalanx.parallel.pipeline.draw.layout import (
    Panel,
    amount,
    lay_out,
    memory_curve,
    natural_width,
    ticks,
)
from phalanx.parallel.pipeline.draw.picture import Box, color
from phalanx.parallel.pipeline.draw.png import timeline_image, timeline_png, to_png
from phalanx.parallel.pipeline.draw.svg import to_svg
from phalanx.parallel.pipeline.draw.trace import trace_events
from phalanx.parallel.pipeline.graph import Kind, Op, Schedule
from phalanx.parallel.pipeline.schedules.registry import make_schedule
from phalanx.parallel.pipeline.simulate import Costs, Memory, Timeline, simulate

SVG = "{http://www.w3.org/2000/svg}"


def replayed(
    name: str, num_ranks: int, num_microbatches: int, *, w: float = 1.0, hop: float = 0.0
) -> tuple[Schedule, Timeline, Memory]:
    """A schedule at F = B = 1, its timeline, and memory in multiples of what F adds to a rank."""
    schedule = make_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    size = {"num_stages": schedule.num_stages, "chunks": schedule.chunks}
    timeline = simulate(schedule, Costs.uniform(1, 1, w, hop, **size))
    return schedule, timeline, Memory.uniform(1, -0.5, -0.5, **size)


def rows(text: str, rank: int) -> str:
    """A rank's letters, all stretches joined."""
    return "".join(re.findall(rf"^rank {rank} +?(.*)$", text, re.MULTILINE))


def test_letters_stand_where_operations_run() -> None:
    schedule, timeline, _ = replayed("1f1b", 2, 3)
    text = ascii_timeline(schedule, timeline, width=100)
    assert text.splitlines()[:3] == [
        "       |0                            |10",
        "rank 0 F0 F1 ......BW0   F2 BW1   ...BW2   ",
        "rank 1 ...F0 BW0   F1 BW1   F2 BW2   ......",
    ]
    assert text.endswith("\n\nF forward, BW both, each with its microbatch; . idle")


def test_times_are_written_as_wanted() -> None:
    schedule, timeline, _ = replayed("zb_h1", 2, 8)
    text = ascii_timeline(schedule, timeline, width=100, time_text=lambda time: f"{time:g} s")
    assert re.findall(r"\|([^|]*?) *(?=\||$)", text.splitlines()[0]) == ["0 s", "10 s", "20 s"]


def test_every_operation_is_named_in_order() -> None:
    schedule, timeline, _ = replayed("zb_h2", 3, 12)
    text = ascii_timeline(schedule, timeline, width=1000)
    for rank, order in enumerate(schedule.orders):
        assert re.findall(r"[A-Z]+\d+", rows(text, rank)) == [
            f"{op.kind.value}{op.microbatch}" for op in order
        ]


def test_columns_are_proportional_to_time() -> None:
    schedule, timeline, _ = replayed("zb_h1", 4, 8, w=0.5, hop=0.25)
    text = ascii_timeline(schedule, timeline, width=1000)
    lengths = {rank: len(rows(text, rank)) for rank in range(4)}
    assert len(set(lengths.values())) == 1
    per_column = timeline.makespan / lengths[0]
    for rank in range(4):
        work = sum(e - s for s, e in zip(timeline.start[rank], timeline.end[rank], strict=True))
        dots = rows(text, rank).count(".")
        assert dots * per_column == pytest.approx(timeline.makespan - work, abs=9 * per_column)


def test_a_second_chunk_is_in_small_letters() -> None:
    schedule, timeline, _ = replayed("zb_v", 2, 4)
    text = ascii_timeline(schedule, timeline, width=1000)
    for rank, order in enumerate(schedule.orders):
        wanted = [f"{op.kind.value}{op.microbatch}" for op in order]
        wanted = [
            label.lower() if schedule.chunk(op.stage) else label
            for label, op in zip(wanted, order, strict=True)
        ]
        assert re.findall(r"[A-Za-z]+\d+", rows(text, rank)) == wanted
    assert "small letters: the rank's second stage" in text
    assert "stage" not in ascii_timeline(*replayed("zb_h1", 2, 4)[:2], width=1000)


@pytest.mark.parametrize("width", [40, 57, 100])
def test_lines_keep_to_the_width_and_lose_no_operation(width: int) -> None:
    schedule, timeline, _ = replayed("zb_h1", 4, 12)
    text = ascii_timeline(schedule, timeline, width=width, max_lines=1000)
    assert max(map(len, text.splitlines())) <= width
    for rank, order in enumerate(schedule.orders):
        assert len(re.findall(r"[FBW]\d*", rows(text, rank))) == len(order)


def test_a_long_timeline_is_cut_and_says_so() -> None:
    schedule, timeline, _ = replayed("zb_h2", 16, 128)
    lines = ascii_timeline(schedule, timeline, width=100).splitlines()
    assert len(lines) <= 66
    assert (
        sum("left out; --svg FILE and --trace FILE have all of it" in line for line in lines) == 1
    )
    assert "W127" in next(line for line in reversed(lines) if line.startswith("rank 15"))


def test_colour_is_only_added() -> None:
    schedule, timeline, _ = replayed("zb_v", 3, 6)
    plain = ascii_timeline(schedule, timeline, width=80)
    coloured = ascii_timeline(schedule, timeline, width=80, color=True)
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_operations_without_time_are_not_drawn_in_letters() -> None:
    schedule, timeline, _ = replayed("zb_h1", 2, 4, w=0.0)
    assert "W0" not in ascii_timeline(schedule, timeline, width=200)


def panels() -> list[Panel]:
    """Two timelines of a V schedule, with memory and a limit."""
    schedule, timeline, memory = replayed("zb_v", 4, 8, hop=0.1)
    slower = simulate(schedule, Costs.uniform(2, 1, 1, 0.1, num_stages=8, chunks=2))
    return [
        Panel(title="simulated <1>", schedule=schedule, timeline=timeline, memory=memory, limit=5),
        Panel(title="measured", schedule=schedule, timeline=slower),
    ]


def test_boxes_are_operations_on_one_scale() -> None:
    both = panels()
    picture = lay_out(both, 1200)
    boxes = [s for s in picture.shapes if isinstance(s, Box) and s.hint]
    ops = [op for panel in both for order in panel.schedule.orders for op in order]
    assert [box.hint.split()[0] for box in boxes] == [str(op) for op in ops]
    times = [
        end - start
        for panel in both
        for starts, ends in zip(panel.timeline.start, panel.timeline.end, strict=True)
        for start, end in zip(starts, ends, strict=True)
    ]
    scale = boxes[0].width / times[0]
    assert [box.width for box in boxes] == pytest.approx([time * scale for time in times])
    assert max(box.x + box.width for box in boxes) == pytest.approx(1200 - 16)
    assert all(box.y >= 0 and box.y + box.height <= picture.height for box in boxes)
    chunks = [both[0].schedule.chunk(op.stage) for op in ops]
    assert [(box.kind, box.chunk) for box in boxes] == [
        (op.kind, chunk) for op, chunk in zip(ops, chunks, strict=True)
    ]


def test_svg_is_well_formed_and_has_every_operation() -> None:
    both = panels()
    text = to_svg(lay_out(both, natural_width(both)))
    root = ElementTree.fromstring(text)
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    assert root.attrib["viewBox"] == f"0 0 {width:g} {height:g}"
    hints = [e.text for e in root.iter(f"{SVG}title")]
    assert hints[0] == "simulated <1>, measured"
    assert len(hints) == 1 + sum(len(o) for panel in both for o in panel.schedule.orders)
    styles = "".join(e.text or "" for e in root.iter(f"{SVG}style"))
    used = {e.attrib["class"] for e in root.iter(f"{SVG}rect")}
    assert used == {"paper", "F0", "F1", "B0", "B1", "W0", "W1"}
    assert all(f".{name} {{ fill: #" in styles for name in used)
    words = [e.text for e in root.iter(f"{SVG}text")]
    assert {"rank 0", "rank 3", "forward", "input gradient", "weight gradient"} <= set(words)
    assert any("memory: rank" in (word or "") for word in words)
    assert "prefers-color-scheme: dark" in styles


def test_black_letters_are_legible_on_every_colour() -> None:
    """Contrast as WCAG 2 defines it; its level AA asks for 4.5."""
    for kind in Kind:
        for chunk in range(4):
            parts = [part / 255 for part in color(kind, chunk)]
            linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
            assert (light + 0.05) / (0.0056 + 0.05) > 6, (kind, chunk)


def test_png_has_the_boxes_where_the_picture_says() -> None:
    both = panels()
    picture = lay_out(both, 1000)
    image = Image.open(io.BytesIO(to_png(picture)))
    assert (image.format, image.size) == ("PNG", (1000, round(picture.height)))
    pixels = np.asarray(image.convert("RGB"))
    for box in picture.shapes:
        if isinstance(box, Box):
            seen = tuple(int(part) for part in pixels[round(box.y) + 2, round(box.x) + 1])
            assert seen == color(box.kind, box.chunk), box


def test_measured_and_simulated_stand_in_one_image() -> None:
    schedule, timeline, _ = replayed("1f1b", 2, 4)
    pair = [("simulated", timeline, schedule), ("measured", timeline, schedule)]
    image = timeline_image(pair, width=800)
    assert image.dtype == np.uint8
    assert image.shape[1:] == (800, 3)
    assert image.shape[0] > timeline_image(pair[:1], width=800).shape[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(timeline_png(pair, width=800)))), image)
    with pytest.raises(ValueError, match="nothing to draw"):
        timeline_image([])


def test_memory_curve_follows_the_replay() -> None:
    schedule, timeline, memory = replayed("zb_h1", 4, 8)
    for rank, order in enumerate(schedule.orders):
        curve = list(memory_curve(order, timeline.start[rank], timeline.end[rank], memory))
        times = [time for time, _ in curve]
        assert times == sorted(set(times))
        assert max(held for _, held in curve) == pytest.approx(max(memory.after(order)))
        assert curve[-1][1] == pytest.approx(0)
        assert curve[0] == (timeline.start[rank][0], 1)


def test_trace_has_slices_arrows_and_counters() -> None:
    schedule, timeline, memory = replayed("zb_v", 2, 3, hop=0.5)
    trace = trace_events(timeline, schedule, memory, microseconds=1000)
    events: list[dict[str, Any]] = trace["traceEvents"]
    slices = {event["args"]["op"]: event for event in events if event["ph"] == "X"}
    assert set(slices) == {str(op) for order in schedule.orders for op in order}
    for rank, order in enumerate(schedule.orders):
        for op, start, end in zip(order, timeline.start[rank], timeline.end[rank], strict=True):
            found = slices[str(op)]
            assert (found["pid"], found["ts"]) == (rank, start * 1000)
            assert found["dur"] == pytest.approx((end - start) * 1000)
    arrows: dict[int, dict[str, dict[str, Any]]] = {}
    for event in events:
        if event["ph"] in "sf":
            arrows.setdefault(event["id"], {})[event["ph"]] = event
    # Stages 0 and 3 lie on rank 0, 1 and 2 on rank 1: two hops each way, of each microbatch.
    assert len(arrows) == 4 * 3
    for pair in arrows.values():
        assert pair["s"]["pid"] != pair["f"]["pid"]
        assert pair["f"]["ts"] >= pair["s"]["ts"] + 500
        for event in pair.values():
            assert any(
                x["pid"] == event["pid"] and x["ts"] <= event["ts"] < x["ts"] + x["dur"]
                for x in slices.values()
            )
    counters = [event["args"]["held"] for event in events if event["ph"] == "C"]
    assert max(counters) == pytest.approx(memory.peak(schedule))
    names = [e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"]
    assert names == ["rank 0 (stage 0, 3)", "rank 1 (stage 1, 2)"]


def test_stages_of_one_rank_have_no_arrow() -> None:
    schedule = Schedule.of("one", (0, 0), 1, [[Op(s, k, 0) for s, k in FOLDED]])
    timeline = simulate(schedule, Costs.uniform(1, 1, 1, num_stages=2))
    assert {e["ph"] for e in trace_events(timeline, schedule)["traceEvents"]} == {"M", "X"}


FOLDED = [(0, Kind.F), (1, Kind.F), (1, Kind.BW), (0, Kind.BW)]


@pytest.mark.parametrize(
    ("length", "pixels", "found"),
    [(10, 900, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), (23, 300, [0, 10, 20]), (0, 100, [0])],
)
def test_ticks_are_round_and_apart(length: float, pixels: float, found: list[float]) -> None:
    assert ticks(length, pixels) == pytest.approx(found)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.25, "", "0.25"),
        (1456749, "", "1,456,749"),
        (2.5e31, "", "2.5e+31"),
        (999.6, "FLOP", "999.6 FLOP"),
        (3.02e10, "FLOP", "30.2 GFLOP"),
        (0, "B", "0 B"),
    ],
)
def test_amounts_are_for_people(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text
