"""Which corpus a sample comes from: exact shares, for every prefix of the sample sequence.

The corpora are the leaves of a binary tree. At a node whose left side holds the share p of its
weight, the first n samples give round(n * p) to the left, so sample n goes left if that number
grows at n, and its index there is the number before. All in integers: nothing drifts, and sample
n is found in O(log corpora) without a look at the samples before it.

The tree is Huffman's, heavy corpora near the root. Then the weights on the way from a leaf of
weight w to the root grow at least as w * (1, 1, 2, 3, 5, ...), and as each level adds half a sample
of rounding, scaled down by the levels below, a corpus is never further from its share than
1/2 * (1 + 1 + 1/2 + 1/3 + 1/5 + ...) < 1.7 samples, and with three corpora or fewer than one.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Split:
    """An inner node: `numerator / denominator` of the samples go left."""

    numerator: int
    denominator: int
    left: "_Split | int"
    right: "_Split | int"

    def left_count(self, n: int) -> int:
        """How many of the first n samples go left."""
        return (2 * n * self.numerator + self.denominator) // (2 * self.denominator)


class Blend:
    """Sample number to corpus and index within it."""

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"data.corpora: weights {list(weights)}: all must be above 0")
        # Decimal as written, so that 0.1 means one tenth.
        self._root = _tree([Fraction(str(weight)) for weight in weights])

    def locate(self, n: int) -> tuple[int, int]:
        """Corpus of sample n, and the sample's index within that corpus.

        Each corpus's indices run 0, 1, 2, ... as n grows.
        """
        node = self._root
        while isinstance(node, _Split):
            before = node.left_count(n)
            if node.left_count(n + 1) > before:
                node, n = node.left, before
            else:
                node, n = node.right, n - before
        return node, n


def _tree(weights: Sequence[Fraction]) -> _Split | int:
    # The counter in the middle decides between equal weights, so nodes are never compared.
    heap: list[tuple[Fraction, int, _Split | int]] = [
        (weight, corpus, corpus) for corpus, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    count = len(heap)
    while len(heap) > 1:
        light, _, right = heapq.heappop(heap)
        heavy, _, left = heapq.heappop(heap)
        share = heavy / (heavy + light)
        split = _Split(share.numerator, share.denominator, left, right)
        heapq.heappush(heap, (heavy + light, count, split))
        count += 1
    return heap[0][2]
