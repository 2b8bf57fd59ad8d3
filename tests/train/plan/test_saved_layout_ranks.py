"""`restore --layout`: what numbers say that ranks hold is what real ranks hold."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.checkpoint.boxes import TensorInfo
from phalanx.checkpoint.chunks import chunk_of
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.snapshot.shares import RankBoxes, assign, held_boxes
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.reading import tensors_of
from phalanx.launch.cli import main
from phalanx.launch.config.compose import compose
from phalanx.parallel.config import ParallelConfig
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import PartitionConfig, ZeroConfig
from phalanx.parallel.zero.partition import Extent
from phalanx.train.config import Config, LaunchConfig
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.transformer import Transformer
from phalanx.train.optim.config import OptimConfig, OptimizerName
from phalanx.train.plan.saved_layout import held_by_ranks, layout_config
from phalanx.train.resume.check import plain_settings
from phalanx.train.resume.state import random_states
from tests.checkpoint.stored import make
from tests.small_run import make_config, make_engine

pytestmark = pytest.mark.storage

Run = Callable[..., list[Any]]

LAYOUTS: list[tuple[dict[str, int], int]] = [
    ({"dp_shard": 4}, 3),
    ({"dp_shard": 4}, 0),
    ({"dp_shard": 2, "tp": 2}, 3),
    ({"dp_replicate": 2, "dp_shard": 2}, 1),
    ({"pp": 2, "tp": 2}, 3),
    ({"pp": 2, "dp_shard": 2}, 2),
    ({"pp": 4}, 3),
]


def configs() -> list[Config]:
    """Layouts of four ranks: ZeRO stages, tied weights, V-shaped pipelines, nodes, low bits."""
    found = []
    for number, (degrees, stage) in enumerate(LAYOUTS):
        schedule = "zb_v" if degrees == {"pp": 2, "tp": 2} else "1f1b"
        tied = number % 2 == 1
        found.append(
            make_config(tied=tied, stage=stage, schedule=schedule, **{"dp_shard": 1, **degrees})
        )
    node = PartitionConfig(params=Extent.node, grads=Extent.node, states=Extent.node)
    found.append(replace(make_config(dp_shard=4), zero=ZeroConfig(partition=node)))
    wide = ModelConfig(
        vocab_size=256, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=128
    )
    low = OptimConfig(name=OptimizerName.adamw4bit)
    found.append(replace(make_config(dp_shard=2, tp=2), model=wide, optim=low))
    nodes = LaunchConfig(nodes=2, ranks_per_node=2, emulate_nodes=True)
    return [replace(config, launch=nodes) for config in found]


def held_really(ranks: Ranks, configs: list[Config]) -> list[RankBoxes]:
    """What this rank has of each tensor, by layout."""
    found = []
    with process_group(ranks):
        for config in configs:
            engine = make_engine(ranks, config)
            tensors = engine.state_tensors() | random_states(ranks.rank, ranks.device)
            chunks = {name: chunk_of(name, tensor) for name, tensor in tensors.items()}
            found.append(held_boxes({n: chunk for n, chunk in chunks.items() if chunk}))
    return found


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(configs()[-2:], id="nodes and low bits"),
        pytest.param(configs()[:-2], id="others", marks=pytest.mark.slow),
    ],
)
def test_boxes_by_numbers_are_the_ranks_own(run_ranks: Run, wanted: list[Config]) -> None:
    by_rank = run_ranks(held_really, wanted, world_size=4, nodes=2)
    for number, config in enumerate(wanted):
        real = [held[number] for held in by_rank]
        infos: dict[str, TensorInfo] = {
            name: info for held in real for name, (info, _) in held.items()
        }
        counted = held_by_ranks(config, infos)
        for rank in range(4):
            mine = {name: item for name, item in real[rank].items() if item[1].numel}
            assert counted[rank] == mine, (config.parallel, config.zero, rank)


def test_a_layout_is_read_into_the_saved_configuration() -> None:
    saved = compose(["experiment=tiny", "model.dim=192", "parallel.tp=2", "zero.stage=2"])
    meta = {"config": plain_settings(saved)}
    config = layout_config(meta, {"pp": "2", "dp_shard": "4", "zero.stage": "1"})
    assert config.parallel.sized(8) == {
        "pp": 2, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1,
    }  # fmt: skip
    assert config.zero.stage == 1
    assert config.model == saved.model
    of_weights = layout_config({"config": {"model": asdict(saved.model)}}, {"tp": "2"})
    assert of_weights.model == saved.model
    for wanted, said in (
        ({"dp": "2"}, "--layout dp=2: unknown axis; name pp, dp_replicate"),
        ({"tp": "x"}, "--layout tp=x: "),
        ({"zero.stag": "1"}, "--layout zero.stag=1: "),
        ({"tp": "5"}, "--layout tp=5: "),
        ({"dp_shard": "-1"}, "--layout dp_shard=-1: give the number of ranks"),
    ):
        with pytest.raises(ValueError, match=said):
            layout_config(meta, wanted)


def test_restore_cuts_for_a_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tied=True, dp_shard=1)
    noise = np.random.default_rng(0)
    arrays = {
        f"{kind}{name}": noise.random(tuple(parameter.shape))
        for name, parameter in Transformer(config.model).named_parameters()
        for kind in ("model.", "optim.m.")
    }
    arrays["rng.cpu.3"] = noise.integers(0, 255, 99, dtype=np.uint8)
    make(tmp_path / "src", 100, arrays, ranks=3, meta={"config": plain_settings(config)})
    argv = ["checkpoint", "restore", str(tmp_path / "src"), str(tmp_path / "dst"), "--layout"]
    assert main([*argv, "pp=2,dp_shard=2,tp=2"]) == 0
    wanted = replace(config, parallel=ParallelConfig(pp=2, dp_shard=2, tp=2))
    infos = tensors_of(read_manifest(open_storage(tmp_path / "src"), "step_00000100"))
    manifest = read_manifest(open_storage(tmp_path / "dst"), "step_00000100")
    assert [part.table for part in manifest.parts] == assign(held_by_ranks(wanted, infos))
    assert "rng.cpu.3" in {entry.name for entry in manifest.parts[3].table.entries}
    assert main(["checkpoint", "verify", str(tmp_path / "dst")]) == 0
    assert main(["checkpoint", "show", "--diff", str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
    capsys.readouterr()
    assert main([*argv, "tp=5"]) == 2
    assert capsys.readouterr().err.startswith("phalanx: --layout tp=5: parallel.tp=5")
