"""bf16 compute over fp32 master weights: close to fp32, and fp32 where it has to be.

bf16 keeps 8 bits, so one operation errs by up to 2**-9 relative. The layers' roundings mostly
cancel in a mean over tokens: 1% of the loss is generous, and a model that computed in a coarser
format, or trained other weights, would miss it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import Precision, PrecisionConfig
from phalanx.train.engine.step import Engine
from tests.small_run import (
    make_batch,
    make_config,
    make_engine,
    rank_batch,
    reference_loss,
    reference_model,
)

BF16 = PrecisionConfig(compute=Precision.bf16)
BF16_REDUCE = PrecisionConfig(compute=Precision.bf16, reduce=Precision.bf16)
TOLERANCE = 0.01
LAYOUTS: list[dict[str, Any]] = [
    {"dp_shard": 2},
    {"dp_shard": 2, "stage": 0},
    {"tp": 2, "dp_shard": 1, "microbatch": 4},
    {"pp": 2, "dp_shard": 1, "microbatch": 2},
]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(ranks: Ranks) -> list[dict[str, Any]]:
    """By layout: three losses, formats seen, and the widths at the head."""
    found = []
    with process_group(ranks):
        for layout in LAYOUTS:
            engine = make_engine(ranks, make_config(precision=BF16, **layout))
            computed: set[torch.dtype] = set()
            for stage in engine.model.stages.values():
                for block in stage.layers.values():
                    block.feed_forward.w1.register_forward_hook(
                        lambda module, args, out, seen=computed: seen.add(out.dtype)
                    )
            losses, gradients = [], set()
            for number in range(3):
                step = engine.gradients(rank_batch(engine, number=number))
                gradients |= {p.grad.dtype for p in engine.model.parameters.values()}
                engine.update(step, 1e-2)
                losses.append(step.loss)
            tensors = engine.state_tensors()
            found.append(
                {
                    "losses": losses,
                    "evaluation": engine.evaluate([rank_batch(engine, number=3)]),
                    "computed": computed,
                    "gradients": gradients,
                    "state": {tensor.dtype for tensor in tensors.values()},
                    "rounded": all(
                        torch.equal(local(t), local(t).bfloat16().float())
                        for name, t in tensors.items()
                        if name.endswith("w1.weight")
                    ),
                }
            )
    return found


def fp32_losses() -> tuple[list[float], float]:
    """Three steps of one process in fp32, and the loss after them."""
    config = make_config(precision=PrecisionConfig())
    model = reference_model(config, torch.float32)
    optim = config.optim
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    losses = []
    for number in range(3):
        loss = reference_loss(model, make_batch(config, number=number))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return losses, float(reference_loss(model, make_batch(config, number=3)))


def test_bf16_compute_trains_fp32_weights(run_ranks: Callable[..., list[Any]]) -> None:
    losses, evaluation = fp32_losses()
    for rank in run_ranks(trained, world_size=2):
        for layout, found in zip(LAYOUTS, rank, strict=True):
            assert found["losses"] == pytest.approx(losses, rel=TOLERANCE), layout
            assert found["losses"] != pytest.approx(losses, rel=1e-6), "computed in fp32"
            assert found["evaluation"] == pytest.approx(evaluation, rel=TOLERANCE), layout
            assert found["computed"] == {torch.bfloat16}, layout
            assert found["gradients"] == {torch.float32}, layout
            assert found["state"] == {torch.float32}, layout
            assert not found["rounded"], f"{layout}: master weights hold bf16 numbers only"


def share_of_wide_gradients(engine: Engine) -> float:
    """Share of this rank's gradient numbers that bf16 cannot hold."""
    gradients = [local(p.grad) for p in engine.model.parameters.values() if p.grad is not None]
    numbers = torch.cat([gradient.flatten() for gradient in gradients])
    return float((numbers != numbers.bfloat16().float()).float().mean())


def reduced(ranks: Ranks, precision: PrecisionConfig) -> list[float]:
    """By ZeRO stage: the share of gradient numbers beyond bf16, after one microbatch."""
    shares = []
    with process_group(ranks):
        for stage in (3, 0):
            config = make_config(precision=precision, dp_shard=2, stage=stage)
            training = replace(config.training, microbatch_size=4)
            engine = make_engine(ranks, replace(config, training=training))
            engine.gradients(rank_batch(engine))
            shares.append(share_of_wide_gradients(engine))
    return shares


def test_gradients_are_reduced_in_fp32(run_ranks: Callable[..., list[Any]]) -> None:
    """A sum of two ranks' bf16 gradients mostly needs more than 8 bits, unless it is cut."""
    for shares in run_ranks(reduced, BF16, world_size=2):
        assert all(share > 0.3 for share in shares), shares


def test_gradients_are_reduced_in_bf16_where_asked(run_ranks: Callable[..., list[Any]]) -> None:
    for shares in run_ranks(reduced, BF16_REDUCE, world_size=2):
        assert shares == [0.0, 0.0]


def accumulated(ranks: Ranks, layouts: list[dict[str, Any]]) -> list[float]:
    """By layout without data parallelism: the share of 4 microbatches' sums beyond bf16."""
    shares = []
    with process_group(ranks):
        for layout in layouts:
            config = make_config(precision=BF16, dp_shard=1, **layout)
            training = replace(config.training, microbatch_size=2)
            engine = make_engine(ranks, replace(config, training=training))
            engine.gradients(rank_batch(engine))
            shares.append(share_of_wide_gradients(engine))
    return shares


@pytest.mark.parametrize("pp", [1, 2])
def test_microbatches_are_added_up_in_fp32(run_ranks: Callable[..., list[Any]], pp: int) -> None:
    """On one data-parallel rank one microbatch's gradient fits bf16; the sum of four does not."""
    layouts = [{"pp": pp, "stage": stage} for stage in range(4)]
    for shares in run_ranks(accumulated, layouts, world_size=pp):
        assert len(shares) == 4
        assert all(share > 0.3 for share in shares), shares
