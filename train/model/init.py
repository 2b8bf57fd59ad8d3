"""Initial weights that are the same in every layout.

Each block of rows of a parameter has a generator of its own, seeded by the run's seed, the
parameter's name and the block's number: a rank draws just the blocks that its shard touches, and
what it draws does not depend on the rank, the layout or the device.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from phalanx.checkpoint.chunks import chunk_of
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.transformer import parameter_name

ROWS_PER_BLOCK = 64


@torch.no_grad()
def init_weights(module: nn.Module, config: ModelConfig, *, seed: int) -> None:
    """Fill every parameter in place: norms 1, biases 0, matrices N(0, std).

    The projections that write to the residual stream (wo, w2) get std / sqrt(2 num_layers)
    (GPT-2 report, section 2.3).
    """
    for fqn, parameter in module.named_parameters():
        chunk = chunk_of(fqn, parameter)
        if chunk is None:
            continue
        local = chunk.local
        if fqn.endswith("bias"):
            local.zero_()
        elif parameter.dim() == 1:
            local.fill_(1.0)
        else:
            residual = fqn.endswith(("wo.weight", "w2.weight"))
            std = config.init_std / (math.sqrt(2 * config.num_layers) if residual else 1.0)
            name = f"{seed}:{parameter_name(fqn, config)}"
            _fill_normal(local, tuple(chunk.offsets), parameter.shape[1], std, name)


def _fill_normal(
    local: Tensor, offset: tuple[int, ...], num_columns: int, std: float, name: str
) -> None:
    """Fill rows of a matrix's shard; draws happen on the CPU, in fp32."""
    rows, columns = local.shape
    if not local.numel():
        return
    first = offset[0] // ROWS_PER_BLOCK
    last = (offset[0] + rows - 1) // ROWS_PER_BLOCK
    for block in range(first, last + 1):
        digest = hashlib.blake2b(f"{name}:{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(ROWS_PER_BLOCK, num_columns).normal_(0.0, std, generator=generator)
        begin = max(block * ROWS_PER_BLOCK, offset[0])
        end = min((block + 1) * ROWS_PER_BLOCK, offset[0] + rows)
        part = drawn[begin - block * ROWS_PER_BLOCK : end - block * ROWS_PER_BLOCK]
        local[begin - offset[0] : end - offset[0]].copy_(part[:, offset[1] : offset[1] + columns])
