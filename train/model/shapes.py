"""Shapes of a model's parameters, in the units that are gathered together; without a model.

A test holds them to the modules and their plan. Torch-free.
"""

from phalanx.parallel.zero.cost import Shape, UnitShapes
from phalanx.train.model.config import ModelConfig


def unit_shapes(config: ModelConfig, layers: range, *, tp: int = 1) -> list[UnitShapes]:
    """The units of the model's part that holds `layers`, as one of `tp` tensor-parallel ranks."""
    units = []
    if layers:
        units.append(UnitShapes(shapes=_block(config, tp), count=len(layers)))
    first, last = layers.start == 0, layers.stop == config.num_layers
    matrix, norm = (config.vocab_size // tp, config.dim), (config.dim,)
    if first and last and config.tie_embeddings:
        # With the root, which stays gathered from its forward pass to its backward pass.
        return [*units, UnitShapes(shapes=(matrix, norm), gathers=1)]
    if first:  # an embedding's backward pass needs no weights
        units.append(UnitShapes(shapes=(matrix,), gathers=1))
    if last:
        units.append(UnitShapes(shapes=(norm, matrix), gathers=1))
    return units


def _block(config: ModelConfig, tp: int) -> tuple[Shape, ...]:
    dim, ffn = config.dim, config.ffn_dim // tp
    query = config.num_heads * config.size_of_head // tp
    key_value = config.kv_heads * config.size_of_head // tp
    shapes: list[Shape] = [(dim,), (dim,), (query, dim), (key_value, dim), (key_value, dim)]
    if config.attention_bias:
        shapes += [(query,), (key_value,), (key_value,)]
    if config.qk_norm:
        shapes += [(config.size_of_head,), (config.size_of_head,)]
    return (*shapes, (dim, query), (ffn, dim), (dim, ffn), (ffn, dim))
