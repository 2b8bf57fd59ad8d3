"""What the meter counts of a pipeline, of tensor parallelism and of control, byte for byte."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import _functional_collectives as functional

from phalanx.parallel.comm_meter import CommMeter, Traffic
from phalanx.parallel.exact_sum import bins_of
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.tensor.traffic import TensorTraffic
from phalanx.train.config import Config
from tests.small_run import make_config, make_engine, rank_batch

MICROBATCHES = 8
SIZE = 8
"""Bytes of an fp64 number."""
BINS = SIZE * bins_of(torch.zeros(1, dtype=torch.float64)).numel()
"""Bytes of a sum's bins."""


def step_traffic(ranks: Ranks, *configs: Config) -> list[dict[str, Traffic]]:
    """What this rank sends in a second step of each configuration."""
    found = []
    with process_group(ranks):
        for config in configs:
            engine = make_engine(ranks, config)
            meter = engine.mesh.meter
            with TensorTraffic(meter, tensor_parallel=config.parallel.tp > 1, compiled=False):
                for number in range(2):
                    meter.take()
                    engine.update(engine.gradients(rank_batch(engine, number=number)), lr=1e-3)
            found.append(meter.take())
    return found


def tokens_bytes(config: Config) -> int:
    """What the residual stream of a microbatch takes, on all tensor-parallel ranks together."""
    return config.training.seq_len * config.model.dim * SIZE


def test_a_pipeline_sends_an_activation_and_a_gradient_a_microbatch_and_boundary(
    run_ranks: Callable[..., list[Any]],
) -> None:
    cases = [(schedule, tied) for schedule in ("1f1b", "zb_v") for tied in (False, True)]
    configs = [make_config(pp=2, schedule=schedule, tied=tied) for schedule, tied in cases]
    data_parallel = make_config(dp_shard=2)
    for by_case in run_ranks(step_traffic, *configs, data_parallel, world_size=2, nodes=2):
        for (schedule, tied), config, sent in zip(cases, configs, by_case, strict=False):
            # Stages of a V: ranks 0 1 1 0, so that each rank sends both ways over the two
            # boundaries between ranks; and the tied weight's gradients meet on the first rank.
            crossings = 2 if schedule == "zb_v" else 1
            messages = crossings * MICROBATCHES * tokens_bytes(config)
            weight = config.model.vocab_size * config.model.dim * SIZE
            exchanged = weight if tied and schedule == "1f1b" else 0
            assert sent["pipeline"] == Traffic(between=messages + exchanged), (schedule, tied)
            # One all-reduce of the loss, the norms and the stop request, over a ring of two.
            assert sent["control"] == Traffic(between=3 * BINS)
            assert set(sent) == {"pipeline", "control"}
        # Before it, one of the tokens that are learned from.
        assert by_case[-1]["control"] == Traffic(between=SIZE + 3 * BINS)


def test_tensor_parallelism_sends_two_gathers_and_two_scatters_a_block_and_pass(
    run_ranks: Callable[..., list[Any]],
) -> None:
    """Korthikanti et al. (2022), section 4.2.2; every rank sends its half of what is gathered, and
    the other's half of what is scattered."""
    config = make_config(tp=2, num_layers=3)
    pipeline = make_config(pp=2, num_layers=3)
    counted = run_ranks(step_traffic, config, pipeline, world_size=2)
    half = tokens_bytes(config) // 2
    blocks = 4 * config.model.num_layers
    embedding_and_head = 2
    there_and_back = 2
    stream = MICROBATCHES * there_and_back * (blocks + embedding_and_head) * half
    # The loss: a token's highest logit, then its sum and its label's logit, in rings of two.
    loss = MICROBATCHES * config.training.seq_len * 3 * SIZE
    norms = norm_bytes(config)
    for sent, in_pipeline in counted:
        assert sent["tensor"] == Traffic(inside=stream + loss + norms)
        assert sent["control"] == Traffic(inside=3 * BINS)
        assert in_pipeline["pipeline"] == Traffic(inside=MICROBATCHES * tokens_bytes(config))


def norm_bytes(config: Config) -> int:
    """Norms see a part of the tokens each, so that their gradients are all-reduced, in rings."""
    model = config.model
    head_norms = 2 * model.size_of_head
    return (model.num_layers * (2 * model.dim + head_norms) + model.dim) * SIZE


def unseen(ranks: Ranks, config: Config) -> tuple[dict[str, Traffic], bool]:
    """As `step_traffic`, where blocks are said to be compiled; whether torch was left alone."""
    with process_group(ranks):
        engine = make_engine(ranks, config)
        before = functional.all_reduce
        with TensorTraffic(engine.mesh.meter, tensor_parallel=True, compiled=True):
            alone = functional.all_reduce is before
            engine.gradients(rank_batch(engine))
        return engine.mesh.meter.take(), alone


def test_compiled_blocks_make_the_count_nan(run_ranks: Callable[..., list[Any]]) -> None:
    config = make_config(tp=2, num_layers=1)
    for sent, alone in run_ranks(unseen, config, world_size=2):
        assert math.isnan(sent["tensor"].inside)
        assert sent["control"].inside > 0
        assert alone


def test_torch_is_restored_after_an_error() -> None:
    names = ("all_gather_tensor", "reduce_scatter_tensor", "all_reduce")
    before = [getattr(functional, name) for name in names]
    meter = CommMeter(rank=0, ranks_per_node=1)
    try:
        with TensorTraffic(meter, tensor_parallel=True, compiled=False) as traffic:
            assert functional.all_reduce is not before[2]
            with pytest.raises(RuntimeError, match="entered already"):
                traffic.__enter__()
            raise KeyError
    except KeyError:
        pass
    assert [getattr(functional, name) for name in names] == before
