"""Weight gradients from the store in every layout: one process's, the same bits early or late."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phalanx.parallel.apply import parallelize
from phalanx.parallel.config import ActivationCheckpoint
from phalanx.parallel.executor import Inputs
from phalanx.parallel.grad_norm import settle_partial
from phalanx.parallel.mesh import Mesh, build_mesh
from phalanx.parallel.pipeline.wgrad import WeightGradientStore
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.shard import Sharder, Sharding
from phalanx.train.config import Config, Precision, PrecisionConfig
from phalanx.train.engine.build import torch_dtypes
from phalanx.train.engine.loss import token_loss
from phalanx.train.model.init import init_weights
from phalanx.train.model.plan import plan_for
from phalanx.train.model.transformer import Transformer
from tests.small_run import make_batch, make_config, reference_loss, reference_model

pytestmark = pytest.mark.pipeline

NONE, SELECTIVE, FULL = (
    ActivationCheckpoint.none,
    ActivationCheckpoint.selective,
    ActivationCheckpoint.full,
)
TP_LAYOUTS: list[tuple[dict[str, Any], ActivationCheckpoint]] = [
    ({"tp": 2, "dp_shard": 1}, NONE),
    ({"tp": 2, "dp_shard": 1, "tied": True}, FULL),
    ({"tp": 2, "dp_shard": 1}, SELECTIVE),
]
DP_LAYOUTS: list[tuple[dict[str, Any], ActivationCheckpoint]] = [
    ({"dp_shard": 4, "stage": 3}, NONE),
    ({"dp_shard": 4, "stage": 1, "tied": True}, FULL),
    ({"dp_replicate": 2, "dp_shard": 2, "stage": 2}, SELECTIVE),
    ({"tp": 2, "dp_shard": 2, "stage": 3}, FULL),
    ({"tp": 2, "dp_shard": 2, "stage": 1, "tied": True}, NONE),
]
MICROBATCHES = 2


def build(
    config: Config, mesh: Mesh, store: WeightGradientStore | None
) -> tuple[Transformer, Sharding]:
    """The whole model, parallelized as training does it."""
    dtypes = torch_dtypes(config.precision)
    with torch.device("meta"):
        model = Transformer(config.model).to(dtypes.params)
    sharding = parallelize(
        model,
        plan_for(model),
        mesh,
        config=config.parallel,
        sharder=Sharder(mesh, config.zero, dtypes),
        store=store,
    )
    model.to_empty(device="cpu")
    model.tie_weights()
    init_weights(model, config.model, seed=config.training.seed)
    return model, sharding


def backward(
    model: nn.Module, sharding: Sharding, config: Config, mesh: Mesh, store: Any, late: bool
) -> list[int]:
    """Two microbatches; `late`: the second's B comes before the first's W, as in a pipeline.

    Returns how many weight gradients each left for W.
    """
    batch = make_batch(config, rank=mesh.dp_rank, size=mesh.dp_size)
    extra = {"positions_BS": batch.positions_BS, "document_BS": batch.document_BS}
    inputs = Inputs(batch.tokens_BS, batch.labels_BS, extra)  # type: ignore[arg-type]
    loss_fn = token_loss(mesh, make_batch(config).num_valid)
    taken, left = [], []
    for index, part in enumerate(inputs.split(MICROBATCHES)):
        loss = loss_fn(model(part.tokens_BS, **part.extra), part.target_BS)
        if late:
            sharding.before_input_gradient()
        else:
            sharding.before_backward(last=index == MICROBATCHES - 1)
        with store.deferring() if late else nullcontext():
            loss.backward()
        if late:
            left.append(len(store._queue))
            taken.append(store.take())
    for index, compute in enumerate(taken):
        compute()
        sharding.after_weight_gradient(last=index == MICROBATCHES - 1)
    return left


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def measured(
    ranks: Ranks, cases: list[tuple[dict[str, Any], ActivationCheckpoint]], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """By case: gradients by autograd, early and late; placements; how many came late."""
    found = []
    compiled = options.get("compile", False)
    if compiled:
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    with process_group(ranks):
        for layout, mode in cases:
            config = make_config(
                num_layers=options.get("num_layers", 2),
                **({"precision": options["precision"]} if "precision" in options else {}),
                **layout,
            )
            mesh = build_mesh(config.parallel, world_size=ranks.world_size, device_type="cpu")
            result: dict[str, Any] = {}
            for name in ("autograd", "early", "late"):
                ours = name != "autograd"
                parallel = replace(
                    config.parallel,
                    activation_checkpoint=mode if ours else NONE,
                    compile=compiled and ours,
                )
                store = WeightGradientStore() if ours else None
                model, sharding = build(replace(config, parallel=parallel), mesh, store)
                parameters = dict(model.named_parameters())
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    left = backward(model, sharding, config, mesh, store, name == "late")
                placements = {
                    n: str(p.grad.placements)
                    for n, p in parameters.items()
                    if isinstance(p.grad, DTensor)
                }
                settle_partial(parameters.values())
                grads = {n: whole(p.grad) for n, p in parameters.items() if p.grad is not None}
                assert list(grads) == list(parameters)
                assert all(p.grad.dtype == p.dtype for p in parameters.values())
                result[name] = {
                    "grads": {n: grad.clone() for n, grad in grads.items()},
                    "placements": placements,
                    "left": left,
                    "warned": [str(w.message) for w in caught if "computed in B" in str(w.message)],
                }
            found.append(result)
    return found


def check(
    results: list[list[dict[str, Any]]],
    cases: list[Any],
    *,
    left: int,
    rtol: float = 1e-12,
    same_bits: bool = True,
) -> None:
    """Autograd's gradients on every rank, early and late the same; `left` for W each time."""
    for rank in results:
        assert len(rank) == len(cases)
        for (layout, mode), found in zip(cases, rank, strict=True):
            label = f"{layout} {mode}"
            expected = found["autograd"]["grads"]
            for name, early in found["early"]["grads"].items():
                late = found["late"]["grads"][name]
                assert not same_bits or torch.equal(early, late), f"{label}: {name}"
                error = float((late - expected[name]).norm() / expected[name].norm())
                assert error < rtol, f"{label}: {name}: {error}"
            for when in ("early", "late"):
                assert found[when]["placements"] == found["autograd"]["placements"], label
            assert found["early"]["left"] == []
            assert found["late"]["left"] == [left] * MICROBATCHES, label


def check_reference(results: list[list[dict[str, Any]]], cases: list[Any]) -> None:
    for index, (layout, _) in enumerate(cases):
        config = make_config(num_layers=2, **layout)
        model = reference_model(config)
        reference_loss(model, make_batch(config)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                results[0][index]["late"]["grads"][name], parameter.grad, rtol=1e-12, atol=1e-14
            )


WEIGHTS = 2 * (7 + 4) + 3
"""Modules with weights: linear layers and norms of two blocks; embedding, norm, head."""


def test_tensor_parallel(run_ranks: Callable[..., list[Any]]) -> None:
    results = run_ranks(measured, TP_LAYOUTS, {}, world_size=2)
    check(results, TP_LAYOUTS, left=WEIGHTS)
    check_reference(results, TP_LAYOUTS)


def test_sharded(run_ranks: Callable[..., list[Any]]) -> None:
    results = run_ranks(measured, DP_LAYOUTS, {}, world_size=4)
    check(results, DP_LAYOUTS, left=WEIGHTS)
    check_reference(results, DP_LAYOUTS)


@pytest.mark.slow
def test_bf16_compute(run_ranks: Callable[..., list[Any]]) -> None:
    """Norms' inputs meet one rounding more or less; the sums over microbatches stay fp32."""
    cases = [({"dp_shard": 2, "stage": stage}, NONE) for stage in (0, 2, 3)]
    options = {"precision": PrecisionConfig(compute=Precision.bf16)}
    check(run_ranks(measured, cases, options, world_size=2), cases, left=WEIGHTS, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "stage"), [(NONE, 1), (FULL, 1), (NONE, 3), (FULL, 3)], ids=str)
def test_compiled(
    run_ranks: Callable[..., list[Any]], mode: ActivationCheckpoint, stage: int
) -> None:
    """More blocks than dynamo's limit of recompilations. Compiled norms are part of B.

    ZeRO 3 reduces what there is at each W: norms' gradients of both microbatches at the first.
    """
    options = {"compile": True, "num_layers": 9}
    cases = [({"dp_shard": 2, "stage": stage}, mode)]
    results = run_ranks(measured, cases, options, world_size=2)
    check(results, cases, left=9 * 7 + 3, same_bits=stage == 1)
    assert results[0][0]["late"]["warned"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "mode", "why"),
    [
        ({"tp": 2, "dp_shard": 1}, NONE, "parallel.tp=2"),
        ({"tp": 2, "dp_shard": 1}, FULL, "parallel.tp=2"),
        ({"dp_shard": 2, "stage": 1}, SELECTIVE, "parallel.activation_checkpoint=selective"),
    ],
    ids=str,
)
def test_compiled_blocks_that_cannot_defer_say_so(
    run_ranks: Callable[..., list[Any]],
    layout: dict[str, Any],
    mode: ActivationCheckpoint,
    why: str,
) -> None:
    """Their gradients are right all the same; embedding, norm and head still wait for W."""
    cases = [(layout, mode)]
    results = run_ranks(measured, cases, {"compile": True}, world_size=2)
    check(results, cases, left=3)
    for rank in results:
        assert len(rank[0]["late"]["warned"]) == MICROBATCHES
        assert all(why in message for message in rank[0]["late"]["warned"])
        assert rank[0]["early"]["warned"] == []
