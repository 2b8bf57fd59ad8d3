"""Ways of ZeRO-3 that the benches compare: plain, and with ZeRO++'s parts alone and together.

qwZ: weights gathered in int8. hpZ: a secondary shard inside the node for the backward pass. qgZ:
gradients reduced in int4 (Wang et al., ZeRO++, 2023).
"""

from dataclasses import replace
from typing import Any

from phalanx.parallel.kernels.block_format import Quantization
from phalanx.parallel.pipeline.config import PipelineConfig
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.config import Config, Launcher, Precision, PrecisionConfig
from phalanx.train.data.check import check_data

PLAIN, TOGETHER, FED_BACK = "plain", "together", "fed_back"
FP32 = PrecisionConfig()
BF16 = PrecisionConfig(compute=Precision.bf16, reduce=Precision.bf16)
"""Values of two bytes on every link, what ZeRO++ counts from."""


def ways(config: Config) -> dict[str, ZeroConfig]:
    """Settings by the way's name, with the configured block size; `fed_back` is `together` with
    error feedback."""
    qwz: dict[str, Any] = {"quantize_weights": Quantization.int8}
    hpz: dict[str, Any] = {"secondary_shard": config.bench.ranks_per_node}
    qgz: dict[str, Any] = {"quantize_gradients": Quantization.int4}
    block = config.zero.block_size
    return {
        PLAIN: ZeroConfig(block_size=block),
        "qwz": ZeroConfig(block_size=block, **qwz),
        "hpz": ZeroConfig(block_size=block, **hpz),
        "qgz": ZeroConfig(block_size=block, **qgz),
        TOGETHER: ZeroConfig(block_size=block, **qwz, **hpz, **qgz),
        FED_BACK: ZeroConfig(block_size=block, **qwz, **hpz, **qgz, error_feedback=True),
    }


def num_ranks(config: Config) -> int:
    """Ranks of all nodes."""
    return config.bench.nodes * config.bench.ranks_per_node


def layout(config: Config, *, precision: PrecisionConfig, one_node: bool = False) -> Config:
    """The run with all ranks data-parallel, on bench.nodes nodes played by this machine.

    Raises:
        ValueError: the launcher starts no ranks here, zero says more than a block size, the batch
            does not divide, or there is no data for it.
    """
    if config.launch.launcher is not Launcher.local:
        raise ValueError(
            f"launch.launcher={config.launch.launcher.name}: this bench plays nodes on one "
            "machine; use launch=local"
        )
    if config.zero != ZeroConfig(block_size=config.zero.block_size):
        raise ValueError(
            f"zero.stage={config.zero.stage}, {config.zero.extents}, ...: this bench compares "
            "settings of its own; of zero.* it takes zero.block_size alone"
        )
    size = num_ranks(config)
    laid = replace(
        config,
        parallel=replace(config.parallel, pp=1, dp_replicate=1, dp_shard=size, tp=1),
        pipeline=PipelineConfig(),
        zero=ways(config)[PLAIN],
        precision=precision,
        launch=replace(
            config.launch,
            nodes=1 if one_node else config.bench.nodes,
            ranks_per_node=size if one_node else config.bench.ranks_per_node,
            emulate_nodes=not one_node,
            threads_per_rank=config.launch.threads_per_rank or 1,
        ),
    )
    laid.num_microbatches(size)
    check_data(laid.data, vocab_size=laid.model.vocab_size, seq_len=laid.training.seq_len)
    return laid
