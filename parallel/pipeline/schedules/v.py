"""Two stages a rank in a V: ZB-V, V-Half and V-Min.

Rank i holds stages i and 2p - 1 - i, so that ranks whose first stage's activations live long hold
those of their second one shortly. Qi et al., Pipeline Parallelism with Controllable Memory
(2405.15362), section 3; ZB-V from Zero Bubble Pipeline Parallelism (2401.10241), section 6.
"""

from phalanx.parallel.pipeline.graph import Schedule, v_placement
from phalanx.parallel.pipeline.schedules.blocks import Block, from_block
from phalanx.parallel.pipeline.simulate import Costs


def zb_v(p: int, num_microbatches: int, costs: Costs) -> Schedule:
    """No bubble where F = B = W, in 1F1B's memory: p microbatches, the same on every rank."""
    ranks = range(p)
    down = [2 * i for i in ranks]
    up = [6 * p - 5 - 4 * i for i in ranks]
    back_down = [6 * p - 4 + 2 * i for i in ranks]
    back_up = [12 * p - 9 - 4 * i for i in ranks]
    block = Block(v_placement(p), down + up[::-1], back_up + back_down[::-1])
    return from_block("zb_v", block, num_microbatches, costs, peak_stages=2 * p)


def v_half(p: int, num_microbatches: int, costs: Costs) -> Schedule:
    """Half of 1F1B's bubble in half its memory: (p + 2) // 2 microbatches."""
    ranks, rest = range(p), 3 if p % 2 == 0 else 0
    down = [2 * i for i in ranks]
    up = [3 * p - 2 - i for i in ranks]
    back_down = [3 * p - 1 + rest + 2 * i for i in ranks]
    back_up = [6 * p - 2 + rest - i for i in ranks]
    block = Block(v_placement(p), down + up[::-1], back_up + back_down[::-1])
    return from_block("v_half", block, num_microbatches, costs, peak_stages=(p + 2) // 2 * 2)


def v_min(p: int, num_microbatches: int, costs: Costs) -> Schedule:
    """Two thirds of 1F1B's bubble in a third of its memory: (p + 4) // 3 microbatches."""
    ranks, rest = range(p), 2 if p % 3 == 0 else 0
    down = list(ranks)
    up = [2 * p - 1 - i for i in ranks]
    back_down = [2 * p + rest + i for i in ranks]
    back_up = [4 * p - 1 + rest - i for i in ranks]
    block = Block(v_placement(p), down + up[::-1], back_up + back_down[::-1])
    return from_block("v_min", block, num_microbatches, costs, peak_stages=(p + 4) // 3 * 2)
