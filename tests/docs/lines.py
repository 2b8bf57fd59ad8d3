"""Command lines as README and docs have them, found in the Markdown itself.

A command is a line of a code block without a language that begins with a word of PROGRAMS, or a
span of inline code that does and says more than a verb's name. A shell takes it as it stands: what
explains it is a comment.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

PROGRAMS = ("phalanx", "make", "torchrun", "tensorboard", "source", ".ci/run")
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]


@dataclass(frozen=True)
class Line:
    """One command line."""

    document: str
    number: int
    """Of the line it begins on."""
    text: str
    """Without its comment."""

    def __str__(self) -> str:
        return f"{self.document}:{self.number}: {self.text}"


def commands(document: str) -> list[Line]:
    """All of a document, in their order."""
    found, prose = [], []
    for number, language, text in _parts((ROOT / document).read_text()):
        if language is None:
            prose.append((number, text))
        elif language == "":
            found += _in_block(document, number, text)
    for number, text in prose:
        for span in re.finditer(r"`([^`]+)`", text):
            line = " ".join(span[1].split())
            if line.startswith(PROGRAMS) and len(line.split()) > (line.startswith("phalanx ")) + 1:
                found.append(Line(document, number + text[: span.start()].count("\n"), line))
    return sorted(found, key=lambda line: line.number)


def yaml_files(document: str) -> dict[str, str]:
    """The YAML files that a document shows, by the path that the text before names."""
    files, named = {}, ""
    for _, language, text in _parts((ROOT / document).read_text()):
        if language is None:
            paths = re.findall(r"`([\w/]+\.yaml)`", text)
            named = paths[-1] if paths else named
        elif language == "yaml":
            files[named] = text
    return files


def outputs(document: str) -> list[str]:
    """Blocks without a language that are no commands: what a program printed."""
    parts = _parts((ROOT / document).read_text())
    blocks = [(number, text) for number, language, text in parts if language == ""]
    return [text for number, text in blocks if not _in_block(document, number, text)]


def _in_block(document: str, begin: int, text: str) -> list[Line]:
    joined = re.sub(r"\\\n", lambda _: "\\\0", text)  # a command that goes on
    lines, number = [], begin
    for row in joined.split("\n"):
        command = re.sub(r"\s+#\s.*$", "", row.replace("\\\0", " "))
        if command.startswith(PROGRAMS):
            lines.append(Line(document, number, " ".join(command.split())))
        number += 1 + row.count("\0")
    return lines


def _parts(markdown: str) -> Iterator[tuple[int, str | None, str]]:
    """First line's number, language (None = prose) and text of prose and code blocks in turn."""
    number = 1
    for index, part in enumerate(re.split(r"^```", markdown, flags=re.MULTILINE)):
        if index % 2 == 0:
            yield number, None, part
        else:
            language, _, text = part.partition("\n")
            yield number + 1, language.strip(), text
        number += part.count("\n")


def words_of(path: Path) -> str:
    """A file's text, white space folded."""
    return " ".join(path.read_text().split())
