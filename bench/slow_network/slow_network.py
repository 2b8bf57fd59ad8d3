"""`phalanx bench slow_network`: ZeRO++'s parts together against plain FSDP2, between nodes that
only a slow network joins.

The nodes are network namespaces of this machine (`namespaces.py`), and tc limits what leaves each.
All sides live in the same ranks and take turns: weights and gradients in 8 and 4 bits, with and
without error feedback; our plain ZeRO-3; and FSDP2. All of them compute, gather and reduce in bf16
and see the same batches, so that after their last steps losses can be compared. Bytes are those
that the kernel counted on the nodes' links. Always gloo.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from phalanx.bench.figures import Figure, Request, compared
from phalanx.bench.slow_network import namespaces
from phalanx.bench.slow_network.ranks import PEER, SIDES, NetworkTurns, last_step, measure
from phalanx.bench.turns import quiet
from phalanx.bench.zero.ways import BF16, FED_BACK, PLAIN, TOGETHER, layout, num_ranks
from phalanx.train.config import Config, Device


def bench(request: Request) -> list[Figure]:
    """Tokens per second, bytes a step, and losses.

    Raises:
        ValueError: the batch does not divide over the ranks, or this machine cannot play nodes on
            a slow network; says what is missing.
    """
    config = layout(request.config, precision=BF16)
    config = replace(config, launch=replace(config.launch, device=Device.cpu))
    size = num_ranks(config)
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as folder:
        try:
            with namespaces.nodes(config.bench.nodes) as nodes:
                config = quiet(config, Path(folder), steps=last_step(config))
                found = request.launch(
                    measure, config, nodes, world_size=size, config=config.launch
                )
        except namespaces.NoNamespacesError as error:
            raise ValueError(f"bench slow_network: {error}") from error
    return list(figures(config, found))


def figures(config: Config, found: list[NetworkTurns]) -> Iterator[Figure]:
    """What the ranks found, as figures: rank 0's clocks, and the node that sent most."""
    first = found[0]
    tokens = config.training.global_batch_size * config.training.seq_len
    rates = {side: [tokens / s for s in first.seconds[side]] for side in SIDES}
    sent = {side: float(max(rank.sent[side] for rank in found)) for side in SIDES}
    yield Figure(name="slow_network.rate", value=first.mbit, unit="Mbit/s")
    for side in SIDES:
        waited = [1 - first.quick[side] / s for s in first.seconds[side]]
        yield Figure(
            name=f"slow_network.{side}.waiting",
            value=median(waited),
            unit="of a step",
            low=min(waited),
            high=max(waited),
        )
    for side, peer in ((TOGETHER, PEER), (FED_BACK, PEER), (PLAIN, PEER), (TOGETHER, PLAIN)):
        yield compared(
            f"slow_network.{side}.vs_{peer}",
            "tokens/s",
            peer,
            rates[side],
            rates[peer],
            less_is_better=False,
        )
    for side in (TOGETHER, FED_BACK, PLAIN):
        yield compared(
            f"slow_network.{side}.without_limit",
            "tokens/s",
            PEER,
            [tokens / first.quick[side]],
            [tokens / first.quick[PEER]],
            less_is_better=False,
        )
        yield compared(
            f"slow_network.{side}.sent",
            "bytes/step",
            PEER,
            [sent[side]],
            [sent[PEER]],
            less_is_better=True,
        )
    if first.losses:
        yield from _losses(first)


def _losses(found: NetworkTurns) -> Iterator[Figure]:
    """Each side's loss at the end, and how far it is from the peer's."""
    for side in SIDES:
        yield Figure(name=f"slow_network.{side}.loss", value=found.losses[side], unit="nats/token")
    for side in SIDES:
        if side != PEER:
            gap = found.losses[side] / found.losses[PEER] - 1
            yield Figure(name=f"slow_network.{side}.loss_gap", value=gap, unit="relative")
