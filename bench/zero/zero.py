"""`phalanx bench zero`: bytes that quantized ZeRO-3 sends, and plain ZeRO-3 beside its peers.

Bytes are counted at the collective layer, scales and padding included, over all ranks of nodes
played by this machine, with weights and gradients in bf16 where they are not quantized. What is
timed is plain ZeRO-3 in fp32 on one node of as many ranks: against DeepSpeed's, where it is
installed, and against FSDP2, in the same ranks and in turn.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.peers import deepspeed
from phalanx.bench.peers.deepspeed import DeepSpeedLoop
from phalanx.bench.peers.fsdp2 import PeerLoop
from phalanx.bench.rounds import ROUNDS, STEPS
from phalanx.bench.turns import Side, quiet, take_turns
from phalanx.bench.zero.ways import BF16, FED_BACK, FP32, PLAIN, layout, num_ranks, ways
from phalanx.parallel.comm_meter import Traffic
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Config
from phalanx.train.engine.build import batch_source
from phalanx.train.engine.step import Engine

OURS, DEEPSPEED, FSDP2 = "phalanx", "deepspeed", "fsdp2"
WARM_UP, COUNTED = 1, 2
"""First steps, of which something may be sent once only; and those whose bytes are counted."""
LINKS = ("inside", "between")


def bench(request: Request) -> list[Figure]:
    """Bytes a step by way and link, and tokens per second of plain ZeRO-3.

    Raises:
        ValueError: the batch does not divide over the ranks, or launch is not local.
    """
    counted = layout(request.config, precision=BF16)
    timed = layout(request.config, precision=FP32, one_node=True)
    peers = _peers()
    size = num_ranks(request.config)
    steps = request.config.bench.steps or STEPS
    found = request.launch(count_bytes, counted, world_size=size, config=counted.launch)
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as folder:
        timed = quiet(timed, Path(folder), steps=steps * 20)
        times = request.launch(measure_time, timed, peers, world_size=size, config=timed.launch)[0]
    tokens = timed.training.global_batch_size * timed.training.seq_len * steps
    return [*byte_figures(found), *time_figures(times, tokens=tokens, peers=peers)]


def count_bytes(ranks: Ranks, config: Config) -> dict[str, dict[str, Traffic]]:
    """What this rank sends in COUNTED steps, by way and kind."""
    found = {}
    with process_group(ranks):
        for name, zero in ways(config).items():
            if name == FED_BACK:  # changes values, not sizes
                continue
            mesh = build_mesh(
                config.parallel,
                world_size=ranks.world_size,
                device_type=ranks.device_type,
                ranks_per_node=ranks.ranks_per_node,
            )
            engine = Engine(replace(config, zero=zero), mesh, ranks.device)
            source = batch_source(config, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
            for step in range(WARM_UP + COUNTED):
                if step == WARM_UP:
                    mesh.meter.take()
                engine.update(engine.gradients(source.batch(step)), config.optim.lr.peak)
            found[name] = mesh.meter.take()
    return found


def byte_figures(found: list[dict[str, dict[str, Traffic]]]) -> Iterator[Figure]:
    """Bytes a step over all ranks and kinds, and as shares of what plain ZeRO-3 sends.

    Our plain ZeRO-3 gathers neither embedding nor head again for the backward pass. `of_zero3` are
    shares of what one sends between nodes that gathers everything twice, as ZeRO++'s authors
    count: twice the parameters that hpZ gathers there, which is each once.
    """
    total = {way: {link: _total(found, way, link) for link in LINKS} for way in found[0]}
    zero3 = total[PLAIN]["between"] - _total(found, PLAIN, "between", "params")
    zero3 += 2 * _total(found, "hpz", "between", "params")
    for way, sent in total.items():
        for link in LINKS:
            name, plain = f"zero.{way}.{link}", total[PLAIN][link]
            if way == PLAIN or not plain:  # nothing goes inside nodes of one rank
                yield Figure(name=name, value=sent[link], unit="bytes/step")
                continue
            peer = [plain]
            yield compared(name, "bytes/step", PLAIN, [sent[link]], peer, less_is_better=True)
            share = sent[link] / plain
            yield Figure(name=f"{name}_share", value=share, unit="of plain")
        share = sent["between"] / zero3
        yield Figure(name=f"zero.{way}.between_of_zero3", value=share, unit="of ZeRO-3")


def _total(
    found: list[dict[str, dict[str, Traffic]]], way: str, link: str, kind: str | None = None
) -> float:
    """Bytes a step of all ranks over a link, of one kind or all."""
    kept = [t for rank in found for k, t in rank[way].items() if kind in (None, k)]
    return float(sum(getattr(traffic, link) for traffic in kept)) / COUNTED


def measure_time(ranks: Ranks, config: Config, peers: list[str]) -> dict[str, Any]:
    """Wall and CPU seconds of each side's turns, and the loss after them."""
    steps = config.bench.steps or STEPS
    with process_group(ranks):
        sides = {OURS: Side.ours(config, ranks)}
        for name in peers:
            loop = DeepSpeedLoop(config, ranks) if name == DEEPSPEED else PeerLoop(config, ranks)
            sides[name] = Side.peer(loop, config, ranks)
        for side in sides.values():
            side.run(steps)
        turns = take_turns(sides, ranks, count=config.bench.rounds or ROUNDS, steps=steps)
        for side in sides.values():
            side.close()
    return {"wall": turns.wall, "cpu": turns.cpu, "losses": turns.losses}


def time_figures(times: dict[str, Any], *, tokens: int, peers: list[str]) -> Iterator[Figure]:
    """Ours beside each peer, for turns of `tokens` tokens."""
    rates = {side: [tokens / s for s in wall] for side, wall in times["wall"].items()}
    for peer in peers:
        yield compared(
            f"zero.tokens_per_s.{peer}",
            "tokens/s",
            peer,
            rates[OURS],
            rates[peer],
            less_is_better=False,
        )
        yield compared(
            f"zero.cpu_s.{peer}",
            "s/turn",
            peer,
            times["cpu"][OURS],
            times["cpu"][peer],
            less_is_better=True,
        )
        losses = times["losses"]
        gap = abs(losses[OURS] - losses[peer]) / losses[peer]
        yield Figure(name=f"zero.loss_gap.{peer}", value=gap, unit="relative")


def _peers() -> list[str]:
    """The peers that can run here; the one that cannot is named."""
    if deepspeed.installed():
        return [DEEPSPEED, FSDP2]
    print(
        "phalanx: note: DeepSpeed is not installed, so it is left out of the comparison; "
        "pip install 'phalanx-train[peers]'",
        file=sys.stderr,
        flush=True,
    )
    return [FSDP2]
