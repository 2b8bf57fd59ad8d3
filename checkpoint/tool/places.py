"""Where a user's word points: a run's folder, a folder of checkpoints, one checkpoint; or URLs."""

from dataclasses import dataclass

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.folders import PATTERN, complete_folders, step_folders
from phalanx.checkpoint.format.job import NAME as JOB
from phalanx.checkpoint.format.manifest import NAME as MANIFEST
from phalanx.checkpoint.format.manifest import Manifest, read_manifest
from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage

INSIDE_RUN = "checkpoints"
"""Where a run's folder has its checkpoints."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPlace:
    """A folder of checkpoints, or one in it."""

    storage: Storage
    """Of the folder of checkpoints."""
    folder: str | None
    """The one that was named."""
    text: str
    """What the user wrote."""

    def url(self, folder: str) -> str:
        """A checkpoint's name for people."""
        return f"{self.storage.url.rstrip('/')}/{folder}"

    def manifest(self, folder: str) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            BrokenCheckpointError: it is missing, damaged or another step's; names the checkpoint.
        """
        try:
            found = read_manifest(self.storage, folder)
            if step_of(folder) not in (-1, found.step):
                raise BrokenCheckpointError(f"{MANIFEST} is of step {found.step}")
        except BrokenCheckpointError as error:
            raise BrokenCheckpointError(f"{self.url(folder)}: {error}") from None
        return found

    def one(self, step: int | None = None) -> str:
        """The checkpoint that is meant: the one named, that of `step`, or the newest complete.

        Raises:
            ValueError: there is none.
        """
        if self.folder is not None:
            if step is not None and step_of(self.folder) != step:
                raise ValueError(f"--step {step}: {self.text} is the folder of another step")
            return self.folder
        complete = complete_folders(self.storage)
        if not complete:
            raise ValueError(
                f"{self.text}: no complete checkpoint there; `phalanx checkpoint ls {self.text}` "
                "says what is"
            )
        if step is None:
            return complete[max(complete)]
        if step not in complete:
            have = ", ".join(map(str, sorted(complete)))
            raise ValueError(f"--step {step}: {self.text} has no complete one; complete are {have}")
        return complete[step]

    def folders(self) -> list[str]:
        """Every checkpoint's folder that is meant, whole or not, oldest step first."""
        if self.folder is not None:
            return [self.folder]
        return [name for _, name in step_folders(self.storage)]


def find(text: str, config: StorageConfig | None = None) -> CheckpointPlace:
    """Look where `text` points.

    Raises:
        ValueError: nothing of the kind is there, or its storage is unknown.
        OSError: the storage cannot be reached.
    """
    text = text.rstrip("/") or text
    parent, name = split(text)
    if PATTERN.fullmatch(name):
        storage = open_storage(parent, config)
        if not _names(storage, name, text):
            raise ValueError(f"{text}: no such folder, or an empty one")
        return CheckpointPlace(storage=storage, folder=name, text=text)
    storage = open_storage(text, config)
    names = _names(storage, "", text)
    if MANIFEST in names:
        return CheckpointPlace(storage=open_storage(parent, config), folder=name, text=text)
    if INSIDE_RUN in names and not _holds_checkpoints(names):
        storage = open_storage(f"{text}/{INSIDE_RUN}", config)
        names = storage.names()
    if not _holds_checkpoints(names):
        what = "no checkpoints there" if names else "no such folder, or an empty one"
        raise ValueError(
            f"{text}: {what}; give a run's folder, a folder of step_... folders, one of these, or "
            "a URL of such, as s3://bucket/run/checkpoints"
        )
    return CheckpointPlace(storage=storage, folder=None, text=text)


def _names(storage: Storage, folder: str, text: str) -> list[str]:
    try:
        return storage.names(folder)
    except NotADirectoryError:
        raise ValueError(f"{text}: is a file, not a folder") from None


def _holds_checkpoints(names: list[str]) -> bool:
    """Whether these are the names in a folder of checkpoints; before the first, a run is named."""
    return JOB in names or any(map(PATTERN.fullmatch, names))


def target(text: str, config: StorageConfig | None = None) -> tuple[Storage, str | None]:
    """Where something new is to stand: a folder of checkpoints, and a name in it if one is given.

    Raises:
        ValueError: the storage is unknown, or nothing of the kind can be put there.
        OSError: the storage cannot be reached.
    """
    text = text.rstrip("/") or text
    parent, name = split(text)
    given = name if PATTERN.fullmatch(name) else None
    storage = open_storage(text if given is None else parent, config)
    names = _names(storage, given or "", text)
    if given is None and INSIDE_RUN in names:
        raise ValueError(f"{text}: is a run's folder; give {text}/{INSIDE_RUN}")
    return storage, given


def split(text: str) -> tuple[str, str]:
    """A folder's parent and name; of a path or URL."""
    parent, slash, name = text.rpartition("/")
    if not slash:
        return ".", name
    return parent or "/", name


def step_of(folder: str) -> int:
    """The step that a folder's name tells; -1 where it tells none."""
    match = PATTERN.fullmatch(folder)
    return int(match[1]) if match else -1
