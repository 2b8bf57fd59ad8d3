"""The batches that a data-parallel rank trains on, and a thread that reads them ahead.

The sequence of global samples is decided by the seed alone. Step s of batch size B takes samples
[s * B, (s + 1) * B), and each data-parallel rank a contiguous block of those: any layout sees the
same batch, and the step is all that a checkpoint has to know about the data.

Shapes: B samples of this rank, S tokens.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.parallel.tensor.loss import IGNORE
from phalanx.train.data.blend import Blend
from phalanx.train.data.config import DataConfig, corpora
from phalanx.train.data.indexed import TokenFile
from phalanx.train.data.packing import SPLITS, PackedCorpus

EVAL_SEED = 0
"""The held-out split is shuffled by this, so that runs of any seed evaluate on the same samples."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's samples of one step."""

    tokens_BS: Tensor
    """Input tokens, int64."""
    labels_BS: Tensor
    """The token after each one, int64; -100 at a document's last token."""
    positions_BS: Tensor
    """Place of each token in its document, from the sample's or the document's start, int64."""
    document_BS: Tensor | None
    """Which of the sample's documents each token belongs to, from 0, int32; None where
    data.document_mask is off."""
    sample_ids: list[int]
    """Global sample number of each row."""
    num_valid: int
    """Labels that are not -100."""


class BatchSource:
    """Batches by step."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        dp_rank: int,
        dp_size: int,
        split: str = "train",
        vocab_size: int | None = None,
    ) -> None:
        """Open the corpora of `config` for rank `dp_rank` of `dp_size`.

        Args:
            vocab_size: model.vocab_size, which the tokens of every batch are held against; None =
                they are not looked at.

        Raises:
            ValueError: the batch does not divide, or a corpus cannot be read or is too small.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank}: must lie in [0, {dp_size})")
        if seed < 0:
            raise ValueError(f"training.seed={seed}: must be 0 or more")
        if global_batch_size % dp_size:
            raise ValueError(
                f"training.global_batch_size={global_batch_size}: not divisible by {dp_size} "
                "data-parallel ranks"
            )
        self.global_batch_size = global_batch_size
        self._document_mask = config.document_mask
        self._rows = global_batch_size // dp_size
        self._first_row = dp_rank * self._rows
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        chosen = corpora(config)
        self._paths = [corpus.path for corpus in chosen]
        self._blend = Blend([corpus.weight for corpus in chosen])
        self._corpora = [
            PackedCorpus(
                TokenFile(corpus.path),
                seq_len=seq_len,
                eval_fraction=config.eval_fraction,
                split=split,
                seed=seed if split == "train" else EVAL_SEED,
                corpus=number,
            )
            for number, corpus in enumerate(chosen)
        ]

    def batch(self, step: int) -> Batch:
        """This rank's rows of step `step`, counted from 0.

        Raises:
            ValueError: a token lies outside the vocabulary.
        """
        first = step * self.global_batch_size + self._first_row
        sample_ids = list(range(first, first + self._rows))
        tokens = np.empty((self._rows, self._seq_len + 1), dtype=np.int64)
        documents = np.empty((self._rows, self._seq_len + 1), dtype=np.int32)
        for row, sample_id in enumerate(sample_ids):
            corpus, index = self._blend.locate(sample_id)
            tokens[row], documents[row] = self._corpora[corpus].sample(index)
        self._check_tokens(tokens, sample_ids)
        labels = tokens[:, 1:].copy()
        places = np.arange(self._seq_len, dtype=np.int64)
        positions = np.broadcast_to(places, labels.shape)
        if self._document_mask:
            crosses = documents[:, 1:] != documents[:, :-1]
            labels[crosses] = IGNORE
            starts = np.zeros_like(labels)
            starts[:, 1:] = np.where(crosses[:, :-1], places[1:], 0)
            positions = places - np.maximum.accumulate(starts, axis=1)
        inputs = documents[:, :-1].copy()
        return Batch(
            tokens_BS=torch.from_numpy(tokens[:, :-1].copy()),
            labels_BS=torch.from_numpy(labels),
            positions_BS=torch.from_numpy(positions.copy()),
            document_BS=torch.from_numpy(inputs) if self._document_mask else None,
            sample_ids=sample_ids,
            num_valid=int((labels != IGNORE).sum()),
        )

    def _check_tokens(self, tokens: NDArray[np.int64], sample_ids: list[int]) -> None:
        """Corpora are looked into only at their beginning before a run, so here as they are read.

        Tensor parallelism would take a token that no rank holds for a row of zeros.
        """
        size = self._vocab_size
        if size is None or (tokens.min() >= 0 and tokens.max() < size):
            return
        row, place = np.argwhere((tokens < 0) | (tokens >= size))[0]
        corpus, _ = self._blend.locate(sample_ids[row])
        token = int(tokens[row, place])
        remedy = f"raise model.vocab_size to at least {token + 1}, or " if token > 0 else ""
        raise ValueError(
            f"data.corpora: {self._paths[corpus]} holds token {token}, outside "
            f"model.vocab_size={size}; {remedy}make the corpus anew with this model's tokenizer"
        )


class Prefetcher(Iterator[Batch]):
    """Batches of successive steps without end, `depth` of them read ahead in the background.

    An error in the background is raised where the batch that it prevented is asked for.
    """

    def __init__(self, source: BatchSource, first_step: int, depth: int) -> None:
        if depth < 0:
            raise ValueError(f"data.prefetch={depth}: must be 0 or more")
        self._source = source
        self._step = first_step
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
            self._thread = threading.Thread(
                target=self._read_ahead, args=(first_step,), name="data-prefetch", daemon=True
            )
            self._thread.start()

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        if self._error is not None:
            raise self._error
        if self._thread is None:
            batch = self._source.batch(self._step)
            self._step += 1
            return batch
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return item

    def close(self) -> None:
        """Stop reading; the iterator ends. May be called twice."""
        self._closed.set()
        while self._thread is not None and self._thread.is_alive():
            # The thread may wait for room in the queue: make some until it has seen the flag.
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                self._thread.join(0.01)

    def _read_ahead(self, step: int) -> None:
        try:
            while not self._closed.is_set():
                self._queue.put(self._source.batch(step))
                step += 1
        except BaseException as error:
            self._queue.put(error)
