"""Outputs without gradients: every layout's are the whole model's, on every rank that needs them.

Shapes: B samples, S tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.parallel.executor import Inputs
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.engine.step import Engine
from phalanx.train.model.transformer import Transformer
from tests.small_run import (
    make_batch,
    make_config,
    make_engine,
    rank_batch,
    reference_logits,
    reference_loss,
    reference_model,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp_shard": {"dp_shard": 4},
    "zero 1": {"dp_shard": 4, "stage": 1},
    "tp dp": {"tp": 2, "dp_shard": 2, "tied": True, "microbatch": 2},
    "pp dp": {"pp": 2, "dp_shard": 2, "schedule": "gpipe"},
    "pp tp": {"pp": 2, "tp": 2, "microbatch": 2},
    "pp": {"pp": 4, "tied": True, "microbatch": 2},
    "interleaved": {"pp": 2, "dp_shard": 2, "schedule": "interleaved"},
    "zb_v": {"pp": 2, "dp_shard": 2, "schedule": "zb_v", "tied": True},
    "v_half tp": {"pp": 2, "tp": 2, "schedule": "v_half", "microbatch": 2},
    "interleaved tp": {"pp": 2, "tp": 2, "schedule": "interleaved", "microbatch": 2},
}
LENGTHS = [1, 16, 7]
"""Tokens of the texts whose next token is asked for."""


def texts(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocab_size, (len(LENGTHS), 16), generator=generator)


def inputs_of(engine: Engine) -> Inputs:
    batch = rank_batch(engine)
    assert batch.document_BS is not None
    extra = {"positions_BS": batch.positions_BS, "document_BS": batch.document_BS}
    return Inputs(batch.tokens_BS, batch.labels_BS, extra)


def forward_error(engine: Engine, model: Transformer, num_microbatches: int) -> float | None:
    """The largest error of an output on this rank; None where there is no head."""
    mesh, inputs = engine.mesh, inputs_of(engine)
    parts = list(engine.model.executor.forward(inputs, num_microbatches))
    if all(stage.head is None for stage in engine.model.stages.values()):
        assert not parts
        return None
    assert len(parts) == num_microbatches
    for key in ("tokens_BS", "target_BS"):
        seen = torch.cat([getattr(part, key) for part, _ in parts])
        assert torch.equal(seen, getattr(inputs, key)), key
    outputs = torch.cat([output for _, output in parts])
    assert not outputs.requires_grad
    width = engine.config.model.vocab_size // mesh.size("tp")
    columns = slice(mesh.rank("tp") * width, (mesh.rank("tp") + 1) * width)
    with torch.no_grad():
        expected = reference_logits(model, rank_batch(engine))[..., columns]
    return float((outputs - expected).abs().max())


def measured(ranks: Ranks) -> dict[str, Any]:
    """By layout: errors of outputs, evaluation loss, next logits, and what they left behind."""
    found = {}
    with process_group(ranks):
        for name, layout in LAYOUTS.items():
            config = make_config(**layout)
            engine = make_engine(ranks, config)
            before = engine.gradients(rank_batch(engine))
            for parameter in engine.model.parameters.values():
                parameter.grad = None
            model = reference_model(config)
            stages = engine.model.stages.values()
            found[name] = {
                "errors": [forward_error(engine, model, count) for count in (1, 2)],
                "loss": engine.evaluate([rank_batch(engine, number=n) for n in (1, 2)]),
                "logits": engine.next_logits(texts(config.model.vocab_size), LENGTHS),
                "same after": engine.gradients(rank_batch(engine)) == before,
                "training": all(module.training for s in stages for module in s.modules()),
            }
    return found


def expected(tied: bool) -> tuple[float, Tensor]:
    """Evaluation loss and next logits of the whole model."""
    config = make_config(tied=tied)
    model = reference_model(config)
    batches = [make_batch(config, number=n) for n in (1, 2)]
    assert batches[0].num_valid != batches[1].num_valid, "a mean of means would not be seen"
    with torch.no_grad():
        sums = [reference_loss(model, batch) * batch.num_valid for batch in batches]
        tokens = texts(config.model.vocab_size)
        logits = model(tokens, positions_BS=torch.arange(16).expand_as(tokens))
    loss = float(sum(sums)) / sum(batch.num_valid for batch in batches)
    return loss, logits[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1]


def test_outputs_evaluation_and_next_token(run_ranks: Callable[..., list[Any]]) -> None:
    ranks = run_ranks(measured, world_size=4)
    for name, layout in LAYOUTS.items():
        loss, logits = expected(layout.get("tied", False))
        errors = [rank[name]["errors"] for rank in ranks if rank[name]["errors"] != [None, None]]
        assert len(errors) == 4 // layout.get("pp", 1), f"{name}: ranks with a head"
        assert all(error < 1e-12 for pair in errors for error in pair), name
        for found in (rank[name] for rank in ranks):
            assert found["loss"] == ranks[0][name]["loss"], name
            assert found["loss"] == pytest.approx(loss, rel=1e-12), name
            assert found["logits"].shape == logits.shape
            assert torch.equal(found["logits"], ranks[0][name]["logits"]), name
            torch.testing.assert_close(found["logits"], logits.float(), rtol=1e-6, atol=1e-6)
            assert found["same after"], name
            assert found["training"], name


def test_microbatches_are_equal_parts_in_order() -> None:
    rows = torch.arange(6)
    parts = Inputs(rows, rows + 10, {"positions_BS": rows + 20}).split(3)
    assert [part.tokens_BS.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part.target_BS.tolist() for part in parts] == [[10, 11], [12, 13], [14, 15]]
    positions = [part.extra["positions_BS"].tolist() for part in parts]
    assert positions == [[20, 21], [22, 23], [24, 25]]
