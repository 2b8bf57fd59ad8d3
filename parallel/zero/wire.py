"""The form in which slices travel: plain numbers, or quantized matrices with their scales."""

import torch
from torch import Tensor

from phalanx.parallel.kernels.block_format import BlockFormat
from phalanx.parallel.kernels.quantize import dequantize, dequantize_sum, quantize
from phalanx.parallel.zero.layout import SliceLayout
from phalanx.parallel.zero.slices import wire_bytes


class Wire:
    """Slices (K, N) of one layout in `dtype`, as rows of bytes (K, `nbytes`) and back.

    With a `format`, the matrices' region is quantized, and the vectors follow in `dtype`.
    """

    def __init__(self, layout: SliceLayout, dtype: torch.dtype, fmt: BlockFormat | None) -> None:
        self.layout, self.dtype = layout, dtype
        self._format = fmt if layout.matrix_numel else None
        self.quantized_numel = layout.matrix_numel if self._format is not None else 0
        """Elements of a slice that rounding touches, from its beginning on."""
        self._codes = 0 if self._format is None else self._format.row_bytes(self.quantized_numel)
        self.nbytes = wire_bytes(layout, fmt, dtype.itemsize)
        """Bytes of a slice."""

    def pack(self, slices: Tensor, residual: Tensor | None = None) -> Tensor:
        """(K, N) of any floating-point dtype -> (K, nbytes) bytes; may share memory.

        `residual` (K, matrices), in place: what rounding took before is added, what it takes now is
        left.
        """
        if self._format is None:
            return slices.to(self.dtype).view(torch.uint8)
        out = slices.new_empty(slices.shape[0], self.nbytes, dtype=torch.uint8)
        quantize(slices[:, : self.quantized_numel], out[:, : self._codes], self._format, residual)
        out[:, self._codes :].view(self.dtype).copy_(slices[:, self.quantized_numel :])
        return out

    def unpack(self, rows: Tensor) -> Tensor:
        """(K, nbytes) -> (K, N) in `dtype`; may share memory."""
        if self._format is None:
            return rows.view(self.dtype)
        out = rows.new_empty(rows.shape[0], self.layout.numel, dtype=self.dtype)
        dequantize(rows[:, : self._codes], out[:, : self.quantized_numel], self._format)
        out[:, self.quantized_numel :].copy_(rows[:, self._codes :].view(self.dtype))
        return out

    def unpack_sum(self, rows: Tensor, out: Tensor) -> None:
        """Sum of (K, nbytes) over K, in order, to (N,) in `dtype`."""
        assert self._format is not None
        dequantize_sum(rows[:, : self._codes], out[: self.quantized_numel], self._format)
        torch.sum(rows[:, self._codes :].view(self.dtype), 0, out=out[self.quantized_numel :])

    @property
    def is_quantized(self) -> bool:
        """Whether values are rounded on their way."""
        return self._format is not None
