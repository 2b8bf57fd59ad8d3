"""What each launcher counts as a node, and how many ranks share this machine's devices."""

from dataclasses import replace

import pytest

from phalanx.launch import env
from phalanx.launch.config.compose import compose, ranks_per_node
from phalanx.launch.ranks.start import resolve_device
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.ranks import Ranks
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.config import (
    Config,
    Device,
    LaunchConfig,
    Launcher,
    Precision,
    VerifyConfig,
)
from phalanx.train.optim.config import OptimConfig, OptimizerName
from phalanx.train.verify.run import layouts

EMULATED = LaunchConfig(emulate_nodes=True, nodes=2, ranks_per_node=4)


def place(world: int, local: int, machines: int) -> env.TorchrunPlace:
    variables = {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_WORLD_SIZE": str(machines),
    }
    found = env.torchrun_place(variables)
    assert found is not None
    return found


def test_torchruns_nodes_are_machines_where_all_have_as_many_ranks() -> None:
    assert place(8, 4, 2).ranks_per_node == 4
    assert place(4, 4, 1).ranks_per_node == 4
    # 2 + 4 ranks, as either machine sees it
    assert place(6, 2, 2).ranks_per_node == place(6, 4, 2).ranks_per_node == 1


def test_a_rank_without_a_node_size_has_its_machine_for_one() -> None:
    assert Ranks(rank=0, world_size=8, local_world_size=4).ranks_per_node == 4
    assert Ranks(rank=0, world_size=8, local_world_size=8, node_size=2).ranks_per_node == 2


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["launch.ranks_per_node=4"], 4),
        (["launch.ranks_per_node=2", "launch.nodes=2", "launch.emulate_nodes=true"], 2),
        (["launch.ranks_per_node=2", "launch.nodes=2", "launch=torchrun"], 2),
        (["launch.ranks_per_node=2", "launch.nodes=2", "launch=ray"], 2),
        (["launch.ranks_per_node=4", "launch=ray"], None),
    ],
)
def test_ranks_of_a_node(
    overrides: list[str], found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ranks_per_node(compose(overrides)) == found


def test_emulated_nodes_share_this_machines_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(env, "gpu_count", lambda: 4)
    assert resolve_device(EMULATED, 8) is Device.cpu
    two_machines = LaunchConfig(nodes=2, ranks_per_node=4, launcher=Launcher.torchrun)
    assert resolve_device(two_machines, 8) is Device.cuda
    assert resolve_device(LaunchConfig(ranks_per_node=4), 4) is Device.cuda


def verified(**zero: object) -> Config:
    return Config(
        parallel=ParallelConfig(dp_shard=4, tp=2),
        launch=EMULATED,
        zero=ZeroConfig(**zero),  # type: ignore[arg-type]
    )


def test_verify_plays_nodes_in_the_layout_alone() -> None:
    reference, layout, resumed = layouts(verified(secondary_shard=2))
    assert layout.launch == EMULATED
    assert layout.zero.secondary_shard == 2
    for other in (reference, resumed):
        assert (other.launch.nodes, other.launch.emulate_nodes) == (1, False)
    assert reference.zero == ZeroConfig()
    assert resumed.zero.secondary_shard == 0, "one rank divides nothing"


@pytest.mark.parametrize("key", ["quantize_weights", "quantize_gradients"])
def test_verify_refuses_what_rounds(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^zero\.{key}=int8: .* zero\.{key}=none"):
        layouts(verified(**{key: Quantization.int8}))


def test_verify_asks_for_fp64_of_low_bit_states() -> None:
    config = replace(verified(), optim=OptimConfig(name=OptimizerName.adamw8bit))
    with pytest.raises(ValueError, match=r"^verify\.dtype=fp32: .*adamw8bit.* verify\.dtype=fp64"):
        layouts(config)
    for settled in (VerifyConfig(tolerance=0.01), VerifyConfig(dtype=Precision.fp64)):
        assert layouts(replace(config, verify=settled))[1].optim.name is OptimizerName.adamw8bit
