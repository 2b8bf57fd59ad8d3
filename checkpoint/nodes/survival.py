"""How likely it is that snapshots in memory outlive the failures of nodes (REFT's reliability).

Nodes fail independently, at a constant rate; a group lives on as long as no more of its nodes fail
than it has parities. Torch-free.
"""

from collections.abc import Iterable
from math import comb, exp, expm1, inf, log1p


def survival(group_sizes: Iterable[int], *, parity: int, hours: float, node_mtbf_h: float) -> float:
    """The probability that no group loses more than `parity` of its nodes in `hours`.

    A node is alive after them with q = exp(-hours / node_mtbf_h). Without parity, with groups of
    one node, it is the probability that all nodes stay alive.

    Args:
        group_sizes: nodes of each group.
        parity: nodes of each that may be lost.
        hours: time in which nothing is rebuilt; where lost nodes are replaced, that takes so long.
        node_mtbf_h: mean hours between failures of one node, above 0.
    """
    assert hours >= 0, hours
    assert node_mtbf_h > 0, node_mtbf_h
    dead, alive = -expm1(-hours / node_mtbf_h), exp(-hours / node_mtbf_h)
    logarithm = 0.0
    for size in group_sizes:
        # The small side is summed: next to 1, the probability of loss would drown in rounding.
        lost = sum(
            comb(size, failed) * dead**failed * alive ** (size - failed)
            for failed in range(parity + 1, size + 1)
        )
        logarithm += log1p(-lost) if lost < 1 else -inf
    return exp(logarithm)
