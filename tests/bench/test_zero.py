"""What the benches of ZeRO are made of: layouts, byte counts, a planned network, its rate."""

from dataclasses import replace
from typing import Any

import pytest

from phalanx.bench.figures import Figure, Request, table
from phalanx.bench.peers import deepspeed
from phalanx.bench.slow_network import namespaces, slow_network
from phalanx.bench.slow_network.ranks import (
    LAST,
    PEER,
    SIDES,
    NetworkTurns,
    corrected,
    last_step,
    rate_for,
)
from phalanx.bench.zero import ways, zero
from phalanx.parallel.comm_meter import Traffic
from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.bench_config import BenchConfig, SlowNetworkConfig
from phalanx.train.config import Config, LaunchConfig, Launcher, Precision, TrainingConfig
from phalanx.train.data.config import DataConfig


def by_name(figures: Any) -> dict[str, Figure]:
    listed = list(figures)
    named = {figure.name: figure for figure in listed}
    assert len(named) == len(listed), "two figures of one name"
    assert len(table(listed).splitlines()) == len(listed)
    return named


def test_ranks_are_laid_out_as_nodes_and_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "check_data", lambda *_, **__: None)
    config = Config(bench=BenchConfig(nodes=2, ranks_per_node=4), zero=ZeroConfig(block_size=64))
    training = TrainingConfig(global_batch_size=16)
    laid = ways.layout(replace(config, training=training), precision=ways.BF16)
    assert (laid.parallel.dp_shard, laid.launch.nodes, laid.launch.ranks_per_node) == (8, 2, 4)
    assert laid.launch.emulate_nodes
    assert laid.precision.compute is laid.precision.reduce is Precision.bf16
    assert laid.zero == ZeroConfig(block_size=64)
    one = ways.layout(laid, precision=ways.FP32, one_node=True)
    assert (one.launch.nodes, one.launch.ranks_per_node, one.launch.emulate_nodes) == (1, 8, False)
    assert one.precision.compute is Precision.fp32
    together = ways.ways(laid)["together"]
    assert together.secondary_shard == 4
    assert together.quantize_weights is Quantization.int8
    assert together.quantize_gradients is Quantization.int4
    assert {way.block_size for way in ways.ways(laid).values()} == {64}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(launch=LaunchConfig(launcher=Launcher.ray)), ("launch.launcher=ray", "launch=loc")),
        (
            Config(training=TrainingConfig(global_batch_size=6)),
            ("training.global_batch_size=6", "4 data-parallel ranks"),
        ),
        (Config(zero=ZeroConfig(stage=2)), ("zero.stage=2", "zero.block_size alone")),
        (Config(data=DataConfig(dir="nowhere")), ("data.dir=nowhere", "phalanx data prepare")),
    ],
)
def test_what_cannot_be_laid_out(config: Config, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="=") as caught:
        ways.layout(config, precision=ways.BF16)
    assert all(word in str(caught.value) for word in words)


def test_bytes_are_shares_of_the_plain_way() -> None:
    def rank(between: int) -> dict[str, dict[str, Traffic]]:
        plain = {"params": Traffic(inside=60, between=75), "grads": Traffic(inside=30, between=45)}
        once = {"params": Traffic(inside=60, between=50), "grads": Traffic(inside=30, between=45)}
        way = {"params": Traffic(inside=30, between=between), "grads": Traffic(inside=15)}
        return {"plain": plain, "hpz": once, "together": way}

    figures = by_name(zero.byte_figures([rank(20), rank(40)]))
    assert figures["zero.plain.between"].value == 240 / zero.COUNTED
    between = figures["zero.together.between"]
    assert (between.value, between.peer, between.ratio) == (60 / zero.COUNTED, "plain", 4.0)
    assert figures["zero.together.between_share"].value == 0.25
    assert figures["zero.together.inside_share"].value == 0.5
    assert figures["zero.together.between_of_zero3"].value == 60 / (4 * 50 + 2 * 45)
    assert figures["zero.plain.between_of_zero3"].value == 240 / (4 * 50 + 2 * 45)


def test_nodes_of_one_rank_send_nothing_inside() -> None:
    sent = {"params": Traffic(between=4)}
    figures = by_name(zero.byte_figures([{"plain": sent, "hpz": sent}]))
    assert figures["zero.hpz.inside"].value == 0
    assert "zero.hpz.inside_share" not in figures


def test_times_beside_each_peer() -> None:
    times = {
        "wall": {"phalanx": [2.0, 4.0], "deepspeed": [3.0, 6.0], "fsdp2": [2.0, 2.0]},
        "cpu": {"phalanx": [1.0], "deepspeed": [2.0], "fsdp2": [1.0]},
        "losses": {"phalanx": 5.0, "deepspeed": 5.0, "fsdp2": 4.0},
    }
    figures = by_name(zero.time_figures(times, tokens=60, peers=["deepspeed", "fsdp2"]))
    assert figures["zero.tokens_per_s.deepspeed"].ratio == 1.5
    assert figures["zero.tokens_per_s.fsdp2"].ratio == 0.75
    assert figures["zero.cpu_s.deepspeed"].ratio == 2.0
    assert figures["zero.loss_gap.deepspeed"].value == 0
    assert figures["zero.loss_gap.fsdp2"].value == 0.25


def test_deepspeed_gets_the_run_s_batch() -> None:
    config = Config(training=TrainingConfig(microbatch_size=2))
    settings = deepspeed.settings(config, num_microbatches=3)
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == config.optim.max_grad_norm
    assert settings["zero_optimization"] == {"stage": 3}


def test_a_missing_peer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deepspeed, "installed", lambda: False)
    assert zero._peers() == ["fsdp2"]
    assert "phalanx-train[peers]" in capsys.readouterr().err
    monkeypatch.setattr(deepspeed, "installed", lambda: True)
    assert zero._peers() == ["deepspeed", "fsdp2"]


def test_a_node_is_joined_to_the_bridge_from_outside() -> None:
    joined = [" ".join(command) for command in namespaces.commands(1, 70, 71)]
    assert joined == [
        "ip link add eth0 netns 70 type veth peer name node1 netns 71",
        "nsenter --net=/proc/71/ns/net ip link set node1 master bridge up",
        "nsenter --net=/proc/70/ns/net ip address add 10.77.0.2/24 dev eth0",
        "nsenter --net=/proc/70/ns/net ip link set lo up",
        "nsenter --net=/proc/70/ns/net ip link set eth0 up",
    ]
    assert namespaces.Node(1, "").address == "10.77.0.2"
    assert "rate 12500kbit burst 256kb" in " ".join(namespaces.limit(12.5))


def test_sent_bytes_are_the_kernel_s() -> None:
    text = (
        "Inter-|   Receive                            |  Transmit\n"
        " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop\n"
        "    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n"
        "  eth0: 5 6 0 0 0 0 0 0 7890 8 0 0 0 0 0 0\n"
    )
    assert namespaces.sent_bytes(text) == 7890
    with pytest.raises(RuntimeError, match="eth0"):
        namespaces.sent_bytes("    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n")


def test_machines_without_namespaces_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: None if tool == "tc" else tool)
    assert namespaces.missing() == "not found: tc; install iproute2"
    monkeypatch.setattr(namespaces.sys, "platform", "darwin")
    monkeypatch.setattr(ways, "check_data", lambda *_, **__: None)
    assert "Linux" in str(namespaces.missing())
    with pytest.raises(ValueError, match="bench slow_network: network namespaces are Linux's"):
        slow_network.bench(plain_request())


def plain_request() -> Request:
    return Request(config=Config(), world_size=4, launch=lambda *_, **__: [], arguments=[], cpu="")


@pytest.mark.parametrize("waiting", [0.1, 0.5, 0.72])
def test_rate_makes_the_peer_wait(waiting: float) -> None:
    """A network whose steps take a little longer than bytes over rate."""

    def step(mbit: float) -> float:
        return 0.4 + 1.3 * 8 * 5.0 / mbit + 0.01

    mbit = rate_for(num_bytes=5e6, quick_s=0.4, waiting=waiting)
    assert 1 - 0.4 / (0.4 + 8 * 5.0 / mbit) == pytest.approx(waiting)
    for _ in range(3):
        mbit = corrected(mbit, quick_s=0.4, slow_s=step(mbit), waiting=waiting)
    assert 1 - 0.4 / step(mbit) == pytest.approx(waiting, abs=0.01)


def test_losses_are_compared_after_what_is_timed() -> None:
    long = SlowNetworkConfig(loss_steps=300)
    assert last_step(Config(bench=BenchConfig(slow_network=long))) == 300
    short = SlowNetworkConfig(loss_steps=1)
    timed = last_step(Config(bench=BenchConfig(rounds=2, steps=3, slow_network=short)))
    assert timed > 2 * 2 * 3 + LAST


def test_slow_network_s_figures() -> None:
    config = Config(training=TrainingConfig(global_batch_size=8, seq_len=16))
    seconds = {"together": [1.0, 2.0], "fed_back": [1.0, 2.0], "plain": [2.0, 4.0], PEER: [3.0, 6]}
    found = NetworkTurns(
        sent=dict(zip(SIDES, (10.0, 10.0, 30.0, 40.0), strict=True)),
        quick=dict.fromkeys(SIDES, 0.5),
        mbit=50.0,
        seconds=seconds,
        losses=dict(zip(SIDES, (5.05, 4.0, 5.0, 5.0), strict=True)),
    )
    other = replace(found, sent=found.sent | {"together": 20.0})
    figures = by_name(slow_network.figures(config, [found, other]))
    assert figures["slow_network.rate"].value == 50.0
    assert figures["slow_network.together.vs_fsdp2"].ratio == 3.0
    assert figures["slow_network.together.vs_plain"].ratio == 2.0
    assert figures["slow_network.together.sent"].ratio == 2.0, "the node that sent most"
    assert figures["slow_network.fsdp2.waiting"].value == pytest.approx((5 / 6 + 11 / 12) / 2)
    assert figures["slow_network.together.loss_gap"].value == pytest.approx(0.01)
    assert figures["slow_network.fed_back.loss_gap"].value == pytest.approx(-0.2)
    without = by_name(slow_network.figures(config, [replace(found, losses={})]))
    assert not [name for name in without if "loss" in name]
