"""`parallel.compile` changes how blocks are computed, and nothing that is computed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from phalanx.parallel.config import ActivationCheckpoint
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import PrecisionConfig
from tests.small_run import make_config, make_engine, rank_batch

pytestmark = [pytest.mark.slow, pytest.mark.verify]

NUM_LAYERS = 9
"""More than dynamo's limit of 8 recompilations: blocks have to share their graphs."""


def steps(
    ranks: Ranks, layout: dict[str, int], checkpoint: ActivationCheckpoint, compiled: bool
) -> tuple[list[float], int]:
    """Losses and gradient norms of two batches, an evaluation; graphs that dynamo made."""
    from torch._dynamo.utils import counters

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found = []
    with process_group(ranks):
        config = make_config(num_layers=NUM_LAYERS, precision=PrecisionConfig(), **layout)
        parallel = replace(config.parallel, compile=compiled, activation_checkpoint=checkpoint)
        engine = make_engine(ranks, replace(config, parallel=parallel))
        for number in range(2):
            gradients = engine.gradients(rank_batch(engine, number=number))
            found += [gradients.loss, gradients.norm]
            # No update: AdamW's first one turns the rounding of tiny gradients into whole steps.
            for parameter in engine.model.parameters.values():
                parameter.grad = None
        found.append(engine.evaluate([rank_batch(engine, number=2)]))
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("layout", "checkpoint"),
    [
        *(({"dp_shard": 2}, checkpoint) for checkpoint in ActivationCheckpoint),
        *(({"tp": 2, "dp_shard": 1}, checkpoint) for checkpoint in ActivationCheckpoint),
        ({"pp": 2, "dp_shard": 1}, ActivationCheckpoint.none),
    ],
    ids=str,
)
def test_same_losses(
    run_ranks: Callable[..., list[Any]],
    layout: dict[str, int],
    checkpoint: ActivationCheckpoint,
) -> None:
    (plain, no_graphs), _ = run_ranks(steps, layout, checkpoint, False, world_size=2)
    (compiled, graphs), _ = run_ranks(steps, layout, checkpoint, True, world_size=2)
    assert compiled == pytest.approx(plain, rel=1e-6)
    assert no_graphs == 0
    assert 1 <= graphs <= 4  # with and without gradients, not one a block
