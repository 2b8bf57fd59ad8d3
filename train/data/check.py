"""What can be wrong with the data, found before any rank starts; free of torch, so found fast."""

import json
from pathlib import Path

from phalanx.train.data.config import DataConfig, corpora, prepare_command, tokenizer_path
from phalanx.train.data.indexed import TokenFile, pair
from phalanx.train.data.packing import SPLITS, PackedCorpus
from phalanx.train.data.prepare import STAMP, STATS
from phalanx.train.data.tokenizer import load_tokenizer

TOKENS_LOOKED_AT = 4_000_000


def check_data(config: DataConfig, *, vocab_size: int, seq_len: int) -> None:
    """Check that corpora and tokenizer stand, are whole, large enough, and fit the vocabulary.

    Corpora of a foreign make are looked into up to their first four million tokens; the rest is
    looked at as it is read (BatchSource). A tokenizer is
    asked for only where `phalanx data prepare` would train one or data.tokenizer names one:
    training on ready-made corpora needs none.

    Raises:
        ValueError: with the key, its value, and what would be right.
    """
    _check_prepared(config)
    for number, corpus in enumerate(corpora(config)):
        file = TokenFile(corpus.path)
        for split in SPLITS if config.eval_fraction > 0 else SPLITS[:1]:
            PackedCorpus(
                file,
                seq_len=seq_len,
                eval_fraction=config.eval_fraction,
                split=split,
                seed=0,
                corpus=number,
            )
        _check_tokens(config, file, vocab_size)
    if not config.corpora or config.tokenizer is not None:
        size = load_tokenizer(config).get_vocab_size(with_added_tokens=True)
        if size > vocab_size:
            raise ValueError(
                f"model.vocab_size={vocab_size}: smaller than the {size} tokens of "
                f"{tokenizer_path(config)}; use at least {size}"
            )


def check_prompt(config: DataConfig, *, prompt: str, num_tokens: int) -> None:
    """Check that the text samples of a run, monitor.sample, have a tokenizer and a beginning.

    Raises:
        ValueError: with the key, its value, and what would be right.
    """
    if config.corpora and config.tokenizer is None:
        raise ValueError(
            f"monitor.sample.tokens={num_tokens}: to write text, the tokenizer of data.corpora "
            "must be named; set data.tokenizer=path/to/tokenizer.json, or monitor.sample.tokens=0"
        )
    if not load_tokenizer(config).encode(prompt).ids:
        raise ValueError(
            f"monitor.sample.prompt={prompt!r}: no tokens of {tokenizer_path(config)}; use at "
            "least one character that it knows"
        )


def _check_prepared(config: DataConfig) -> None:
    """Prepared data has its stamp; named corpora have their files."""
    if not config.corpora:
        if not (Path(config.dir) / STAMP).is_file():
            raise ValueError(
                f"data.dir={config.dir}: holds no prepared data; run: {prepare_command(config)}"
            )
        return
    for corpus in config.corpora:
        for path in pair(corpus.path):
            if not path.is_file():
                raise ValueError(
                    f"data.corpora: {path}: no such file; a corpus's path is given without "
                    ".bin and .idx"
                )


def _check_tokens(config: DataConfig, file: TokenFile, vocab_size: int) -> None:
    stats = Path(config.dir) / STATS
    if not config.corpora and stats.is_file():
        low, high = 0, int(json.loads(stats.read_text())["largest_token"])
    else:
        beginning = file.tokens[:TOKENS_LOOKED_AT]
        low, high = int(beginning.min()), int(beginning.max())
    if low < 0:
        raise ValueError(f"{file.prefix}: holds token {low}; tokens must not be negative")
    if high >= vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size}: {file.prefix} holds token {high}; "
            f"use at least {high + 1}"
        )
