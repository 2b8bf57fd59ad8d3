"""AdamW whose moments lie in memory as 8-bit or 4-bit codes.

Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022; Li et al., Memory Efficient
Optimizers with 4-bit States, 2023. A step takes a slice of a shard at a time: codes to numbers,
AdamW in the parameter's format, numbers to codes. Blocks lie inside rows (`blocks`), so a shard of
any rows computes what the whole parameter's step computes for them, bit for bit, and codes and
scales are saved and cut anew like any other tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from phalanx.train.optim.adamw import MOMENTS
from phalanx.train.optim.arithmetic import adamw_update
from phalanx.train.optim.block_codes import Moment, Scratch, codecs
from phalanx.train.optim.blocks import FORMATS, StateFormat, block_size, check_column_cut
from phalanx.train.optim.config import OptimConfig
from phalanx.train.optim.sharded import column_parts, laid_out_like, local_of

SLICE = {"cpu": 2**17, "cuda": 2**20}
"""Elements of a slice by kind of device: what a core's cache holds, or what fills a GPU."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """What one parameter's shard remembers."""

    block: int | None
    """Elements of a block; None = moments in full precision."""
    moments: tuple[Moment | Tensor, Moment | Tensor]
    weight_decay: float
    step: Tensor
    """Steps done: a number in host memory."""


class LowBitAdamW:
    """Optimizer of one rank's parameters; see `FORMATS` for its formats.

    Matrices decay, vectors do not. Vectors and small matrices keep moments in full precision. State
    exists from the start, so that a checkpoint loads into it in place.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        """Raises:
        ValueError: ranks cut a parameter's columns inside a block.
        """
        self._config = config
        self._format = FORMATS[config.name]
        self._codecs = codecs(self._format)
        self._parameters = dict(named_parameters)
        for name, parameter in self._parameters.items():
            parts = column_parts(parameter)
            check_column_cut(config.name, name, parameter.shape, parts=parts)
        self._states = {
            name: _new_state(parameter, self._format, config)
            for name, parameter in self._parameters.items()
        }
        self._scratch: dict[tuple[torch.device, torch.dtype], Scratch] = {}

    @torch.no_grad()
    def step(self, lr: float, *, keep_gradients: bool = False) -> None:
        """Update every parameter that has a gradient, then drop the gradients.

        `keep_gradients`: leave them in place.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                state = self._states[name]
                state.step.add_(1)
                shard, grad = local_of(parameter), local_of(parameter.grad).contiguous()
                assert shard.is_contiguous(), name
                if shard.numel():
                    self._update(shard, grad, state, lr)
        if not keep_gradients:
            self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free every parameter's gradient."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """States by name, laid out as the parameters are; views, not copies.

        `optim.<moment>_codes.<name>` and `optim.<moment>_scales.<name>` of matrices (rows, bytes)
        uint8 and (rows, blocks) fp32; `optim.<moment>.<name>` of the rest; `optim.step.<name>`.
        """
        tensors: dict[str, Tensor] = {}
        for name, state in self._states.items():
            parameter = self._parameters[name]
            for kind, moment in zip(MOMENTS, state.moments, strict=True):
                if isinstance(moment, Tensor):
                    tensors[f"optim.{kind}.{name}"] = laid_out_like(parameter, moment)
                    continue
                assert state.block is not None
                blocks = prod(parameter.shape[1:]) // state.block
                bytes_a_row = blocks * self._format.code_bytes(state.block)
                for part, local, columns in (
                    ("codes", moment.codes, bytes_a_row),
                    ("scales", moment.scales, blocks),
                ):
                    tensors[f"optim.{kind}_{part}.{name}"] = laid_out_like(
                        parameter, local, shape=(parameter.shape[0], columns)
                    )
            tensors[f"optim.step.{name}"] = state.step
        return tensors

    def _update(self, shard: Tensor, grad: Tensor, state: _State, lr: float) -> None:
        """Step one shard, slice by slice."""
        size = state.block or 1
        limit = SLICE["cuda" if shard.is_cuda else "cpu"]
        scratch = self._scratch_for(shard, max(limit, size + 1))
        step = int(state.step.item())
        parameters, grads = shard.view(-1, size), grad.view(-1, size)
        # An odd block of 4 bits takes one more.
        for part in _slices(len(parameters), max(1, limit // (size + size % 2))):
            parameter = parameters[part]
            numbers = self._numbers(state, part, parameter, scratch)
            adamw_update(
                parameter,
                grads[part],
                *numbers,
                temporary=scratch.temporary[: parameter.numel()].view_as(parameter),
                config=self._config,
                lr=lr,
                weight_decay=state.weight_decay,
                step=step,
            )
            self._keep(state, part, numbers, scratch)

    def _numbers(
        self, state: _State, part: slice, like: Tensor, scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """Both moments of a slice of blocks, (N, B) as `like`."""
        m, v = (
            moment.view(-1, 1)[part] if isinstance(moment, Tensor) else place[: like.numel()]
            for moment, place in zip(state.moments, (scratch.m, scratch.v), strict=True)
        )
        m, v = m.view_as(like), v.view_as(like)
        for moment, numbers, codec in zip(state.moments, (m, v), self._codecs, strict=True):
            if isinstance(moment, Moment):
                codes, scales = _blocks(moment, part)
                codec.decode(codes, scales, numbers, scratch)
        return m, v

    def _keep(
        self, state: _State, part: slice, numbers: tuple[Tensor, Tensor], scratch: Scratch
    ) -> None:
        """Write a slice's moments back, where they are not in place."""
        for moment, values, codec in zip(state.moments, numbers, self._codecs, strict=True):
            if isinstance(moment, Moment):
                codes, scales = _blocks(moment, part)
                codec.encode(values, codes, scales, scratch)

    def _scratch_for(self, shard: Tensor, size: int) -> Scratch:
        key = shard.device, shard.dtype
        if key not in self._scratch or len(self._scratch[key].m) < size:
            self._scratch[key] = Scratch(size, dtype=shard.dtype, device=shard.device)
        return self._scratch[key]


def _new_state(parameter: nn.Parameter, state: StateFormat, config: OptimConfig) -> _State:
    """Zeros for this rank's part of a parameter."""
    shard = local_of(parameter)
    size = block_size(parameter.shape, state)
    moments: tuple[Moment | Tensor, Moment | Tensor]
    if size is None:
        moments = torch.zeros_like(shard), torch.zeros_like(shard)
    else:
        rows, blocks = shard.shape[0], prod(shard.shape[1:]) // size
        zeros = (rows, blocks, state.code_bytes(size), shard.device)
        moments = Moment.zeros(*zeros), Moment.zeros(*zeros)
    return _State(
        block=size,
        moments=moments,
        weight_decay=config.weight_decay if parameter.dim() >= 2 else 0.0,
        step=torch.zeros((), dtype=torch.float32),
    )


def _blocks(moment: Moment, part: slice) -> tuple[Tensor, Tensor]:
    """Codes (N, C) and scales (N, 1) of a slice of blocks."""
    scales = moment.scales.view(-1, 1)
    return moment.codes.view(len(scales), -1)[part], scales[part]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)
