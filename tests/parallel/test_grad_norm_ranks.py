"""The global gradient norm and clipping in every layout, against one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.grad_norm import (
    clip_gradients,
    local_squares,
    nonfinite,
    settle_partial,
)
from phalanx.parallel.mesh import Mesh, build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.engine.loss import world_sums
from tests.small_run import (
    make_batch,
    make_config,
    make_engine,
    rank_batch,
    reference_loss,
    reference_model,
)

LAYOUTS: list[dict[str, Any]] = [
    {"dp_shard": 4},
    {"dp_shard": 4, "stage": 0},
    {"dp_shard": 4, "stage": 1},
    {"dp_shard": 4, "stage": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"tp": 2, "dp_shard": 2, "microbatch": 2},
    {"tp": 2, "dp_replicate": 2, "dp_shard": 1, "microbatch": 2},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2, "microbatch": 2},
    {"pp": 2, "tp": 2, "schedule": "interleaved", "microbatch": 2},
    {"pp": 4, "schedule": "gpipe", "microbatch": 2},
    {"pp": 2, "dp_shard": 2, "stage": 0, "schedule": "interleaved"},
]
SHARE = 0.3
"""Clipping limit / norm."""


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_errors(ranks: Ranks, tied: bool, reference: dict[str, Tensor], norm: float) -> Any:
    """By layout: errors of loss-scaled norm, of the norm after clipping, of clipped gradients."""
    errors: dict[str, tuple[float, float, float]] = {}
    with process_group(ranks):
        for layout in LAYOUTS:
            config = make_config(tied=tied, **layout)
            engine = make_engine(ranks, config)
            gradients = engine.gradients(rank_batch(engine))
            parameters = engine.model.parameters
            clip_gradients(parameters.values(), gradients.norm, SHARE * norm)
            squares = local_squares(engine.model.counted_parameters, engine.device)
            clipped_norm = world_sums([squares], engine.mesh)[0] ** 0.5
            worst = max(
                float((whole(p.grad) - SHARE * reference[n]).norm()) / (SHARE * norm)
                for n, p in parameters.items()
                if p.grad is not None
            )
            assert all(p.grad is not None for p in parameters.values())
            errors[str(layout)] = (
                abs(gradients.norm / norm - 1),
                abs(clipped_norm / (SHARE * norm) - 1),
                worst,
            )
    return errors


@pytest.mark.parametrize("tied", [False, True])
def test_norm_and_clipping_equal_one_process(
    run_ranks: Callable[..., list[Any]], tied: bool
) -> None:
    config = make_config(tied=tied)
    model = reference_model(config)
    reference_loss(model, make_batch(config)).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = float(nn.utils.get_total_norm(gradients.values()))
    for errors in run_ranks(relative_errors, tied, gradients, norm, world_size=4):
        assert len(errors) == len(LAYOUTS)
        for layout, found in errors.items():
            assert max(found) < 1e-11, f"{layout}: norm, clipped norm, gradients: {found}"


def placed(mesh: Mesh, local: Tensor, placement: Any) -> nn.Parameter:
    """A parameter with a gradient, each over the tensor-parallel ranks."""
    kept = Replicate() if isinstance(placement, Partial) else placement
    axis = mesh.axis("tp")
    parameter = nn.Parameter(DTensor.from_local(torch.zeros_like(local), axis, [kept]))
    parameter.grad = DTensor.from_local(local, axis, [placement])
    return parameter


def counted_once(ranks: Ranks) -> dict[str, float]:
    """Squared norms of gradients of known numbers, summed over 2 ranks."""
    with process_group(ranks):
        config = ParallelConfig(tp=2, dp_shard=1)
        mesh = build_mesh(config, world_size=2, device_type="cpu")

        def square(parameter: nn.Parameter) -> float:
            share = local_squares([parameter], torch.device("cpu"))
            assert share.dtype == torch.float64
            return world_sums([share], mesh)[0]

        partial = placed(mesh, torch.tensor([1.0, 2.0]) * (ranks.rank + 1), Partial())
        settle_partial([partial])
        assert partial.grad.placements == (Replicate(),)
        huge = placed(mesh, torch.full((2,), 1e30), Shard(0))
        none = nn.Parameter(torch.ones(3))
        empty = placed(mesh, torch.ones(1 - ranks.rank, 2), Shard(0))
        return {
            "replicated": square(placed(mesh, torch.tensor([3.0, 4.0]), Replicate())),
            "sharded": square(placed(mesh, torch.tensor([3.0, 4.0]), Shard(0))),
            "partial": square(partial),
            "over fp32": square(huge),
            "without a gradient": square(none),
            "empty here": square(empty),
        }


def test_every_element_counts_once(run_ranks: Callable[..., list[Any]]) -> None:
    for found in run_ranks(counted_once, world_size=2):
        assert found == pytest.approx(
            {
                "replicated": 25.0,
                "sharded": 50.0,
                "partial": 45.0,
                "over fp32": 4e60,
                "without a gradient": 0.0,
                "empty here": 2.0,
            }
        )


def test_small_gradients_are_left_bit_for_bit() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([0.3, 0.1])
    for limit in (1.0, 0.5):
        clip_gradients([parameter], 0.5, limit)
        assert parameter.grad.tolist() == torch.tensor([0.3, 0.1]).tolist()
    clip_gradients([parameter], 0.5, 0.25)
    assert parameter.grad.tolist() == torch.tensor([0.15, 0.05]).tolist()


def test_what_is_not_finite_is_named() -> None:
    tensors = {name: torch.ones(2) for name in ("right", "nan", "inf")}
    tensors["nan"][1] = float("nan")
    tensors["inf"][0] = -float("inf")
    assert nonfinite([*tensors.items(), ("none", None)]) == ["nan", "inf"]
