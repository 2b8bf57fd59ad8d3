"""Initial weights depend on names and the seed, never on how a parameter is cut."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.config import PrecisionConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.init import ROWS_PER_BLOCK, init_weights
from phalanx.train.model.transformer import Transformer
from tests.small_run import make_config, make_engine

FP32 = PrecisionConfig()
LAYOUTS: list[dict[str, Any]] = [
    {"dp_shard": 4},
    {"dp_shard": 4, "stage": 0},
    {"dp_replicate": 2, "dp_shard": 2},
    {"tp": 2, "dp_shard": 1, "dp_replicate": 2},
    {"tp": 2, "dp_shard": 2},
    {"pp": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2, "schedule": "interleaved"},
    {"pp": 4},
]
COLUMN_CUT = ("wo.weight", "w2.weight")
ROW_CUT = ("wq", "wk", "wv", "w1", "w3", "embed", "head")


def weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    model = Transformer(config)
    init_weights(model, config, seed=seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def expected_shard(whole: Tensor, name: str, engine: Any) -> Tensor:
    """What a rank holds: tensor parallelism cuts first, then the sharding ranks cut the rows."""
    mesh, part = engine.mesh, whole
    if name.endswith(COLUMN_CUT):
        part = part.chunk(mesh.size("tp"), dim=1)[mesh.rank("tp")]
    elif any(key in name for key in ROW_CUT):
        part = part.chunk(mesh.size("tp"), dim=0)[mesh.rank("tp")]
    if engine.config.zero.stage == 0 or mesh.size("dp_shard") == 1:
        return part
    pieces = part.chunk(mesh.size("dp_shard"), dim=0)
    rank = mesh.rank("dp_shard")
    return pieces[rank] if rank < len(pieces) else part[:0]


def differing_shards(ranks: Ranks, tied: bool) -> list[str]:
    """Layouts and parameters whose shard here is not the cut of the whole, bit for bit."""
    wrong = []
    with process_group(ranks):
        for layout in LAYOUTS:
            config = make_config(tied=tied, precision=FP32, **layout)
            whole = weights(config.model, config.training.seed)
            engine = make_engine(ranks, config)
            for name, parameter in engine.model.parameters.items():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                if not torch.equal(local, expected_shard(whole[name], name, engine)):
                    wrong.append(f"{layout} {name}")
    return wrong


@pytest.mark.parametrize("tied", [False, True])
def test_a_shard_is_the_cut_of_the_whole(run_ranks: Callable[..., list[Any]], tied: bool) -> None:
    assert run_ranks(differing_shards, tied, world_size=4) == [[], [], [], []]


BIG = ModelConfig(
    vocab_size=1000,
    dim=128,
    num_layers=2,
    num_heads=4,
    ffn_dim=256,
    qk_norm=True,
    attention_bias=True,
    init_std=0.03,
)


def test_standard_deviations() -> None:
    for name, weight in weights(BIG, 1).items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            std = 0.03 / math.sqrt(2 * 2) if residual else 0.03
            # Five standard errors of the estimates.
            assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * weight.numel()), name
            assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name


def test_names_blocks_and_seeds_matter() -> None:
    first, again, other = weights(BIG, 1), weights(BIG, 1), weights(BIG, 2)
    matrices = [name for name, weight in first.items() if weight.dim() == 2]
    corners = set()
    for name in matrices:
        assert torch.equal(first[name], again[name]), name
        assert not torch.isclose(first[name], other[name]).all(dim=1).any(), name
        corners |= {float(value) for value in first[name][::ROWS_PER_BLOCK, 0]}
        corners |= {float(value) for value in other[name][::ROWS_PER_BLOCK, 0]}
    blocks = sum(math.ceil(first[name].shape[0] / ROWS_PER_BLOCK) for name in matrices)
    assert len(corners) == 2 * blocks, "two blocks draw the same numbers"


def test_global_random_state_is_neither_read_nor_moved() -> None:
    config = make_config().model
    model = Transformer(config)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    init_weights(model, config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = weights(config, 1)
    assert all(torch.equal(p, second[name]) for name, p in model.named_parameters())


def test_every_parameter_is_written() -> None:
    model = Transformer(BIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_weights(model, BIG, seed=1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
