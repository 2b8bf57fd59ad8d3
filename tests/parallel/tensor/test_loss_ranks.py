"""Cross-entropy over a cut vocabulary equals torch's over the whole one.

Shapes: N tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from phalanx.parallel.ranks import Ranks, process_group
from phalanx.parallel.tensor.loss import IGNORE, cross_entropy_sum

N, V = 13, 20


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits (fp64) and labels by what is special about them."""
    generator = torch.Generator().manual_seed(0)

    def logits(scale: float) -> Tensor:
        return torch.randn(N, V, generator=generator, dtype=torch.float64) * scale

    labels = torch.arange(N) * 7 % V
    some = labels.clone()
    some[::3] = IGNORE
    edges = torch.tensor([0, 4, 5, 9, 10, 14, 15, 19, 0, 19, 9, 10, IGNORE])
    extreme = logits(1.0).sign() * 1e4
    one_hot = torch.full((N, V), -1e4, dtype=torch.float64)
    one_hot[torch.arange(N), labels] = 1e4
    return {
        "plain": (logits(1.0), labels),
        "some ignored": (logits(3.0), some),
        "all ignored": (logits(1.0), torch.full((N,), IGNORE)),
        "edges of the cuts": (logits(1.0), edges),
        "extreme": (extreme, some),
        "extreme and right": (one_hot, labels),
        "extreme and wrong": (one_hot, (labels + 3) % V),
        "far from zero": (logits(1.0) + 1e4, labels),
        "far below zero": (logits(1.0) - 1e4, labels),
    }


def loss_and_gradient(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy_sum(leaf, labels, group)
    (loss * 0.37).backward()  # an upstream gradient that is not 1
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def torchs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same over the whole vocabulary, in fp64."""
    leaf = logits.detach().double().clone().requires_grad_()
    loss = F.cross_entropy(leaf, labels, reduction="sum", ignore_index=IGNORE)
    (loss * 0.37).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def losses(ranks: Ranks) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """This rank's loss and gradient by case, in fp64, fp32 and bf16."""
    with process_group(ranks):
        group = dist.group.WORLD
        width = V // ranks.world_size
        columns = slice(ranks.rank * width, (ranks.rank + 1) * width)
        return {
            name: {
                str(dtype): loss_and_gradient(logits[:, columns].to(dtype), labels, group)
                for dtype in (torch.float64, torch.float32, torch.bfloat16)
            }
            for name, (logits, labels) in cases().items()
        }


@pytest.mark.parametrize("tp", [2, 4])
def test_equals_the_whole_vocabulary(run_ranks: Callable[..., list[Any]], tp: int) -> None:
    found = run_ranks(losses, world_size=tp)
    for name, (logits, labels) in cases().items():
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
            parts = [rank[name][str(dtype)] for rank in found]
            expected, expected_gradient = torchs(logits.to(dtype), labels)
            assert len({float(loss) for loss, _ in parts}) == 1, f"{name}: ranks differ"
            assert parts[0][0].dtype == dtype
            scale = max(1.0, abs(float(expected)))
            assert abs(float(parts[0][0]) - float(expected)) <= tolerance * scale, name
            gradient = torch.cat([gradient for _, gradient in parts], dim=1).double()
            torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)
            assert not gradient[labels == IGNORE].any(), f"{name}: an ignored token has a gradient"


def test_bf16_logits_are_summed_in_fp32(run_ranks: Callable[..., list[Any]]) -> None:
    found = run_ranks(losses, world_size=2)
    logits, labels = cases()["some ignored"]
    expected, expected_gradient = torchs(logits.bfloat16(), labels)
    parts = [rank["some ignored"]["torch.bfloat16"] for rank in found]
    assert parts[0][0].dtype == torch.float32
    torch.testing.assert_close(parts[0][0].double(), expected, rtol=1e-6, atol=0)
    gradient = torch.cat([gradient for _, gradient in parts], dim=1)
    assert gradient.dtype == torch.bfloat16  # the logits' own, rounded once
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("name", cases())
def test_without_a_group_it_is_torchs(name: str) -> None:
    logits, labels = cases()[name]
    loss, gradient = loss_and_gradient(logits, labels, None)
    expected, expected_gradient = torchs(logits, labels)
    assert float(loss) == float(expected)
    assert torch.equal(gradient, expected_gradient)


def test_all_ignored_is_zero_not_nan() -> None:
    loss, gradient = loss_and_gradient(torch.randn(3, V), torch.full((3,), IGNORE), None)
    assert float(loss) == 0
    assert not gradient.any()
