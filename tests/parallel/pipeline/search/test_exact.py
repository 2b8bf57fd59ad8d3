"""The search finds what the exact solver proves to be best, on small cases."""

import itertools
import random
import sys

import pytest

from phalanx.parallel.pipeline.graph import loop_placement, v_placement
from phalanx.parallel.pipeline.order.problem import Problem
from phalanx.parallel.pipeline.search import best_order, least_memory
from phalanx.parallel.pipeline.search.bound import lower_bound
from phalanx.parallel.pipeline.simulate import Costs, Memory, simulate
from phalanx.parallel.pipeline.validate import validate
from tests.parallel.pipeline.search.exact import proven_best

pytestmark = pytest.mark.pipeline

COSTS = [(1, 1, 1, 0), (10, 12, 8, 2), (10, 10, 4, 0)]
LIMITS = [0.5, 0.75, 1.0, 1.5, 2.0]
"""In p microbatches."""


def check(placement: tuple[int, ...], m: int, costs: Costs, memory: Memory, limit: float) -> None:
    """The search's schedule is as short as the proven one, and the bound is one."""
    proven = proven_best(placement, num_microbatches=m, costs=costs, memory=memory, limit=limit)
    validate(proven, memory=memory, limit=limit)
    best = simulate(proven, costs).longest_stage
    found = best_order(placement, num_microbatches=m, costs=costs, memory=memory, limit=limit)
    assert simulate(found, costs).longest_stage == pytest.approx(best, rel=1e-9)
    assert lower_bound(Problem(placement, m, costs, memory, limit)) <= best * (1 + 1e-9)


def uniform(p: int, m: int, chunks: int, costs: tuple[float, ...], limit: float) -> None:
    """`check` for equal stages."""
    placement = loop_placement(p) if chunks == 1 else v_placement(p)
    size = {"num_stages": p * chunks, "chunks": chunks}
    memory = Memory.uniform(2, -1, -1, **size)
    check(placement, m, Costs.uniform(*costs, **size), memory, 2 * p * limit)


@pytest.mark.parametrize(("p", "m"), [(2, 3), (3, 3)])
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("limit", [0.75, 1.0, 2.0])
def test_one_stage_a_rank(p: int, m: int, costs: tuple[float, ...], limit: float) -> None:
    pytest.importorskip("ortools")
    uniform(p, m, 1, costs, limit)


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("costs", COSTS[:2])
@pytest.mark.parametrize("limit", [0.75, 1.0])
def test_v_of_two_ranks(m: int, costs: tuple[float, ...], limit: float) -> None:
    pytest.importorskip("ortools")
    uniform(2, m, 2, costs, limit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "m", "chunks"), [(3, 4, 1), (4, 4, 1), (4, 8, 1), (2, 4, 2), (3, 3, 2)]
)
def test_larger_ones(p: int, m: int, chunks: int) -> None:
    pytest.importorskip("ortools")
    for costs, limit in itertools.product(COSTS, LIMITS):
        uniform(p, m, chunks, costs, limit)


@pytest.mark.slow
def test_unequal_stages() -> None:
    pytest.importorskip("ortools")
    rnd = random.Random(5)
    for _ in range(40):
        p, m = rnd.choice((2, 3)), rnd.choice((2, 3, 4))
        placement = rnd.choice((loop_placement(p), loop_placement(2, 2), v_placement(2)))
        S = len(placement)
        costs = Costs(
            *(tuple(float(rnd.randint(2, 9)) for _ in range(S)) for _ in range(3)),
            hop=rnd.choice((0, 1)),
        )
        f = tuple(float(rnd.randint(2, 4)) for _ in range(S))
        w = tuple(-float(rnd.randint(1, int(x) - 1)) for x in f)
        memory = Memory(f, tuple(-x - y for x, y in zip(f, w, strict=True)), w)
        least = least_memory(placement, num_microbatches=m, memory=memory)
        check(placement, m, costs, memory, least + rnd.randint(0, 8))


def test_limit_that_nothing_meets() -> None:
    pytest.importorskip("ortools")
    costs, memory = Costs.uniform(1, 1, 1, num_stages=2), Memory.uniform(2, -1, -1, num_stages=2)
    with pytest.raises(ValueError, match="no order fits"):
        proven_best((0, 1), num_microbatches=2, costs=costs, memory=memory, limit=1.0)


def test_costs_without_a_common_unit() -> None:
    pytest.importorskip("ortools")
    costs = Costs.uniform(2**0.5, 1, 1, num_stages=2)
    memory = Memory.uniform(2, -1, -1, num_stages=2)
    with pytest.raises(ValueError, match="common unit"):
        proven_best((0, 1), num_microbatches=2, costs=costs, memory=memory)


def test_no_proof_in_time() -> None:
    pytest.importorskip("ortools")
    costs, memory = Costs.uniform(7, 8, 5, 1, num_stages=8), Memory.uniform(2, -1, -1, num_stages=8)
    with pytest.raises(TimeoutError, match="small cases"):
        proven_best(
            v_placement(4),
            num_microbatches=8,
            costs=costs,
            memory=memory,
            limit=8,
            time_limit_s=0.05,
        )


def test_without_or_tools_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    costs, memory = Costs.uniform(1, 1, 1, num_stages=2), Memory.uniform(2, -1, -1, num_stages=2)
    with pytest.raises(ModuleNotFoundError, match="pip install ortools"):
        proven_best((0, 1), num_microbatches=2, costs=costs, memory=memory)
