"""Nodes divided into groups across failure domains, and how likely a group survives."""

import itertools
import random
from collections import Counter
from math import comb, exp

import pytest

from phalanx.checkpoint.nodes.groups import make_groups
from phalanx.checkpoint.nodes.survival import survival


def worst(groups: list[tuple[int, ...]], racks: list[str]) -> int:
    """Most nodes of a rack in a group."""
    counts = (Counter(racks[node] for node in group if racks[node]) for group in groups)
    return max((max(count.values(), default=0) for count in counts), default=0)


@pytest.mark.parametrize("parity", [1, 2, 3])
@pytest.mark.parametrize("group_size", [4, 8, 10])
def test_groups_hold_every_node_once_and_are_nearly_equal(parity: int, group_size: int) -> None:
    made = 0
    for num_nodes in range(1, 70):
        try:
            groups, notes = make_groups([""] * num_nodes, parity=parity, group_size=group_size)
        except ValueError:
            fewest = -(-num_nodes // group_size)
            assert num_nodes // fewest <= parity
            continue
        made += 1
        assert sorted(itertools.chain(*groups)) == list(range(num_nodes))
        sizes = [len(group) for group in groups]
        assert max(sizes) - min(sizes) <= 1
        assert parity < min(sizes) <= max(sizes) <= group_size
        assert len(groups) == -(-num_nodes // group_size)
        assert groups == sorted(tuple(sorted(group)) for group in groups)
        assert not notes
    assert made > 15


def test_without_parity_every_node_is_alone() -> None:
    assert make_groups(["a", "a", ""], parity=0, group_size=8) == ([(0,), (1,), (2,)], [])


def test_a_rack_may_be_lost_where_that_is_possible() -> None:
    """Against the least that any placement can reach, over many random labels."""
    rng = random.Random(5)
    warned = 0
    for _ in range(500):
        num_nodes, parity = rng.randint(4, 40), rng.randint(1, 3)
        labels = [""] + [f"r{number}" for number in range(rng.randint(1, 12))]
        racks = [rng.choice(labels) for _ in range(num_nodes)]
        try:
            groups, notes = make_groups(racks, parity=parity, group_size=8)
        except ValueError:
            continue
        assert sorted(itertools.chain(*groups)) == list(range(num_nodes))
        assert max(map(len, groups)) <= 8
        assert min(map(len, groups)) > parity
        counts = Counter(rack for rack in racks if rack)
        most_groups = num_nodes // (parity + 1)
        hopeless = {rack for rack, count in counts.items() if count > parity * most_groups}
        assert len(notes) == len(hopeless)
        for rack in hopeless:
            assert any(f"rack {rack} holds" in note for note in notes)
        if not hopeless:
            assert worst(groups, racks) <= parity
        warned += bool(notes)
    assert 0 < warned < 400


def test_groups_are_no_smaller_than_racks_ask_for() -> None:
    racks = list("aabbccdd")
    assert make_groups(racks, parity=2, group_size=8)[0] == [tuple(range(8))]
    groups, notes = make_groups(racks, parity=1, group_size=8)
    assert groups == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert not notes


def test_a_crowded_rack_is_named() -> None:
    groups, notes = make_groups(["left"] * 5 + ["right"], parity=1, group_size=8)
    assert groups == [(0, 1, 2, 3, 4, 5)]
    (note,) = notes
    assert "rack left holds 5 nodes of one group (0, 1, 2, 3, 4)" in note
    assert "checkpoint.snapshot.parity" in note


@pytest.mark.parametrize(
    ("num_nodes", "parity", "words"),
    [
        (1, 1, ("launch.nodes=1 ", "at least 2", "launch.nodes=2 or more")),
        (2, 2, ("launch.nodes=2 ", "at least 3", "launch.nodes=3 or more")),
        (9, 5, ("launch.nodes=9 ", "group_size=8", "cannot be divided")),
        (9, 8, ("launch.nodes=9 ", "group_size=8", "cannot be divided")),
    ],
)
def test_too_few_nodes_are_refused(num_nodes: int, parity: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.snapshot\.parity") as caught:
        make_groups([""] * num_nodes, parity=parity, group_size=8)
    assert all(word in str(caught.value) for word in words), caught.value


def test_survival_is_reft_s() -> None:
    """RAIM5's formula: (q^n + n q^(n-1) (1-q))^groups; unprotected q^nodes."""
    q = exp(-24 / 5000)
    raim5 = (q**8 + 8 * q**7 * (1 - q)) ** 16
    assert survival([8] * 16, parity=1, hours=24, node_mtbf_h=5000) == pytest.approx(raim5)
    alone = survival([1] * 128, parity=0, hours=24, node_mtbf_h=5000)
    assert alone == pytest.approx(q**128)
    assert alone < raim5 < survival([8] * 16, parity=2, hours=24, node_mtbf_h=5000)


def test_survival_by_counting() -> None:
    """Every set of dead nodes of unequal groups, one by one."""
    sizes, parity, q = [3, 4], 1, exp(-1 / 3)
    total = 0.0
    for dead in itertools.product([False, True], repeat=7):
        if sum(dead[:3]) <= parity and sum(dead[3:]) <= parity:
            total += (1 - q) ** sum(dead) * q ** (7 - sum(dead))
    assert survival(sizes, parity=parity, hours=1, node_mtbf_h=3) == pytest.approx(total)


def test_survival_at_its_ends() -> None:
    assert survival([8] * 4, parity=1, hours=0, node_mtbf_h=10) == 1.0
    assert survival([8] * 4, parity=1, hours=1e9, node_mtbf_h=10) == 0.0
    rare = 1 - survival([10], parity=2, hours=0.01, node_mtbf_h=1000)  # about C(10, 3) 1e-15
    assert rare == pytest.approx(comb(10, 3) * 1e-15, rel=0.01)
