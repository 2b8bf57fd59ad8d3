"""Slices of a unit against a slow layout: one element at a time, from torch.chunk's definition."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from phalanx.parallel.zero.layout import SliceLayout

Shape = tuple[int, ...]
NODES_BY_RANKS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2)]
UNITS: dict[str, list[Shape]] = {
    "block": [(7, 5), (5,), (13, 4), (2, 5), (11,), (4, 13)],
    "primes": [(31, 37), (37,), (298, 7), (2, 3, 5)],
    "ones": [(1,), (1, 1), (1, 1, 1)],
    "fewer rows than slices": [(2, 9), (3,), (1, 17), (5, 2)],
    "one vector": [(13,)],
    "one matrix": [(6, 8)],
    "3-D, experts": [(4, 3, 5), (5, 3, 2), (8,), (1, 2, 2)],
    "vectors first": [(6,), (9,), (6, 6)],
    "even": [(12, 16), (12,), (24, 16)],
}
BLOCKS = [1, 8, 6, 15]
NOWHERE = 0.0


def numbered(shapes: Sequence[Shape]) -> list[Tensor]:
    """Wholes in which every element of the unit has a number of its own, from 1 on."""
    wholes, first = [], 1
    for shape in shapes:
        count = prod(shape)
        wholes.append(torch.arange(first, first + count, dtype=torch.float64).view(shape))
        first += count
    return wholes


def slow_slots(layout: SliceLayout, wholes: Sequence[Tensor]) -> Tensor:
    """(L, R, N), filled one element after the other."""
    slots = torch.full((layout.local, layout.across, layout.numel), NOWHERE, dtype=torch.float64)
    for entry, whole in zip(layout.entries, wholes, strict=True):
        for index, chunk in enumerate(whole.chunk(layout.num_slices)):
            node, place = divmod(index, layout.local)
            for i, value in enumerate(chunk.flatten().tolist()):
                assert slots[place, node, entry.offset + i] == NOWHERE, "two elements in one place"
                slots[place, node, entry.offset + i] = value
    return slots


def packed(layout: SliceLayout, wholes: Sequence[Tensor | None]) -> Tensor:
    """Slots whose memory held other things."""
    slots = torch.full((layout.local, layout.across, layout.numel), 7e7, dtype=torch.float64)
    layout.pack(wholes, slots)
    return slots


def parts(wholes: Sequence[Tensor], layout: SliceLayout, index: int) -> list[Tensor]:
    """What slice `index` has of each whole; torch.chunk may make fewer chunks than asked for."""
    chunks = [whole.chunk(layout.num_slices) for whole in wholes]
    return [
        found[index] if index < len(found) else whole[:0]
        for found, whole in zip(chunks, wholes, strict=True)
    ]


def layouts() -> Iterator[tuple[str, SliceLayout, list[Shape], int]]:
    """Every unit over all nodes by ranks in all sizes of blocks: what to call the case, its layout,
    the unit's shapes and the block's size."""
    for (unit, shapes), (across, local), block in product(UNITS.items(), NODES_BY_RANKS, BLOCKS):
        layout = SliceLayout(shapes, across=across, local=local, block=block)
        yield f"{unit}, {across} nodes of {local}, block {block}", layout, shapes, block


def test_there_are_216_layouts() -> None:
    assert len({case for case, *_ in layouts()}) == 216


def test_every_element_has_one_place() -> None:
    for case, layout, shapes, _ in layouts():
        wholes = numbered(shapes)
        slots = packed(layout, wholes)
        assert torch.equal(slots, slow_slots(layout, wholes)), case
        held = slots[slots != NOWHERE].sort().values
        assert torch.equal(held, torch.cat([whole.flatten() for whole in wholes])), case

        back = [torch.full_like(whole, -1) for whole in wholes]
        layout.unpack(slots, back)
        assert all(torch.equal(one, other) for one, other in zip(back, wholes, strict=True)), case


def test_a_slice_is_its_ranks_rows() -> None:
    """fill_slice, parts_of and rows_of against torch.chunk, and against the slots."""
    for case, layout, shapes, _ in layouts():
        wholes = numbered(shapes)
        slots = packed(layout, wholes)
        for index in range(layout.num_slices):
            which = f"{case}: slice {index}"
            mine = parts(wholes, layout, index)
            own = torch.full((layout.numel,), 7e7, dtype=torch.float64)
            layout.fill_slice(mine, own)
            assert torch.equal(own, slots[index % layout.local, index // layout.local]), which
            rows = [entry.rows_of(index) for entry in layout.entries]
            assert rows == [len(part) for part in mine], which
            found = layout.parts_of(own, index)
            for part, expected in zip(found, mine, strict=True):
                assert part.shape == expected.shape, which
                assert torch.equal(part, expected), which
                assert part.untyped_storage().data_ptr() == own.untyped_storage().data_ptr(), which


def test_no_block_mixes_parameters() -> None:
    for case, layout, shapes, block in layouts():
        owners = [torch.full(shape, float(i + 1)) for i, shape in enumerate(shapes)]
        slots = torch.zeros(layout.local, layout.across, layout.numel)
        layout.pack(owners, slots)
        matrices = slots[:, :, : layout.matrix_numel]
        for row in matrices.reshape(-1, block):
            assert len(set(row.tolist()) - {0.0}) <= 1, case
        ranks = {float(i + 1): len(shape) for i, shape in enumerate(shapes)}
        assert all(ranks[owner] >= 2 for owner in set(matrices.flatten().tolist()) - {0.0}), case
        vectors = set(slots[:, :, layout.matrix_numel :].flatten().tolist()) - {0.0}
        assert all(ranks[owner] == 1 for owner in vectors), case
        assert layout.matrix_numel % block == 0, case
        # Bytes of every region's beginning are a multiple of 16 even in one-byte formats.
        assert layout.matrix_numel % 16 == 0, case
        assert layout.numel % 16 == 0, case


@pytest.mark.parametrize(
    ("across", "local", "order"),
    [
        (2, 2, [0, 2, 1, 3]),
        (2, 4, [0, 4, 1, 5, 2, 6, 3, 7]),
        (4, 2, [0, 2, 4, 6, 1, 3, 5, 7]),
        (1, 4, [0, 1, 2, 3]),
        (4, 1, [0, 1, 2, 3]),
        (3, 2, [0, 2, 4, 1, 3, 5]),
    ],
)
def test_slots_are_in_the_published_order(across: int, local: int, order: list[int]) -> None:
    """ZeRO++ (Wang et al., 2023), section 3.3: before two hops of all-to-all, inside nodes and then
    between, chunk z of N nodes x D devices goes to place (z % D) * N + z // D."""
    count = across * local
    layout = SliceLayout([(count, 16)], across=across, local=local)
    chunk_of_row = torch.arange(count, dtype=torch.float64).view(-1, 1).expand(-1, 16)
    slots = torch.empty(local, across, layout.numel, dtype=torch.float64)
    layout.pack([chunk_of_row], slots)
    found = [int(slot[0]) for slot in slots.view(count, -1)]
    assert found == order
    for chunk in range(count):
        assert found[(chunk % local) * across + chunk // local] == chunk


@pytest.mark.parametrize(("across", "local"), [(2, 2), (2, 3)])
def test_adding_keeps_what_was_there(across: int, local: int) -> None:
    shapes = UNITS["block"]
    layout = SliceLayout(shapes, across=across, local=local, block=8)
    wholes = numbered(shapes)
    slots = packed(layout, wholes)
    expected = slots.clone()
    halves: list[Tensor | None] = [whole / 2 for whole in wholes]
    halves[0] = halves[3] = None
    layout.pack(halves, slots, add=True)
    expected += packed(layout, halves)
    assert torch.equal(slots, expected)


def test_none_stands_for_zeros() -> None:
    shapes = UNITS["fewer rows than slices"]
    layout = SliceLayout(shapes, across=2, local=3, block=8)
    wholes: list[Tensor | None] = [*numbered(shapes)]
    wholes[1] = wholes[2] = None
    zeros = [
        torch.zeros(shape, dtype=torch.float64) if whole is None else whole
        for whole, shape in zip(wholes, shapes, strict=True)
    ]
    assert torch.equal(packed(layout, wholes), packed(layout, zeros))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32])
def test_formats_are_cast_on_the_way(low: torch.dtype) -> None:
    shapes = UNITS["primes"]
    layout = SliceLayout(shapes, across=2, local=2, block=8)
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    slots = torch.empty(2, 2, layout.numel, dtype=low)
    layout.pack(wholes, slots)
    assert torch.equal(slots, packed(layout, wholes).to(low))

    back = [torch.empty(shape, dtype=torch.float64) for shape in shapes]
    layout.unpack(slots, back)
    for one, other in zip(back, wholes, strict=True):
        assert torch.equal(one, other.to(low).double())

    own = torch.empty(layout.numel, dtype=low)
    layout.fill_slice(parts(wholes, layout, 1), own)
    assert torch.equal(own, slots[1, 0])


def test_gradients_may_lie_in_any_order() -> None:
    """Autograd hands over transposed and expanded gradients."""
    layout = SliceLayout([(7, 5), (9,)], across=2, local=2, block=8)
    turned = torch.arange(35, dtype=torch.float64).view(5, 7).t()
    spread = torch.ones((), dtype=torch.float64).expand(9)
    slots = packed(layout, [turned, spread])
    assert torch.equal(slots, packed(layout, [turned.contiguous(), spread.contiguous()]))
