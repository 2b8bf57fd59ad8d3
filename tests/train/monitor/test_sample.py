"""Sampled text depends on the logits, the seed and the step alone."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from phalanx.train.monitor.sample import choose, generate

LETTERS = "abcdefgh"
SEQ_LEN = 4
MODEL_VOCAB = 12
"""Wider than the tokenizer's: rows that padding adds."""


@pytest.fixture
def tokenizer() -> Tokenizer:
    letters = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, "a"))
    letters.pre_tokenizer = Split("", "isolated")
    letters.decoder = Fuse()
    return letters


class NextLetter:
    """Prefers the letter after the last one, by `margin`; remembers what it was shown."""

    def __init__(self, margin: float = 5.0) -> None:
        self.margin = margin
        self.windows: list[list[int]] = []

    def __call__(self, tokens_BS: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        assert tokens_BS.shape == (1, SEQ_LEN)
        assert tokens_BS.dtype == torch.int64
        self.windows.append(tokens_BS[0, : lengths[0]].tolist())
        logits_BV = torch.zeros(1, MODEL_VOCAB)
        logits_BV[0, (self.windows[-1][-1] + 1) % len(LETTERS)] = self.margin
        logits_BV[0, len(LETTERS) :] = 100.0
        return logits_BV


@pytest.fixture
def write(tokenizer: Tokenizer) -> Callable[..., str]:
    def call(model: NextLetter, **changes: object) -> str:
        arguments = {
            "prompt": "ab",
            "num_tokens": 6,
            "seq_len": SEQ_LEN,
            "temperature": 1.0,
            "seed": 1,
            "step": 3,
        }
        return generate(model, tokenizer, **(arguments | changes))

    return call


def test_greedy_text_and_sliding_window(write: Callable[..., str]) -> None:
    model = NextLetter()
    assert write(model, temperature=0.0) == "abcdefgh"
    assert model.windows == [
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
        [3, 4, 5, 6],
    ]


def test_draws_depend_on_seed_and_step(write: Callable[..., str]) -> None:
    def draw(**changes: object) -> str:
        return write(NextLetter(margin=0.5), num_tokens=30, **changes)

    text = draw()
    assert text == draw()
    assert set(text) <= set(LETTERS)  # never a padding row, however likely
    assert len({text, draw(seed=2), draw(step=4)}) == 3


def test_global_random_numbers_stay_as_they_are(write: Callable[..., str]) -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    write(NextLetter())
    assert torch.equal(torch.rand(4), expected)


def test_temperature_sharpens() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    counts = {}
    for temperature in (0.2, 1.0):
        generator = torch.Generator().manual_seed(0)
        draws = [
            choose(logits_V, temperature=temperature, generator=generator) for _ in range(2000)
        ]
        counts[temperature] = torch.bincount(torch.tensor(draws), minlength=3) / 2000
    torch.testing.assert_close(counts[1.0], torch.softmax(logits_V, 0), atol=0.04, rtol=0)
    torch.testing.assert_close(counts[0.2], torch.softmax(logits_V * 5, 0), atol=0.02, rtol=0)


def test_end_token_ends_the_text(write: Callable[..., str]) -> None:
    assert write(NextLetter(), temperature=0.0, end_id=4) == "abcd"


def test_empty_prompt_and_broken_model_are_named(write: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"monitor\.sample\.prompt=''"):
        write(NextLetter(), prompt="")
    with pytest.raises(FloatingPointError, match="after step 3"):
        write(NextLetter(margin=float("nan")))
