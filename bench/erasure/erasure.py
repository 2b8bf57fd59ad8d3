"""`phalanx bench erasure`: parities made and units rebuilt, beside libraries and a copy.

In this process, on one thread; throughputs count bytes of the data, whatever the code adds to them.
`rebuild` makes as many units of data anew as there are parities; `fold` makes the parities of
units that come one at a time, as they come from nodes. All sides take turns, and each has rebuilt
what was lost before it is timed, so that nobody times wrong bytes.
"""

import sys
import time
from collections.abc import Callable, Iterator

from phalanx.bench.erasure.sides import MEMCPY, OURS, Memory, Ours, Side, sides
from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.rounds import ROUNDS, STEPS, rounds
from phalanx.checkpoint.erasure.stripes import Stripes

CODES = ((4, 1), (4, 2), (8, 2), (10, 4))
"""Units of data and of parity; one parity is XOR."""
SIZE = 1 << 29
"""Bytes of data, about: more than caches hold."""


def bench(request: Request, *, size: int = SIZE) -> list[Figure]:
    """GB/s of our codec beside each other side's, by code and what is done.

    Args:
        request: what is asked; only bench.rounds and bench.steps count.
        size: about how many bytes of data.
    """
    settings = request.config.bench
    contenders, missing = sides()
    for side in missing:
        print(f"bench erasure: {side}; left out", file=sys.stderr)
    figures: list[Figure] = []
    for k, m in CODES:
        memory = Memory.make(k, m, Stripes.for_lengths([size] * (k + m), m).unit_bytes)
        running = {name: make(memory) for name, make in contenders.items()}
        calls = _calls(f"{k}+{m}", running)
        turns = {"count": settings.rounds or ROUNDS, "steps": settings.steps or STEPS}
        seconds = _take_turns(calls, **turns)
        figures += _figures(seconds, sum(map(len, memory.data)))
    return figures


def _calls(code: str, running: dict[str, Side]) -> dict[tuple[str, str], Callable[[], None]]:
    """What is timed, by what is done and by side, in turn; each called once before.

    Raises:
        RuntimeError: a side rebuilds something else than was lost.
    """
    calls: dict[str, dict[str, Callable[[], None]]] = {"encode": {}, "rebuild": {}, "fold": {}}
    for name, side in running.items():
        makers = {"encode": side.encode} | ({"fold": side.fold} if isinstance(side, Ours) else {})
        for what, make in makers.items():
            make()
            side.rebuild()
            if not side.check():
                raise RuntimeError(f"bench erasure: {name} rebuilds wrong bytes of {code} ({what})")
            calls[what][name] = make
        calls["rebuild"][name] = side.rebuild
    return {
        (f"{code}.{what}", name): call
        for what, by_side in calls.items()
        for name, call in by_side.items()
    }


def _take_turns(
    calls: dict[tuple[str, str], Callable[[], None]], *, count: int, steps: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of one call, a round each; every second round goes backwards."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for order in rounds(calls, count):
        for key in order:
            begin = time.perf_counter()
            for _ in range(steps):
                calls[key]()
            seconds[key].append((time.perf_counter() - begin) / steps)
    return seconds


def _figures(seconds: dict[tuple[str, str], list[float]], num_bytes: int) -> Iterator[Figure]:
    rates = {key: [num_bytes / s / 1e9 for s in turns] for key, turns in seconds.items()}
    for (what, name), theirs in rates.items():
        if name != OURS:
            title = f"erasure.{what}.{name}"
            ours = rates[what, OURS]
            yield compared(title, "GB/s", name, ours, theirs, less_is_better=False)
    for (what, _), ours in rates.items():
        if what.endswith(".fold"):
            copies = rates[what.replace(".fold", ".encode"), MEMCPY]
            title = f"erasure.{what}.{MEMCPY}"
            yield compared(title, "GB/s", MEMCPY, ours, copies, less_is_better=False)
