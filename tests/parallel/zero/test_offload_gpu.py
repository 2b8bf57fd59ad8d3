"""zero.offload=cpu on a GPU: masters and moments leave it, and the losses stay."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phalanx.launch.ranks.start import launch
from phalanx.parallel.mesh import build_mesh
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.zero.config import Offload, ZeroConfig
from phalanx.train.config import Device, LaunchConfig, PrecisionConfig
from phalanx.train.engine.step import Engine
from tests.small_run import make_config, rank_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def trained(ranks: Ranks) -> dict[Offload, tuple[list[float], int, set[str]]]:
    """By where the states lie: losses of 5 steps, bytes left on the GPU, devices of all states."""
    found = {}
    with process_group(ranks):
        for offload in Offload:
            before = torch.cuda.memory_allocated()
            config = replace(
                make_config(precision=PrecisionConfig(), dp_shard=1),
                zero=ZeroConfig(offload=offload),
            )
            mesh = build_mesh(config.parallel, world_size=1, device_type="cuda")
            engine = Engine(config, mesh, ranks.device)
            losses = []
            for number in range(5):
                gradients = engine.gradients(rank_batch(engine, number=number))
                engine.update(gradients, 1e-3)
                losses.append(gradients.loss)
            devices = {tensor.device.type for tensor in engine.optimizer.state_tensors().values()}
            found[offload] = losses, torch.cuda.memory_allocated() - before, devices
            del engine
    return found


def test_offloaded_states_leave_the_gpu(tmp_path: Path) -> None:
    config = LaunchConfig(ranks_per_node=1, device=Device.cuda, timeout_s=60.0)
    (found,) = launch(trained, world_size=1, config=config, log_dir=tmp_path / "logs")
    kept, offloaded = found[Offload.none], found[Offload.cpu]
    # The same arithmetic on two devices, whose roots and quotients may round differently.
    assert offloaded[0] == pytest.approx(kept[0], rel=1e-5)
    assert (kept[2], offloaded[2]) == ({"cuda"}, {"cpu"})
    assert offloaded[1] < kept[1] / 4
