"""Where documents come from: `phalanx data prepare` reads these and knows nothing of their making.

Every document is valid Unicode with `\\n` line ends, and none is empty.
"""

import glob
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phalanx.train.data import shakespeare
from phalanx.train.data.config import DataConfig, TextSource

NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}


class Text:
    """Documents that can be gone through more than once, and what decides them."""

    def __init__(self, config: DataConfig) -> None:
        """Find what `config` names, downloading it where it must be.

        Raises:
            ValueError: it is not to be had; says what is.
        """
        self._source = config.source
        self._paths: list[Path] = []
        self._documents: list[str] = []
        if self._source is TextSource.shakespeare:
            self._documents = [_normal(document) for document in shakespeare.documents()]
            self.num_bytes = sum(len(document.encode()) for document in self._documents)
        else:
            self._paths = _library() if self._source is TextSource.stdlib else _files(config.text)
            self.num_bytes = sum(path.stat().st_size for path in self._paths)
        """Size of the text: exact, or that of the files that hold it."""

    def __iter__(self) -> Iterator[str]:
        """The documents, in an order that is always the same.

        Raises:
            ValueError: a file cannot be read; names file and line.
        """
        if self._source is TextSource.shakespeare:
            yield from self._documents
            return
        for path in self._paths:
            for document in _read(path):
                if document.strip():
                    yield document


def fingerprint(config: DataConfig) -> dict[str, Any]:
    """What decides the text, without reading it: the same value means the same documents.

    Raises:
        ValueError: a file that `config` names is not there.
    """
    if config.source is TextSource.shakespeare:
        return {"sha256": shakespeare.SHA256}
    if config.source is TextSource.stdlib:
        return {"python": platform.python_version()}
    stats = [(path, path.stat()) for path in _files(config.text)]
    return {"files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]}


def _library() -> list[Path]:
    """Python's own modules, without their tests, which not every Python ships."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path.relative_to(root) for path in root.rglob("*.py")]
    return [root / path for path in sorted(found) if not NOT_LIBRARY & set(path.parts)]


def _files(patterns: list[str]) -> list[Path]:
    """The files that the patterns name, in the patterns' order, each once."""
    if not patterns:
        raise ValueError(
            "data.text=[]: data.source=files needs files or globs, as 'data.text=[corpus/*.txt]'"
        )
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not paths:
            raise ValueError(f"data.text: {pattern}: no such file")
        for name in paths:
            if Path(name).suffix not in (".txt", ".jsonl") or not Path(name).is_file():
                raise ValueError(f"data.text: {name}: must be a .txt or .jsonl file")
            found[Path(name)] = None
    return list(found)


def _read(path: Path) -> Iterator[str]:
    if path.suffix == ".py":
        with tokenize.open(path) as stream:  # heeds the file's coding line
            yield _normal(stream.read())
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield from _read_txt(path)


def _read_txt(path: Path) -> Iterator[str]:
    """Documents apart by two blank lines or more."""
    lines: list[str] = []
    blank = 0
    for line in _lines(path):
        if not line.strip():
            blank += 1
            continue
        if blank >= 2 and lines:
            yield "".join(lines)
            lines = []
        elif blank and lines:
            lines.append("\n")
        lines.append(line)
        blank = 0
    if lines:
        yield "".join(lines)


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: must be an object with a string `text`")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}:{number}: half of a surrogate pair: {error}") from error
        yield _normal(text)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield _normal(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: {error}") from error


def _normal(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
