"""Quantized gathers and reductions between ranks, against their definition in fp64.

The reference is that of `quantized.py` beside this file, applied to torch.chunk's rows; of the
engine's layout it uses that a slice of a matrix is filled up to whole blocks, and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from math import inf, nan, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.parallel.kernels.block_format import BlockFormat, Quantization
from phalanx.parallel.zero.config import PartitionConfig, ZeroConfig
from phalanx.parallel.zero.layout import SliceLayout
from phalanx.parallel.zero.partition import Extent
from tests.parallel.zero.bare_unit import FP32, Job, same, work
from tests.parallel.zero.quantized import LARGEST, adversarial, largest_error
from tests.parallel.zero.quantized import reference as rounded

WORLD = 4
INT8, INT4, FP8 = Quantization.int8, Quantization.int4, Quantization.fp8
NONE, NODE, ALL = Extent
BF16 = torch.bfloat16
BLOCK = 8
SHAPES: list[tuple[int, ...]] = [
    (1, 1),
    (7, 1),
    (8, 1),
    (9, 1),
    (13,),
    (31, 13),
    (37, 5),
    (3, 7, 5),
    (1,),
    (2, 33),
    (1, 104),
    (67, 16),
]
"""1 element, primes, a block and one more or less; fewer rows than ranks; 3-D; vectors."""


def contents(seed: int) -> list[Tensor]:
    """Adversarial numbers for every shape."""
    fmt = BlockFormat(INT4, BLOCK)
    return [
        adversarial(fmt, -(-prod(shape) // BLOCK), seed=seed + 31 * number)
        .roll(3 * BLOCK * (seed + number))[: prod(shape)]
        .view(shape)
        for number, shape in enumerate(SHAPES)
    ]


def spread(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Numbers of several magnitudes, all finite."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator)
        * torch.logspace(-3, 2, shape[0], 10.0).view(-1, *[1] * (len(shape) - 1))
        for shape in shapes
    ]


def slices(tensor: Tensor, block: int) -> Tensor:
    """A matrix's rows cut as torch.chunk cuts, each filled up with zeros: (WORLD, M)."""
    chunks = [chunk.flatten() for chunk in tensor.chunk(WORLD)]
    size = -(-len(chunks[0]) // block) * block
    chunks += [tensor.new_zeros(0)] * (WORLD - len(chunks))
    return torch.stack([F.pad(chunk, (0, size - len(chunk))) for chunk in chunks])


def joined(sliced: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `slices` cut."""
    rows = -(-shape[0] // WORLD) * prod(shape[1:])
    return sliced[:, :rows].flatten()[: prod(shape)].view(shape)


def expected_weight(weight: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """What a master comes to be, and how far off that may be, in fp64."""
    back, scales = rounded(slices(weight, fmt.block), fmt)
    bound = largest_error(back, scales, fmt)
    return joined(back, tuple(weight.shape)), joined(bound, tuple(weight.shape))


def expected_sum(grads: list[Tensor], fmt: BlockFormat, *, local: int) -> tuple[Tensor, Tensor]:
    """The sum of ranks' gradients over one hop or two, added up in fp32; and half a scale for each
    value that was rounded."""
    hops = [(local, WORLD // local), (WORLD // local, 1)]
    values = [slices(grad, fmt.block) for grad in grads]
    bound = torch.zeros_like(values[0], dtype=torch.float64)
    for ranks, groups in hops:
        if ranks == 1:
            continue
        sums = []
        for group in range(groups):
            total = None
            for value in values[group * ranks : (group + 1) * ranks]:
                back, scales = rounded(value, fmt)
                bound += scales / 2
                total = back.float() if total is None else total + back.float()
            assert total is not None
            sums.append(total)
        values = sums
    [total] = values
    return joined(total, tuple(grads[0].shape)), joined(bound, tuple(grads[0].shape))


KINDS = [(INT8, INT8), (INT4, INT4), (FP8, INT8)]
PER_NODE = [2, 4, 1]
"""Two hops; one inside the only node; one between nodes of one rank."""


def jobs_of_every_kind() -> list[Job]:
    weights = contents(0)
    targets = [[contents(1 + rank) for rank in range(WORLD)]]
    return [
        Job(
            zero=ZeroConfig(
                quantize_weights=for_weights, quantize_gradients=for_grads, block_size=BLOCK
            ),
            ranks_per_node=per_node,
            weights=weights,
            targets=targets,
            compute=compute,
        )
        for per_node in PER_NODE
        for for_weights, for_grads in KINDS
        for compute in ((FP32, BF16) if for_weights is FP8 else (FP32,))
    ]


def test_collectives_are_what_they_are_defined_to_be(run_ranks: Callable[..., list[Any]]) -> None:
    """Outliers, zeros, denormals, ties, extremes, NaN and infinities, in every size."""
    jobs = jobs_of_every_kind()
    by_rank = run_ranks(work, jobs, world_size=WORLD)
    known: dict[Any, Any] = {}
    for number, job in enumerate(jobs):
        found = [rank[number][0] for rank in by_rank]
        for other in found:
            assert other.masters_kept, "a gather leaves masters as they are"
            assert all(map(same, other.weights, found[0].weights)), "all ranks compute the same"
        check_weights(job, found[0].weights, known)
        check_grads(job, found[0].grads)


def check_weights(job: Job, found: list[Tensor], known: dict[Any, Any]) -> None:
    fmt = BlockFormat(job.zero.quantize_weights, BLOCK)
    if fmt not in known:
        known[fmt] = [expected_weight(w, fmt) if w.dim() > 1 else None for w in job.weights]
    for weight, seen, expected in zip(job.weights, found, known[fmt], strict=True):
        if expected is None:
            assert same(seen, weight.to(job.compute)), "vectors are never rounded"
            continue
        back, bound = expected
        assert same(seen, back.to(job.compute)), (fmt, tuple(weight.shape))
        finite = ~back.isnan()
        off = (back - weight.double()).abs()[finite]
        assert torch.all(off <= bound[finite] * (1 + 1e-5))
        assert torch.all(back.isnan()[~weight.isfinite()]), "what is not finite is NaN"


def check_grads(job: Job, found: list[Tensor]) -> None:
    fmt = BlockFormat(job.zero.quantize_gradients, BLOCK)
    for number, grad in enumerate(found):
        everyone = [rank[number].to(job.compute).float() for rank in job.targets[0]]
        exact = torch.stack(everyone).double().sum(0)
        roundings = 4 * 2.0**-24 * torch.stack(everyone).abs().double().sum(0)
        told = (fmt, job.ranks_per_node, tuple(grad.shape))
        if grad.dim() < 2:
            finite = exact.isfinite() & (exact.abs() < 3e38)
            assert torch.equal(grad.isfinite(), finite), told
            assert torch.all((grad - exact).abs()[finite] <= roundings[finite]), told
            continue
        total, bound = expected_sum(everyone, fmt, local=job.ranks_per_node)
        assert same(grad, total), told
        assert torch.all(total.isnan()[~exact.isfinite()]), "what is not finite is NaN"
        finite = total.isfinite()
        allowed = bound * (1 + 1e-5) + roundings
        assert torch.all((total.double() - exact).abs()[finite] <= allowed[finite]), told


FEEDBACK_SHAPES: list[tuple[int, ...]] = [(5, 19), (11,), (1, 8), (23, 7)]
REPEATS = 16


def feedback_jobs() -> list[Job]:
    """A constant gradient many times: with feedback and without, on 2 nodes and on one."""
    weights = spread(0, FEEDBACK_SHAPES)
    targets = [[spread(1 + rank, FEEDBACK_SHAPES) for rank in range(WORLD)]] * REPEATS
    plain = ZeroConfig(quantize_gradients=INT4, block_size=BLOCK)
    fed = replace(plain, error_feedback=True)
    once_a_step = PartitionConfig(params=NODE, grads=NODE, states=ALL)
    return [
        Job(zero=zero, ranks_per_node=per_node, weights=weights, targets=targets, microbatches=m)
        for zero, per_node, m in (
            (fed, 2, 1),
            (fed, 4, 1),
            (replace(fed, quantize_gradients=INT8), 2, 1),
            (replace(fed, partition=once_a_step), 2, 2),
            (plain, 2, 1),
        )
    ]


def test_feedback_pays_back_what_rounding_took(run_ranks: Callable[..., list[Any]]) -> None:
    """What was sent, and the residuals of all ranks and hops, are what should have been sent; so
    the mean of T steps is off by one rounding / T, and not by one rounding."""
    jobs = feedback_jobs()
    by_rank = run_ranks(work, jobs, world_size=WORLD)
    for number, job in enumerate(jobs):
        found = [rank[number] for rank in by_rank]
        sent = [list(accumulate(step.grads[i].double() for step in found[0])) for i in range(4)]
        times = job.microbatches
        exact = [times * sum(r[i].double() for r in job.targets[0]) for i in range(4)]
        if not job.zero.error_feedback:
            assert all(not step.residuals for rank in found for step in rank)
            far = (sent[0][-1] - REPEATS * exact[0]).abs()
            assert torch.any(far > 2 * largest_residual(job, 0)), "nothing to pay back"
            continue
        for step in (0, 1, REPEATS - 1):
            left = residuals([rank[step].residuals for rank in found], job)
            for i, residual in enumerate(left):
                total = sent[i][step] + residual
                assert torch.allclose(total, (step + 1) * exact[i], rtol=1e-5, atol=1e-3)
        for i, sums in enumerate(sent):
            bound = largest_residual(job, i) + 1e-3
            for step, total in enumerate(sums):
                assert torch.all((total - (step + 1) * exact[i]).abs() <= bound), (step, i)


def residuals(by_rank: list[dict[str, Tensor]], job: Job) -> list[Tensor]:
    """All that ranks kept for later, by parameter, fp64."""
    nodes, near = WORLD // job.ranks_per_node, job.ranks_per_node
    layout = SliceLayout(FEEDBACK_SHAPES, across=nodes, local=near, block=BLOCK)
    names = {"local": near, "across": nodes}
    slots = torch.zeros(near, nodes, layout.numel, dtype=torch.float64)
    quantized = slots[:, :, : layout.matrix_numel]
    for rank, kept in enumerate(by_rank):
        assert kept.keys() == {name for name, size in names.items() if size > 1}
        if "local" in kept:
            quantized += kept["local"].view_as(quantized)
        if "across" in kept:
            quantized[rank % near] += kept["across"]
    wholes = [torch.zeros(shape, dtype=torch.float64) for shape in FEEDBACK_SHAPES]
    layout.unpack(slots, wholes)
    return wholes


def largest_residual(job: Job, number: int) -> Tensor:
    """Half a scale for each value that is rounded, where the scale's block holds a residual too:
    s <= (m + s / 2) / c for a largest gradient m and a largest code c."""
    shape = FEEDBACK_SHAPES[number]
    if len(shape) < 2:
        return torch.zeros(shape, dtype=torch.float64)
    largest_code = LARGEST[job.zero.quantize_gradients]
    times = job.microbatches if job.zero.extents.grads is NODE else 1
    peaks = [
        slices(rank[number], BLOCK).abs().unflatten(1, (-1, BLOCK)).amax(2).double()
        for rank in job.targets[0]
    ]
    near = job.ranks_per_node
    inside = sum(peaks) / (2 * largest_code - 1)
    if near == WORLD:
        total = inside
    else:
        node_sums = sum(peaks) * (2 * largest_code / (2 * largest_code - 1)) * times
        total = inside + node_sums / (2 * largest_code - 1)
    return joined(total.repeat_interleave(BLOCK, 1), shape)


def test_a_block_is_finite_again_after_the_step_that_was_not(
    run_ranks: Callable[..., list[Any]],
) -> None:
    """An infinity on one rank spoils its block in one step, and nothing in the next."""
    shapes = FEEDBACK_SHAPES
    clean = [spread(1 + rank, shapes) for rank in range(WORLD)]
    spoiled = [[grad.clone() for grad in grads] for grads in clean]
    spoiled[2][0][4, 1] = inf
    spoiled[1][3][0, 0] = nan
    job = Job(
        zero=ZeroConfig(quantize_gradients=INT4, block_size=BLOCK, error_feedback=True),
        ranks_per_node=2,
        weights=spread(0, shapes),
        targets=[clean, spoiled, clean],
    )
    for [found] in run_ranks(work, [job], world_size=WORLD):
        first, bad, after = found
        for i, ((row, column), width) in {0: ((4, 1), 19), 3: ((0, 0), 7)}.items():
            rows = -(-shapes[i][0] // WORLD)
            begin = row // rows * rows * width
            place = (row * width + column - begin) // BLOCK * BLOCK + begin
            end = min(place + BLOCK, begin + rows * width, prod(shapes[i]))
            wanted = torch.zeros(prod(shapes[i]), dtype=torch.bool)
            wanted[place:end] = True
            assert torch.equal(bad.grads[i].isnan().flatten(), wanted)
        for step in (first, after):
            assert all(grad.isfinite().all() for grad in step.grads)
        assert all(kept.isfinite().all() for kept in after.residuals.values())
