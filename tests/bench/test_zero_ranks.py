"""The benches of ZeRO run through, and what they report hangs together; nodes on a slow network."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from phalanx.bench.figures import Figure, Request, table
from phalanx.bench.peers import deepspeed
from phalanx.bench.slow_network import namespaces, slow_network
from phalanx.bench.slow_network.namespaces import Node
from phalanx.bench.zero import zero
from phalanx.launch.ranks.start import launch
from phalanx.parallel.ranks import Ranks, process_group
from phalanx.train.bench_config import BenchConfig, SlowNetworkConfig
from phalanx.train.config import Config, Device, LaunchConfig, TrainingConfig
from phalanx.train.data.config import DataConfig
from phalanx.train.model.config import ModelConfig

pytestmark = pytest.mark.zero

CPU = LaunchConfig(device=Device.cpu, ranks_per_node=2, threads_per_rank=1, timeout_s=60.0)
MBIT, SENT = 16.0, 1 << 20


@pytest.fixture(scope="module")
def namespaces_or_skip() -> None:
    """Skips where this machine cannot make them, and says why."""
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)


def config(data: DataConfig, **bench: Any) -> Config:
    model = ModelConfig(
        vocab_size=300, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=128
    )
    training = TrainingConfig(seq_len=32, global_batch_size=8, microbatch_size=2, steps=100)
    return Config(model=model, data=data, training=training, launch=CPU, bench=BenchConfig(**bench))


def request(config: Config) -> Request:
    return Request(config=config, world_size=4, launch=launch, arguments=[], cpu="")


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    named = {figure.name: figure for figure in figures}
    assert len(named) == len(figures), "two figures of one name"
    assert len(table(figures).splitlines()) == len(figures)
    return named


def exchange(ranks: Ranks, nodes: list[Node]) -> tuple[float, int]:
    """Seconds that SENT bytes take from each node to the other, and what the kernel counted."""
    namespaces.enter(nodes[ranks.rank])
    ranks = replace(ranks, init_method=f"tcp://{nodes[0].address}:{namespaces.PORT}")
    with process_group(ranks):
        mine = torch.zeros(SENT, dtype=torch.uint8)
        theirs = torch.zeros(2 * SENT, dtype=torch.uint8)
        dist.all_gather_into_tensor(theirs, mine)
        namespaces.run_here(namespaces.limit(MBIT))
        dist.barrier()
        before, begin = namespaces.sent_bytes(), time.perf_counter()
        dist.all_gather_into_tensor(theirs, mine)
        dist.barrier()
        return time.perf_counter() - begin, namespaces.sent_bytes() - before


@pytest.mark.usefixtures("namespaces_or_skip")
def test_nodes_are_joined_by_a_slow_network_only() -> None:
    with namespaces.nodes(2) as nodes:
        found = launch(exchange, nodes, world_size=2, config=CPU)
        held = [os.readlink(node.path) for node in nodes]
    for seconds, sent in found:
        # 256 KiB may pass at once, and what waits in the link's queue was sent already.
        assert seconds > 0.5 * SENT * 8 / 1e6 / MBIT
        assert SENT < sent < 1.2 * SENT
    assert len(set(held)) == 2
    for node in nodes:
        with pytest.raises(FileNotFoundError):
            os.readlink(node.path)


@pytest.mark.usefixtures("namespaces_or_skip")
def test_nodes_go_when_their_maker_is_killed() -> None:
    code = (
        "import os, signal\n"
        "from phalanx.bench.slow_network import namespaces\n"
        "with namespaces.nodes(1) as (node,):\n"
        "    print(node.path, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip())
    assert path.name == "net", done.stderr
    deadline = time.monotonic() + 10
    while os.path.lexists(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.lexists(path)


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces_or_skip")
def test_slow_network(demo_data: DataConfig) -> None:
    bench = {"rounds": 1, "steps": 1, "slow_network": SlowNetworkConfig(mbit=20.0, loss_steps=20)}
    figures = by_name(slow_network.bench(request(config(demo_data, **bench))))
    assert figures["slow_network.rate"].value == 20.0
    ours, share = figures["slow_network.together.vs_fsdp2"], figures["slow_network.together.sent"]
    assert ours.value > 0
    assert ours.ratio is not None
    assert share.ratio is not None
    assert share.ratio > 2, "quantized sends much less than plain"
    for side in ("together", "fed_back", "plain"):
        assert abs(figures[f"slow_network.{side}.loss_gap"].value) < 0.05


@pytest.mark.slow
def test_bytes_and_peers(demo_data: DataConfig) -> None:
    bench = BenchConfig(rounds=1, steps=1)
    figures = by_name(zero.bench(request(replace(config(demo_data), bench=bench))))
    share = {
        (way, link): figures[f"zero.{way}.{link}_share"].value
        for way in ("qwz", "hpz", "qgz", "together")
        for link in zero.LINKS
    }
    for way in ("qwz", "hpz", "qgz"):
        assert share["together", "between"] < share[way, "between"] < 1
    assert share["hpz", "inside"] == pytest.approx(1, rel=0.01)
    # One process would compute the same up to the order of sums.
    assert figures["zero.loss_gap.fsdp2"].value < 1e-5
    if deepspeed.installed():
        assert figures["zero.loss_gap.deepspeed"].value < 1e-4
    assert figures["zero.tokens_per_s.fsdp2"].value > 0
