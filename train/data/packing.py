"""From one corpus's documents to samples of equal length.

An epoch puts the split's documents in a seeded order, one after the other, and cuts that row of
tokens into windows of seq_len + 1 that begin seq_len apart (the last token of a window is a label
only; it is the first input of the next). The windows are visited in a second seeded order. Epochs
follow each other without end. What is left behind the last whole window of an epoch, fewer than
seq_len tokens, is not seen in that epoch; the next epoch's order leaves other tokens there.

Sample i is a pure function of (seed, corpus, split, i), so the position in the data is one number.
"""

from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.train.data.indexed import TokenFile

EPOCHS_KEPT = 2
SPLITS = ("train", "eval")


def split_documents(num_documents: int, eval_fraction: float, *, name: str) -> tuple[range, range]:
    """Documents for training, and the last ones, held out.

    Raises:
        ValueError: there is no document left to train on.
    """
    held_out = 0
    if eval_fraction > 0:
        held_out = max(1, int(num_documents * Fraction(str(eval_fraction))))
    if held_out >= num_documents:
        raise ValueError(
            f"data.eval_fraction={eval_fraction}: holds out all documents of {name}, which has "
            f"{num_documents}; use data.eval_fraction=0, or text cut into more documents"
        )
    first_held_out = num_documents - held_out
    return range(first_held_out), range(first_held_out, num_documents)


def seeded_order(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(size) that the key decides.

    Sorts the raw numbers of a Philox generator: those are fixed by its definition, where numpy's
    own shuffling may change between its versions.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class _Epoch:
    order_D: NDArray[np.int64]
    """Document at each place of the row."""
    ends_D: NDArray[np.int64]
    """Where in the row the document at each place ends."""
    windows: NDArray[np.int64]
    """Window visited at each slot."""


class PackedCorpus:
    """Samples of one split of one corpus."""

    def __init__(
        self,
        file: TokenFile,
        *,
        seq_len: int,
        eval_fraction: float,
        split: str,
        seed: int,
        corpus: int = 0,
    ) -> None:
        """Cut `file`, the blend's corpus number `corpus`, into samples.

        Raises:
            ValueError: the split does not hold one sample.
        """
        train, held_out = split_documents(file.num_documents, eval_fraction, name=file.prefix)
        if split == "eval" and not held_out:
            raise ValueError("data.eval_fraction=0: holds out no documents to evaluate on")
        documents = train if split == "train" else held_out
        self.documents = documents
        self.seq_len = seq_len
        self._file = file
        self._key = (SPLITS.index(split), seed, corpus)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lengths = np.diff(file.offsets[documents.start : documents.stop + 1])
        num_tokens = int(self._lengths.sum())
        self.samples_per_epoch = (num_tokens - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"data.eval_fraction={eval_fraction}, training.seq_len={seq_len}: the {split} "
                f"split of {file.prefix} has {len(documents)} of {file.num_documents} documents "
                f"with {num_tokens} tokens, but one sample takes {seq_len + 1}; "
                f"{_remedy(split, eval_fraction)}"
            )

    def sample(self, index: int) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Sample `index`: its seq_len + 1 tokens, and each one's document, numbered from 0."""
        epoch = self._epoch(index // self.samples_per_epoch)
        begin = int(epoch.windows[index % self.samples_per_epoch]) * self.seq_len
        end = begin + self.seq_len + 1
        tokens = np.empty(self.seq_len + 1, dtype=np.int64)
        documents = np.empty(self.seq_len + 1, dtype=np.int32)
        place = int(np.searchsorted(epoch.ends_D, begin, side="right"))
        number, at = 0, begin
        while at < end:
            stop = min(end, int(epoch.ends_D[place]))
            if stop > at:  # not an empty document
                document = int(epoch.order_D[place])
                # From a place in the row to the place in the file, within this document.
                shift = int(self._file.offsets[document + 1]) - int(epoch.ends_D[place])
                tokens[at - begin : stop - begin] = self._file.tokens[at + shift : stop + shift]
                documents[at - begin : stop - begin] = number
                number, at = number + 1, stop
            place += 1
        return tokens, documents

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            split, seed, corpus = self._key
            order = seeded_order(len(self.documents), split, seed, corpus, number, 0)
            self._epochs[number] = _Epoch(
                order_D=order + self.documents.start,
                ends_D=np.cumsum(self._lengths[order]),
                windows=seeded_order(self.samples_per_epoch, split, seed, corpus, number, 1),
            )
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]


def _remedy(split: str, eval_fraction: float) -> str:
    if split == "eval":
        return "raise data.eval_fraction or lower training.seq_len"
    if eval_fraction > 0:
        return "lower training.seq_len or data.eval_fraction, or bring more text"
    return "lower training.seq_len or bring more text"
