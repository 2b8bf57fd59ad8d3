"""The byte-level BPE tokenizer: trained on the text itself, or read from a `tokenizer.json`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from phalanx.train.data.config import DataConfig, prepare_command, tokenizer_path

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
FOREIGN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
"""What other tokenizers call the end of a document (GPT and Qwen, Llama 3, Llama 2, Gemma,
DeepSeek)."""
TRAINING_CHARACTERS = 64_000_000
"""A tokenizer is trained on the text's beginning up to this length."""


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; equal text gives an equal tokenizer.

    Any text can be encoded, and decodes to itself. The vocabulary is smaller than `vocab_size`
    where the text has not enough pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_beginning(documents), trainer=trainer)
    return tokenizer


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for document in documents:
        if left <= 0:
            return
        yield document[:left]
        left -= len(document)


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `config` names, or the one that `phalanx data prepare` trained.

    Raises:
        ValueError: there is none, or the file is no tokenizer.
    """
    path = Path(tokenizer_path(config))
    if not path.is_file():
        if config.tokenizer is None:
            raise ValueError(f"{path}: no such file; run: {prepare_command(config)}")
        raise ValueError(f"data.tokenizer={path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: no Hugging Face tokenizer.json: {error}") from error


def eos_id(tokenizer: Tokenizer, *, name: str) -> int:
    """The token that ends a document.

    Raises:
        ValueError: the tokenizer has none of the known ones.
    """
    known = (EOS, *FOREIGN_EOS)
    for token in known:
        number: int | None = tokenizer.token_to_id(token)
        if number is not None:
            return number
    raise ValueError(f"{name}: has no end-of-document token; known are {' '.join(known)}")
