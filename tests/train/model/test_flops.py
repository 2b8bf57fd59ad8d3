"""Parameters and FLOPs against hand counts and the model itself; peaks against data sheets."""

import pytest
import torch

from phalanx.train.model.config import ModelConfig
from phalanx.train.model.flops import flops_per_token, matmul_params, num_params
from phalanx.train.model.transformer import Transformer
from phalanx.train.monitor.peak import cpu_speedup, gpu_peak, measured_matmul, peak

SHAPES = {
    "plain": ModelConfig(vocab_size=96, dim=32, num_layers=3, num_heads=4, ffn_dim=80),
    "gqa_bias": ModelConfig(
        vocab_size=96,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=80,
        attention_bias=True,
    ),
    "qwen3_like": ModelConfig(
        vocab_size=96,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        ffn_dim=80,
        qk_norm=True,
        tie_embeddings=True,
    ),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_num_params_is_the_models(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert num_params(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_matmul_params_are_the_linear_layers(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert matmul_params(config) == sum(linear.weight.numel() for linear in linears)


def test_flops_by_hand() -> None:
    config = ModelConfig(vocab_size=10, dim=8, num_layers=2, num_heads=2, ffn_dim=12)
    attention, feedforward, head = 4 * 8 * 8, 3 * 8 * 12, 8 * 10
    matrices = 2 * (attention + feedforward) + head
    # Scores and values: 2 products x 2 FLOPs x 8 wide x 16/2 positions, x3 for the backward.
    products = 2 * (2 * 2 * 8 * 8) * 3
    assert flops_per_token(config, 16) == 6 * matrices + products


def test_llama3_8b_is_the_published_size() -> None:
    config = ModelConfig(
        vocab_size=128256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336
    )
    assert num_params(config) == 8_030_261_248
    assert flops_per_token(config, 8192) == pytest.approx(5.147e10, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "number_format", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200", "tf32", 494e12),
        ("NVIDIA H200 NVL", "bf16", 835e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("AMD Instinct MI300X", "bf16", 1307e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA GeForce GTX 1060", "fp32", None),
        ("NVIDIA L40S", "fp64", None),
    ],
)
def test_peak_by_device_name(name: str, number_format: str, flops: float | None) -> None:
    assert gpu_peak(name, number_format) == flops


def test_cpu_peak_is_measured_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = peak(torch.device("cpu"), "fp32", world_size=4, ranks_per_machine=2)
    assert found.flops > 1e8
    assert found.source.startswith("measured fp32 matmul")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("threads", "cores", "num_ranks", "speedup"),
    [(1, 2, 4, 2.0), (1, 8, 4, 4.0), (4, 8, 1, 1.0), (4, 8, 2, 2.0), (4, 2, 2, 1.0)],
)
def test_ranks_that_share_cores_do_not_add(
    threads: int, cores: int, num_ranks: int, speedup: float
) -> None:
    assert cpu_speedup(threads, cores, num_ranks) == speedup


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_peak_bounds_a_measured_product() -> None:
    device = torch.device("cuda", 0)
    found = peak(device, "bf16", world_size=1, ranks_per_machine=1)
    assert measured_matmul(device, torch.bfloat16) < 1.05 * found.flops
