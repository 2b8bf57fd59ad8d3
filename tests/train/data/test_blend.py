"""The blend: every corpus's samples in order, and its share held in every prefix."""

import random
from fractions import Fraction

import pytest

from phalanx.train.data.blend import Blend

CASES = 60
SAMPLES = 1500


def random_weights(generator: random.Random) -> list[float]:
    kinds = [
        lambda: round(generator.random(), 2) + 0.01,
        lambda: generator.random() + 1e-9,
        lambda: 10 ** generator.uniform(-4, 3),
        lambda: float(generator.randint(1, 3)),
    ]
    kind = generator.choice(kinds)
    return [kind() for _ in range(generator.randint(1, 12))]


@pytest.mark.parametrize("case", range(CASES))
def test_indices_count_up_and_shares_hold(case: int) -> None:
    weights = random_weights(random.Random(case))
    blend = Blend(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [float(weight / sum(exact)) for weight in exact]
    seen = [0] * len(weights)
    # Proven in the module: half a sample for two corpora, one for three, 1.7 for any number.
    bound = {1: 0.0, 2: 0.5, 3: 1.0}.get(len(weights), 1.7)
    for n in range(SAMPLES):
        corpus, index = blend.locate(n)
        assert index == seen[corpus]
        seen[corpus] += 1
        for count, share in zip(seen, shares, strict=True):
            assert abs(count - share * (n + 1)) <= bound + 1e-9


def test_far_samples_are_exact() -> None:
    # 10^15 samples in, shares of 0.1 and 0.3 stand where integers put them: no float drifts.
    blend = Blend([0.1, 0.3, 0.6])
    n = 10**15
    positions = dict(blend.locate(n + ahead) for ahead in range(10))
    assert abs(positions[0] - n // 10) <= 2
    assert abs(positions[1] - 3 * n // 10) <= 4
    assert abs(positions[2] - 6 * n // 10) <= 7


def test_weights_are_relative() -> None:
    one, other = Blend([1, 3]), Blend([0.25, 0.75])
    assert [one.locate(n) for n in range(50)] == [other.locate(n) for n in range(50)]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0]])
def test_weights_must_be_positive(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="all must be above 0"):
        Blend(weights)
