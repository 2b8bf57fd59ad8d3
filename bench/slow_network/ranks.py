"""What each rank does for `phalanx bench slow_network`."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from phalanx.bench.peers.fsdp2 import PeerLoop
from phalanx.bench.rounds import ROUNDS, STEPS, tell
from phalanx.bench.slow_network import namespaces
from phalanx.bench.slow_network.namespaces import Node
from phalanx.bench.turns import Side, take_turns
from phalanx.bench.zero.ways import FED_BACK, PLAIN, TOGETHER, ways
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config

PEER = "fsdp2"
SIDES = (TOGETHER, FED_BACK, PLAIN, PEER)
WARM_UP, COUNTED = 2, 2
"""First steps, of which all is made that is made once; and those whose bytes are counted."""
LAST = 10
"""Steps whose mean loss is compared."""
CLOSE, TRIES = 0.02, 4
"""How near the peer's share of waiting shall come to the one wanted, and how often to try."""


@dataclass(kw_only=True)
class NetworkTurns:
    """What one rank found, by side."""

    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that left this rank's node in a step, headers included."""
    quick: dict[str, float] = field(default_factory=dict)
    """Seconds of a step without a limit."""
    mbit: float = 0.0
    """The limit."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of a step with it, by round."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean of the last steps."""


def measure(ranks: Ranks, config: Config, nodes: list[Node]) -> NetworkTurns:
    """Run every side on a fast network, then on the slow one, then to the last step."""
    namespaces.enter(nodes[ranks.rank // ranks.ranks_per_node])
    ranks = replace(ranks, init_method=f"tcp://{nodes[0].address}:{namespaces.PORT}")
    found = NetworkTurns()
    rounds, steps = config.bench.rounds or ROUNDS, config.bench.steps or STEPS
    with process_group(ranks):
        sides = make_sides(config, ranks)
        for name, side in sides.items():
            side.run(WARM_UP)
            found.sent[name] = _sent(side)
        turns = partial(take_turns, ranks=ranks, steps=steps)
        quick = turns(sides, count=rounds).wall
        found.quick = {name: median(quick[name]) / steps for name in sides}
        found.mbit = _limited(config, ranks, sides[PEER], found, steps=steps)
        wall = turns(sides, count=rounds).wall
        found.seconds = {name: [s / steps for s in wall[name]] for name in sides}
        _set_limit(ranks, None)
        tell(ranks, "slow_network", f"{found.mbit:.1f} Mbit/s: {_shown(found)}")
        if config.bench.slow_network.loss_steps:
            end = last_step(config)
            for name, side in sides.items():
                found.losses[name] = _last_loss(side, end)
                tell(
                    ranks,
                    "slow_network",
                    f"{name}: loss {found.losses[name]:.4f} after {end} steps",
                )
        for side in sides.values():
            side.close()
    return found


def last_step(config: Config) -> int:
    """Steps that every side has done when losses are compared: those wanted, and at least as many
    as are timed before."""
    rounds, steps = config.bench.rounds or ROUNDS, config.bench.steps or STEPS
    timed = WARM_UP + COUNTED + (2 * rounds + TRIES) * steps
    return max(config.bench.slow_network.loss_steps, timed + LAST)


def make_sides(config: Config, ranks: Ranks) -> dict[str, Side]:
    """One of each of SIDES; ours write to folders of their own."""
    made = {}
    settings = ways(config)
    for name in SIDES:
        if name == PEER:
            made[name] = Side.peer(PeerLoop(config, ranks, root_stays=True), config, ranks)
        else:
            folder = str(Path(config.run.dir) / name)
            own = replace(config, zero=settings[name], run=replace(config.run, dir=folder))
            made[name] = Side.ours(own, ranks)
    return made


def rate_for(*, num_bytes: float, quick_s: float, waiting: float) -> float:
    """Megabits a second at which a step of `quick_s` seconds waits for `num_bytes` bytes for the
    share `waiting` of its time, if nothing of it overlaps."""
    return num_bytes * 8 / 1e6 / (quick_s * waiting / (1 - waiting))


def corrected(mbit: float, *, quick_s: float, slow_s: float, waiting: float) -> float:
    """A better rate, from what a step took at `mbit`: what it waited goes with 1 / rate."""
    wanted = quick_s * waiting / (1 - waiting)
    return mbit * max(slow_s - quick_s, 0.1 * wanted) / wanted


def _limited(config: Config, ranks: Ranks, peer: Side, found: NetworkTurns, *, steps: int) -> float:
    """Slow the network down, by the configured rate or until the peer waits as it shall; the rate,
    the same on every rank."""
    settings = config.bench.slow_network
    if settings.mbit is not None:
        _set_limit(ranks, settings.mbit)
        return settings.mbit
    most = torch.tensor(found.sent[PEER], dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    quick_s, share = _agreed(found.quick[PEER]), settings.waiting
    mbit = rate_for(num_bytes=float(most), quick_s=quick_s, waiting=share)
    for _ in range(TRIES):
        _set_limit(ranks, mbit)
        slow_s = _agreed(take_turns({PEER: peer}, ranks, count=1, steps=steps).wall[PEER][0])
        slow_s /= steps
        if abs(1 - quick_s / slow_s - share) <= CLOSE:
            break
        mbit = corrected(mbit, quick_s=quick_s, slow_s=slow_s, waiting=share)
    _set_limit(ranks, mbit)
    return mbit


def _set_limit(ranks: Ranks, mbit: float | None) -> None:
    """What may leave each node; collective."""
    dist.barrier()
    if ranks.rank % ranks.ranks_per_node == 0:
        namespaces.run_here(namespaces.no_limit() if mbit is None else namespaces.limit(mbit))
    dist.barrier()


def _sent(side: Side) -> float:
    """Bytes a step that leave this rank's node; collective."""
    dist.barrier()
    before = namespaces.sent_bytes()
    dist.barrier()
    side.run(COUNTED)
    dist.barrier()
    return (namespaces.sent_bytes() - before) / COUNTED


def _last_loss(side: Side, end: int) -> float:
    """Train up to step `end`; the mean loss of its LAST steps."""
    side.run(end - LAST - side.done)
    return sum(side.run(1) for _ in range(LAST)) / LAST


def _agreed(seconds: float) -> float:
    """Rank 0's clock on every rank."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.broadcast(value, 0)
    return float(value)


def _shown(found: NetworkTurns) -> str:
    return ", ".join(f"{name} {median(found.seconds[name]):.2f} s a step" for name in SIDES)
