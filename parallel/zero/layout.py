"""Where the parameters of a unit lie in the slices that ranks hold of it (see `slices`).

`slots` are all slices of a unit, (L, R, N): the slice z = r L + l lies at [l, r], so that what the
L ranks of node r hold is [:, r], and what the R ranks at place l of their nodes hold is [l]. Hops
between nodes and inside a node then move contiguous memory (slice reordering of ZeRO++, section
3.3).
"""

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor

from phalanx.parallel.zero.slices import Entry, Slices


class SliceLayout(Slices):
    """The slices of one unit, over R nodes x L ranks."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], *, across: int, local: int, block: int = 1
    ) -> None:
        """`shapes` have a dim 0; `block`: elements of a quantization block, 1 for none."""
        super().__init__(shapes, num_slices=across * local, block=block)
        self.across, self.local = across, local

    def fill_slice(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Copy (and cast) this rank's part of every parameter into its slice (N,); zeros between.

        Parts may be short, or empty.
        """
        filled = 0
        for entry, part in sorted(zip(self.entries, parts, strict=True), key=_by_offset):
            out[filled : entry.offset].zero_()
            filled = entry.offset + part.numel()
            out[entry.offset : filled].copy_(part.reshape(-1))
        out[filled:].zero_()

    def parts_of(self, whole: Tensor, slice_index: int) -> list[Tensor]:
        """Views of each parameter's rows in a slice (N,)."""
        parts = []
        for entry in self.entries:
            rows = entry.rows_of(slice_index)
            flat = whole[entry.offset : entry.offset + rows * entry.row_numel]
            parts.append(flat.view(rows, *entry.shape[1:]))
        return parts

    def unpack(self, slots: Tensor, wholes: Sequence[Tensor]) -> None:
        """Copy slots, (L R, N) in any shape, into the whole parameters, flat ones too."""
        slots = slots.view(self.local, self.across, self.numel)
        for entry, whole in zip(self.entries, wholes, strict=True):
            for part, place in self._pieces(entry, slots, whole.view(-1)):
                place.copy_(part)

    def pack(self, wholes: Sequence[Tensor | None], slots: Tensor, *, add: bool = False) -> None:
        """Copy, cast or `add` whole gradients into slots (L, R, N); None stands for zeros.

        Without `add`, padding becomes zero.
        """
        if not add:
            self._zero_padding(slots)
        for entry, whole in zip(self.entries, wholes, strict=True):
            if whole is None:
                if not add:
                    slots[:, :, entry.offset : entry.offset + entry.chunk].zero_()
                continue
            for part, place in self._pieces(entry, slots, whole.reshape(-1)):
                part.add_(place) if add else part.copy_(place)

    def _pieces(
        self, entry: Entry, slots: Tensor, whole: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views, (of slots, of the whole), that hold the same elements."""
        region = slots[:, :, entry.offset : entry.offset + entry.chunk].transpose(0, 1)
        node = self.local * entry.chunk
        full_nodes = whole.numel() // node if node else 0
        if full_nodes:
            taken = whole[: full_nodes * node]
            yield region[:full_nodes], taken.view(full_nodes, self.local, entry.chunk)
        if full_nodes == self.across or not entry.chunk:
            return
        rest = whole[full_nodes * node :]
        full = rest.numel() // entry.chunk
        if full:
            yield region[full_nodes, :full], rest[: full * entry.chunk].view(full, entry.chunk)
        last = rest[full * entry.chunk :]
        if last.numel():
            yield region[full_nodes, full, : last.numel()], last

    def _zero_padding(self, slots: Tensor) -> None:
        """What no element of a parameter goes to."""
        filled = 0
        for entry in sorted(self.entries, key=lambda entry: entry.offset):
            slots[:, :, filled : entry.offset].zero_()
            filled = entry.offset + entry.chunk
            held = prod(entry.shape)
            if held < self.num_slices * entry.chunk:
                first = held // entry.chunk
                for index in range(first, self.num_slices):
                    row, place = index % self.local, index // self.local
                    begin = entry.offset + (held - first * entry.chunk if index == first else 0)
                    slots[row, place, begin:filled].zero_()
        slots[:, :, filled:].zero_()


def _by_offset(pair: tuple[Entry, Tensor]) -> int:
    return pair[0].offset
