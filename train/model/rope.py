"""Rotary position embedding, with Llama-3's frequency scaling.

Half-split convention (`rotate_half`), as in Hugging Face checkpoints. Shapes: B batch, S sequence,
H heads, D width of a head.
"""

import math

import torch
from torch import Tensor

from phalanx.train.model.config import ModelConfig, RopeScalingConfig


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of a head's channels, fp32, shape (D/2,)."""
    width = config.size_of_head
    exponent = torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width
    frequencies = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling.factor == 1:
        return frequencies
    return _llama3_scaling(frequencies, config.rope_scaling)


def _llama3_scaling(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, interpolate between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    smooth = (scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelengths <= low) & (wavelengths >= high), between, scaled)


def rope_angles(config: ModelConfig, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each token, fp32, each of shape (B, S, 1, D)."""
    frequencies = rope_frequencies(config, positions_BS.device)
    angles = positions_BS.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def apply_rope(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's channel pairs by their token's angles; keeps dtype and shape."""
    first, second = x_BSHD.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x_BSHD * cos + rotated * sin).to(x_BSHD.dtype)
