"""Batches: the same for every layout, labelled within documents; and read ahead."""

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from phalanx.train.data.config import CorpusConfig, DataConfig
from phalanx.train.data.indexed import TokenWriter
from phalanx.train.data.source import Batch, BatchSource, Prefetcher


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    random = np.random.default_rng(7)
    for name, first, count in (("a", 0, 60), ("b", 30_000, 25), ("c", 60_000, 40)):
        with TokenWriter(tmp_path / name, vocab_size=100_000) as writer:
            for number in range(count):
                writer.add(first + number * 100 + np.arange(random.integers(1, 40)))
    corpora = [
        CorpusConfig(path=str(tmp_path / name), weight=weight)
        for name, weight in (("a", 0.5), ("b", 0.2), ("c", 0.3))
    ]
    return DataConfig(corpora=corpora, eval_fraction=0.1)


def source(config: DataConfig, **changes: object) -> BatchSource:
    values: dict[str, object] = {
        "seq_len": 16,
        "global_batch_size": 12,
        "seed": 1,
        "dp_rank": 0,
        "dp_size": 1,
        **changes,
    }
    return BatchSource(config, **values)  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    pairs = [
        (one.tokens_BS, other.tokens_BS),
        (one.labels_BS, other.labels_BS),
        (one.positions_BS, other.positions_BS),
    ]
    if one.document_BS is not None and other.document_BS is not None:
        pairs.append((one.document_BS, other.document_BS))
    return one.sample_ids == other.sample_ids and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_every_layout_sees_the_same_batches(config: DataConfig, split: str, dp_size: int) -> None:
    whole = source(config, split=split)
    parts = [source(config, split=split, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    for step in (0, 1, 17, 1000):
        expected = whole.batch(step)
        batches = [part.batch(step) for part in parts]
        for name in ("tokens_BS", "labels_BS", "positions_BS", "document_BS"):
            joined = torch.cat([getattr(batch, name) for batch in batches])
            assert torch.equal(joined, getattr(expected, name))
        assert [i for batch in batches for i in batch.sample_ids] == expected.sample_ids
        assert sum(batch.num_valid for batch in batches) == expected.num_valid
    assert expected.sample_ids == list(range(12_000, 12_012))


def test_a_batch_depends_on_seed_and_step_alone(config: DataConfig) -> None:
    one, other, foreign = source(config), source(config), source(config, seed=2)
    later = one.batch(9)
    for step in range(3):
        other.batch(step)
    assert same(other.batch(9), later)
    assert not torch.equal(foreign.batch(9).tokens_BS, later.tokens_BS)
    # Another batch size cuts the same sequence of samples.
    small = source(config, global_batch_size=4)
    rows = torch.cat([small.batch(step).tokens_BS for step in range(27, 30)])
    assert torch.equal(rows, later.tokens_BS)


def test_labels_positions_and_documents(config: DataConfig) -> None:
    batch = source(config).batch(2)
    tokens, labels = batch.tokens_BS.tolist(), batch.labels_BS.tolist()
    assert batch.document_BS is not None
    documents, positions = batch.document_BS.tolist(), batch.positions_BS.tolist()
    crossings = 0
    for row in range(12):
        number, place = 0, 0
        for at in range(16):
            if at > 0 and tokens[row][at] // 100 != tokens[row][at - 1] // 100:
                number, place = number + 1, 0
                assert labels[row][at - 1] == -100
                crossings += 1
            elif at > 0:
                assert labels[row][at - 1] == tokens[row][at] == tokens[row][at - 1] + 1
            assert (documents[row][at], positions[row][at]) == (number, place)
            place += 1
        assert labels[row][-1] in (-100, tokens[row][-1] + 1)
    assert crossings > 3
    assert batch.num_valid == sum(label != -100 for row in labels for label in row)
    dtypes = [tensor.dtype for tensor in (batch.tokens_BS, batch.labels_BS, batch.positions_BS)]
    assert dtypes == [torch.int64] * 3
    assert batch.document_BS.dtype == torch.int32


def test_without_document_mask_a_sample_is_plain_text(config: DataConfig) -> None:
    masked = source(config).batch(3)
    config.document_mask = False
    plain = source(config).batch(3)
    assert torch.equal(plain.tokens_BS, masked.tokens_BS)
    assert plain.document_BS is None
    assert plain.num_valid == plain.labels_BS.numel() > masked.num_valid
    assert torch.equal(plain.labels_BS[:, :-1], plain.tokens_BS[:, 1:])
    assert torch.equal(plain.positions_BS, torch.arange(16).expand(12, 16))


def test_splits_share_no_document_and_keep_the_blend(config: DataConfig) -> None:
    def documents(split: str) -> tuple[set[int], dict[int, int]]:
        batches = [source(config, split=split).batch(step) for step in range(50)]
        tokens = torch.cat([batch.tokens_BS for batch in batches])
        firsts = (tokens[:, 0] // 30_000).tolist()
        return set((tokens // 100).flatten().tolist()), {c: firsts.count(c) for c in range(3)}

    train, train_rows = documents("train")
    held_out, eval_rows = documents("eval")
    assert held_out <= {54, 55, 56, 57, 58, 59, 323, 324, 636, 637, 638, 639}
    assert not train & held_out
    for rows in (train_rows, eval_rows):
        assert [abs(rows[c] - share) <= 1 for c, share in enumerate((300, 120, 180))] == [True] * 3


def test_runs_of_any_seed_evaluate_on_the_same_samples(config: DataConfig) -> None:
    one, other = (source(config, split="eval", seed=seed).batch(0) for seed in (1, 2))
    assert same(one, other)


def test_wrong_arguments_are_named(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"global_batch_size=12: not divisible by 5"):
        source(config, dp_size=5)
    with pytest.raises(ValueError, match=r"dp_rank=2: must lie in \[0, 2\)"):
        source(config, dp_rank=2, dp_size=2)
    with pytest.raises(ValueError, match=r"training\.seed=-1: must be 0 or more"):
        source(config, seed=-1)
    with pytest.raises(ValueError, match=r"split='test': must be one of train, eval"):
        source(config, split="test")


@pytest.mark.parametrize("bad", [300, -1])
def test_a_token_outside_the_vocabulary_names_its_corpus(tmp_path: Path, bad: int) -> None:
    for name, token in (("good", 299), ("bad", bad)):
        with TokenWriter(tmp_path / name, vocab_size=100_000) as writer:
            for number in range(40):
                writer.add(np.array([3, 4, 5, token if number == 30 else 0, 6]))
    corpora = [CorpusConfig(path=str(tmp_path / name)) for name in ("good", "bad")]
    config = DataConfig(corpora=corpora, eval_fraction=0)
    checked, unchecked = source(config, vocab_size=300), source(config)
    steps = range(10)
    lows = [int(unchecked.batch(step).tokens_BS.min()) for step in steps]
    highs = [int(unchecked.batch(step).tokens_BS.max()) for step in steps]
    first = next(n for n in steps if lows[n] < 0 or highs[n] > 299)
    for step in range(first):
        assert same(checked.batch(step), unchecked.batch(step))
    prefetcher = Prefetcher(checked, first, 2)
    with pytest.raises(ValueError, match=rf"bad holds token {bad}, .*vocab_size=300; ") as caught:
        next(prefetcher)
    prefetcher.close()
    assert ("raise model.vocab_size to at least 301" in str(caught.value)) == (bad == 300)
    assert "tokenizer" in str(caught.value)
    config.corpora = corpora[:1]
    assert all(
        same(source(config, vocab_size=300).batch(n), source(config).batch(n)) for n in steps
    )


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_batches_are_the_sources(config: DataConfig, depth: int) -> None:
    batches = source(config)
    prefetcher = Prefetcher(source(config), 5, depth)
    for step, batch in zip(range(5, 12), prefetcher, strict=False):
        assert same(batch, batches.batch(step))
    prefetcher.close()
    prefetcher.close()
    assert list(islice(prefetcher, 1)) == []
    assert "data-prefetch" not in [thread.name for thread in threading.enumerate()]


class Failing(BatchSource):
    """Raises at step 2."""

    def batch(self, step: int) -> Batch:
        if step == 2:
            raise OSError("disk gone")
        return super().batch(step)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_comes_with_the_batch_that_it_prevents(config: DataConfig, depth: int) -> None:
    failing = Failing(config, seq_len=16, global_batch_size=2, seed=1, dp_rank=0, dp_size=1)
    prefetcher = Prefetcher(failing, 0, depth)
    assert [next(prefetcher).sample_ids for _ in range(2)] == [[0, 1], [2, 3]]
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(prefetcher)
    prefetcher.close()
    assert "data-prefetch" not in [thread.name for thread in threading.enumerate()]


def test_reading_ahead_stops_at_the_depth(config: DataConfig) -> None:
    class Counting(BatchSource):
        steps: list[int]

        def batch(self, step: int) -> Batch:
            self.steps.append(step)
            reached.set() if len(self.steps) == 3 else None
            return super().batch(step)

    reached = threading.Event()
    counting = Counting(config, seq_len=16, global_batch_size=2, seed=1, dp_rank=0, dp_size=1)
    counting.steps = []
    prefetcher = Prefetcher(counting, 0, 2)
    # Two wait in the queue and the third in the thread's hand, before anyone has asked.
    assert reached.wait(30)
    assert counting.steps == [0, 1, 2]
    assert next(prefetcher).sample_ids == [0, 1]
    prefetcher.close()
    with pytest.raises(ValueError, match=r"data\.prefetch=-1"):
        Prefetcher(counting, 0, -1)
