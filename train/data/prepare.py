"""`phalanx data prepare` and `phalanx data show`: text to a tokenizer and a token corpus.

`data.dir` then holds tokenizer.json (unless data.tokenizer names one), tokens.bin and tokens.idx,
stats.json (what a loss is compared to), and last prepared.json, the settings that made them. All
is made in a folder beside and moved when whole: whatever stops it, no half-made data is taken for
whole.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from phalanx.train.data.config import DataConfig, corpora
from phalanx.train.data.indexed import TokenFile, TokenWriter
from phalanx.train.data.packing import PackedCorpus, split_documents
from phalanx.train.data.text import Text, fingerprint
from phalanx.train.data.tokenizer import eos_id, load_tokenizer, train_tokenizer

FORMAT = 1
"""Raised when the same settings make other files."""
BATCH_CHARACTERS = 1_000_000
STAMP, STATS, TOKENIZER = "prepared.json", "stats.json", "tokenizer.json"
SHOWN_TOKENS = 128


def prepare(config: DataConfig) -> None:
    """Make the tokenizer and the corpus of `config`, unless they stand as it would make them.

    Raises:
        ValueError: the text or the tokenizer cannot be had.
    """
    if config.corpora:
        names = ", ".join(corpus.path for corpus in config.corpora)
        print(f"data.corpora names token files: {names}. There is nothing to prepare.")
        return
    folder = Path(config.dir)
    settings = _settings(config)
    if _stands(folder, settings):
        print(f"{folder} stands as these settings make it:")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder) as staging:
            _make(config, settings, Path(staging))
            (folder / STAMP).unlink(missing_ok=True)
            made = sorted(Path(staging).iterdir(), key=lambda path: path.name == STAMP)
            for path in made:
                path.replace(folder / path.name)
        print(f"{folder} is made:")
    print(_summary(json.loads((folder / STATS).read_text())))


def show(config: DataConfig) -> str:
    """The corpora, their figures, and a packed sample with its document boundaries.

    Raises:
        ValueError: a corpus or the tokenizer is missing or broken.
    """
    lines = []
    for corpus in corpora(config):
        file = TokenFile(corpus.path)
        train, held_out = split_documents(
            file.num_documents, config.eval_fraction, name=corpus.path
        )
        lines.append(
            f"{corpus.path}: {file.num_tokens:,} tokens ({file.tokens.dtype.name}), "
            f"{file.num_documents:,} documents ({len(train):,} to train on, {len(held_out):,} "
            f"held out), weight {corpus.weight:g}"
        )
    stats = Path(config.dir) / STATS
    if not config.corpora and stats.is_file():
        lines.append(_summary(json.loads(stats.read_text())))
    tokenizer = load_tokenizer(config)
    lines.append(f"tokenizer: {tokenizer.get_vocab_size()} tokens")
    file = TokenFile(corpora(config)[0].path)
    train, _ = split_documents(file.num_documents, config.eval_fraction, name=file.prefix)
    packed = PackedCorpus(
        file,
        seq_len=max(1, min(SHOWN_TOKENS, int(file.offsets[len(train)]) - 1)),
        eval_fraction=config.eval_fraction,
        split="train",
        seed=0,
    )
    lines.append(_crossing_sample(packed, tokenizer))
    return "\n".join(lines)


def _crossing_sample(packed: PackedCorpus, tokenizer: Tokenizer) -> str:
    """The first sample that holds more than one document, or else the first."""
    numbers = range(min(packed.samples_per_epoch, 100))
    chosen = next((n for n in numbers if packed.sample(n)[1][-1] > 0), 0)
    tokens, documents = packed.sample(chosen)
    lines = [f"sample {chosen} of the training split, {packed.seq_len} tokens:"]
    pairs = zip(tokens.tolist(), documents.tolist(), strict=True)
    for number, group in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in group]
        lines.append(f"--- document {number}, {len(ids)} tokens")
        lines.append(tokenizer.decode(ids, skip_special_tokens=False))
    return "\n".join(lines)


def _settings(config: DataConfig) -> dict[str, Any]:
    """All that decides what `prepare` writes."""
    settings: dict[str, Any] = {"format": FORMAT, "source": config.source.value}
    settings["text"] = fingerprint(config)
    if config.tokenizer is None:
        settings["vocab_size"] = config.vocab_size
    else:
        load_tokenizer(config)
        content = Path(config.tokenizer).read_bytes()
        settings["tokenizer_sha256"] = hashlib.sha256(content).hexdigest()
    return settings


def _stands(folder: Path, settings: dict[str, Any]) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text())
        sizes = {name: (folder / name).stat().st_size for name in stamp["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(stamp["settings"] == settings and stamp["sizes"] == sizes)


def _make(config: DataConfig, settings: dict[str, Any], staging: Path) -> None:
    """Write every file into `staging`."""
    text = Text(config)
    if config.tokenizer is None:
        print(f"training a tokenizer of {config.vocab_size} tokens", flush=True)
        tokenizer = train_tokenizer(text, vocab_size=config.vocab_size)
        tokenizer.save(str(staging / TOKENIZER))
    else:
        tokenizer = load_tokenizer(config)
    # A document that speaks of "<|eos|>" must not end there.
    tokenizer.encode_special_tokens = True
    stats = _encode(text, tokenizer, staging / "tokens", name=config.tokenizer or TOKENIZER)
    (staging / STATS).write_text(json.dumps(stats, indent=2) + "\n")
    sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
    stamp = {"settings": settings, "sizes": sizes}
    (staging / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")


def _encode(text: Text, tokenizer: Tokenizer, prefix: Path, *, name: str) -> dict[str, Any]:
    """Write the corpus; return its figures."""
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    end = np.array([eos_id(tokenizer, name=name)])
    counts = np.zeros(vocab_size, dtype=np.int64)
    num_documents = num_bytes = 0
    with (
        TokenWriter(prefix, vocab_size=vocab_size) as writer,
        _progress_bar(text.num_bytes) as bar,
    ):
        for batch in _batches(text):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                tokens = np.concatenate([np.array(encoding.ids, dtype=np.int64), end])
                counts += np.bincount(tokens, minlength=vocab_size)
                writer.add(tokens)
            size = sum(len(document.encode()) for document in batch)
            num_bytes, num_documents = num_bytes + size, num_documents + len(batch)
            bar.update(size)
        if not num_documents:
            raise ValueError("data.text: the files hold no text")
    num_tokens = int(counts.sum())
    entropy = _entropy(counts)
    return {
        "tokens": num_tokens,
        "documents": num_documents,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / num_tokens,
        "vocab_size": vocab_size,
        "largest_token": int(np.flatnonzero(counts)[-1]),
        "unigram_entropy_nats": entropy,
        "unigram_entropy_bits": entropy / math.log(2),
    }


def _progress_bar(num_bytes: int) -> "tqdm[Any]":
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(
        total=num_bytes, unit="B", unit_scale=True, desc="encoding", leave=False, disable=None
    )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _entropy(counts: NDArray[np.int64]) -> float:
    """The loss, in nats a token, of guessing each token by its frequency alone."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _summary(stats: dict[str, Any]) -> str:
    return (
        f"  {stats['tokens']:,} tokens of a vocabulary of {stats['vocab_size']:,}, "
        f"{stats['documents']:,} documents, {stats['bytes_per_token']:.2f} bytes a token\n"
        f"  unigram entropy {stats['unigram_entropy_nats']:.3f} nats "
        f"({stats['unigram_entropy_bits']:.3f} bits) a token: the loss of knowing frequencies only"
    )
