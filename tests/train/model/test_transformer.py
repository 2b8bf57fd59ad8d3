"""The decoder against references that say in loops what it computes.

Shapes: B batch, S sequence, H query heads, K key/value heads, D width of a head, V vocabulary.
"""

import cmath
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phalanx.train.model.attention import Attention, document_causal_mask
from phalanx.train.model.config import ModelConfig, RopeScalingConfig
from phalanx.train.model.init import init_weights
from phalanx.train.model.rope import apply_rope, rope_angles, rope_frequencies
from phalanx.train.model.transformer import Transformer, parameter_name

CONFIG = ModelConfig(
    vocab_size=51,
    dim=36,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    ffn_dim=44,
    qk_norm=True,
    attention_bias=True,
    init_std=0.2,
)
LENGTHS = [[3, 1, 5], [9]]
"""Documents of the two packed samples of 9 tokens."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on one core, and draws that no other test shifts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(config: ModelConfig, *, layers: range | None = None) -> Transformer:
    """A part of the model in fp64, biases and norms drawn too, the same for any part."""
    model = Transformer(config, layers=layers).double()
    init_weights(model, config, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    return model


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Positions and document numbers of samples made of documents of these lengths."""
    positions = [[i for n in row for i in range(n)] for row in lengths]
    documents = [[number for number, n in enumerate(row) for _ in range(n)] for row in lengths]
    return torch.tensor(positions), torch.tensor(documents, dtype=torch.int32)


def rotate(vector_D: Tensor, position: int, frequencies: list[float]) -> Tensor:
    """RoPE of one head: channels i and i + D/2 are one complex number, turned by an angle."""
    half = len(frequencies)
    turned = [
        complex(vector_D[i], vector_D[i + half]) * cmath.exp(1j * position * frequencies[i])
        for i in range(half)
    ]
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=torch.float64)


def normed(vector: Tensor, norm: nn.Module | None, eps: float) -> Tensor:
    if norm is None:
        return vector
    return vector / (vector.square().mean() + eps).sqrt() * norm.weight


def slow_attention(
    layer: Attention, config: ModelConfig, x_BSd: Tensor, positions_BS: Tensor, document_BS: Tensor
) -> Tensor:
    """One query of one head at a time."""
    width, group = config.size_of_head, config.num_heads // config.kv_heads
    frequencies = [config.rope_theta ** (-2 * i / width) for i in range(width // 2)]
    result = torch.zeros_like(x_BSd)
    for b in range(x_BSd.shape[0]):
        for i in range(x_BSd.shape[1]):
            heads = []
            for h in range(config.num_heads):
                rows = slice(h * width, (h + 1) * width)
                kv_rows = slice(h // group * width, (h // group + 1) * width)
                query = layer.wq.weight[rows] @ x_BSd[b, i] + layer.wq.bias[rows]
                query = normed(query, layer.q_norm, config.norm_eps)
                query = rotate(query, int(positions_BS[b, i]), frequencies)
                scores, values = [], []
                for j in range(i + 1):
                    if document_BS[b, j] != document_BS[b, i]:
                        continue
                    key = layer.wk.weight[kv_rows] @ x_BSd[b, j] + layer.wk.bias[kv_rows]
                    key = normed(key, layer.k_norm, config.norm_eps)
                    key = rotate(key, int(positions_BS[b, j]), frequencies)
                    scores.append(query @ key / math.sqrt(width))
                    values.append(layer.wv.weight[kv_rows] @ x_BSd[b, j] + layer.wv.bias[kv_rows])
                weights = torch.stack(scores).exp()
                heads.append((weights / weights.sum()) @ torch.stack(values))
            result[b, i] = layer.wo.weight @ torch.cat(heads)
    return result


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_attention_equals_the_slow_one(kv_heads: int, qk_norm: bool) -> None:
    config = replace(CONFIG, num_kv_heads=kv_heads, qk_norm=qk_norm)
    layer = build(config).layers["1"].attention
    x = torch.randn(2, 9, config.dim, dtype=torch.float64)
    positions, documents = packed(LENGTHS)
    fast = layer(x, *rope_angles(config, positions), document_causal_mask(documents))
    # Angles are fp32 in the model.
    torch.testing.assert_close(
        fast, slow_attention(layer, config, x, positions, documents), rtol=1e-6, atol=1e-6
    )


def test_mask_says_who_looks_at_whom() -> None:
    _, documents = packed([[2, 1, 2]])
    assert document_causal_mask(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_turns_complex_numbers(theta: float) -> None:
    config = replace(CONFIG, rope_theta=theta)
    width = config.size_of_head
    x = torch.randn(1, 4, 3, width, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 7, 130]])
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    result = apply_rope(x, *rope_angles(config, positions))
    assert result.dtype == x.dtype
    for s in range(4):
        for h in range(3):
            expected = rotate(x[0, s, h], int(positions[0, s]), frequencies)
            torch.testing.assert_close(result[0, s, h], expected, rtol=1e-5, atol=2e-5)


def llama3_frequency(frequency: float, scaling: RopeScalingConfig) -> float:
    """Frequency of one channel pair after Llama 3.1's scaling, case by case."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
        return frequency / scaling.factor
    turns = scaling.original_max_seq_len / wavelength
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - share) * frequency / scaling.factor + share * frequency


def test_rope_scaling_of_llama3() -> None:
    scaling = RopeScalingConfig(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    config = ModelConfig(dim=64, num_heads=1, rope_theta=500000.0, rope_scaling=scaling)
    plain = [500000.0 ** (-2 * i / 64) for i in range(32)]
    expected = [llama3_frequency(f, scaling) for f in plain]
    found = rope_frequencies(config, torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    ratios = [p / e for p, e in zip(plain, expected, strict=True)]
    assert ratios[0] == 1
    assert ratios[-1] == pytest.approx(32)
    assert any(1.01 < ratio < 31.9 for ratio in ratios), "no pair lies between"
    unscaled = rope_frequencies(replace(config, rope_scaling=RopeScalingConfig()), found.device)
    torch.testing.assert_close(unscaled, torch.tensor(plain), rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_whole_model_in_plain_words() -> None:
    """Pre-norm residual blocks, SwiGLU, final norm, head: written out around `attention`."""
    model = build(CONFIG)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9))
    positions, documents = packed(LENGTHS)
    angles, mask = rope_angles(CONFIG, positions), document_causal_mask(documents)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * weight

    x = model.embed.weight[tokens]
    for block in model.layers.values():
        x = x + block.attention(norm(x, block.attention_norm.weight), *angles, mask)
        y, ffn = norm(x, block.ffn_norm.weight), block.feed_forward
        gate = y @ ffn.w1.weight.T
        x = x + (gate * gate.sigmoid() * (y @ ffn.w3.weight.T)) @ ffn.w2.weight.T
    expected = norm(x, model.norm.weight) @ model.head.weight.T
    found = model(tokens, positions_BS=positions, document_BS=documents)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_documents_do_not_see_each_other() -> None:
    model = build(CONFIG)
    tokens = torch.randint(1, CONFIG.vocab_size, (1, 9))
    positions, documents = packed([[3, 4, 2]])
    before = model(tokens, positions_BS=positions, document_BS=documents)
    for changed in range(3):
        where = documents[0] == changed
        other = tokens.clone()
        other[0, where] = tokens[0, where] - 1
        after = model(other, positions_BS=positions, document_BS=documents)
        assert torch.equal(after[0, ~where], before[0, ~where]), changed
        assert not torch.isclose(after[0, where], before[0, where]).all(dim=-1).any()


@torch.no_grad()
def test_a_packed_document_is_computed_as_if_alone() -> None:
    model = build(CONFIG)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 9))
    positions, documents = packed([[3, 4, 2]])
    together = model(tokens, positions_BS=positions, document_BS=documents)
    alone = model(tokens[:, 3:7], positions_BS=torch.arange(4).unsqueeze(0))
    torch.testing.assert_close(together[:, 3:7], alone, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_positions_matter_within_a_document_only_by_their_distance() -> None:
    model = build(CONFIG)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 9))
    positions, documents = packed([[3, 4, 2]])
    before = model(tokens, positions_BS=positions, document_BS=documents)
    moved = model(tokens, positions_BS=positions + 5, document_BS=documents)
    torch.testing.assert_close(moved, before, rtol=1e-4, atol=1e-5)  # angles are fp32
    apart = positions.clone()
    apart[0, 5:7] += 5
    stretched = model(tokens, positions_BS=apart, document_BS=documents)
    assert torch.equal(stretched[0, :5], before[0, :5])
    assert not torch.isclose(stretched[0, 5:7], before[0, 5:7], rtol=1e-3).all(dim=-1).any()


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    model = build(CONFIG)
    tokens = torch.randint(1, CONFIG.vocab_size, (1, 7))
    positions = torch.arange(7).unsqueeze(0)
    before = model(tokens, positions_BS=positions)
    changed = tokens.clone()
    changed[0, 4] -= 1
    after = model(changed, positions_BS=positions)
    assert torch.equal(after[0, :4], before[0, :4])
    assert not torch.isclose(after[0, 4:], before[0, 4:]).all(dim=-1).any()


@torch.no_grad()
def test_the_causal_kernel_equals_the_mask_of_one_document() -> None:
    model = build(CONFIG)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9))
    positions, documents = packed([[9], [9]])
    plain = model(tokens, positions_BS=positions)
    masked = model(tokens, positions_BS=positions, document_BS=documents)
    torch.testing.assert_close(plain, masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_parts_chained_are_the_whole(tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    positions, documents = packed(LENGTHS)
    whole = build(config)
    parts = [build(config, layers=layers) for layers in (range(0, 1), range(1, 2), range(2, 3))]
    x = tokens
    for part in parts:
        x = part(x, positions_BS=positions, document_BS=documents)
    assert torch.equal(x, whole(tokens, positions_BS=positions, document_BS=documents))
    names = [parameter_name(n, config) for part in parts for n, _ in part.named_parameters()]
    assert set(names) == {name for name, _ in whole.named_parameters()}
    assert len(names) == len(set(names)) + tied


def test_tied_embeddings_are_one_parameter() -> None:
    config = replace(CONFIG, tie_embeddings=True)
    model = build(config)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    tokens = torch.tensor([[1, 2, 3]])
    logits = model(tokens, positions_BS=torch.arange(3).unsqueeze(0))
    F.cross_entropy(logits[0], torch.tensor([2, 3, 4])).backward()
    untied = build(replace(config, tie_embeddings=False))
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    logits = untied(tokens, positions_BS=torch.arange(3).unsqueeze(0))
    F.cross_entropy(logits[0], torch.tensor([2, 3, 4])).backward()
    both = untied.embed.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(model.embed.weight.grad, both, rtol=1e-12, atol=1e-12)


def test_names_of_parameters() -> None:
    tied = replace(CONFIG, tie_embeddings=True)
    assert parameter_name("head.weight", tied) == "embed.weight"
    assert parameter_name("head.weight", CONFIG) == "head.weight"
    assert parameter_name("layers.2.attention.wq.weight", tied) == "layers.2.attention.wq.weight"
    held = {name for name, _ in Transformer(CONFIG, layers=range(1, 2)).named_parameters()}
    assert all(name.startswith("layers.1.") for name in held), held
