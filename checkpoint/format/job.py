"""The name under which the holders of a run are found again: drawn once, kept with its checkpoints.

A run that is begun anew in an emptied folder has another name, so that it never takes the memory of
the old one for its own; and so has one in a copy of a run's folder, whose original may be going on.
Torch-free.
"""

import json
import re
import secrets

from phalanx.checkpoint.storage.base import Storage

NAME = "job.json"


def read_job(storage: Storage) -> str | None:
    """The run's name; None where it never saved anything, or nothing in this place.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        text = storage.read(NAME)
    except FileNotFoundError:
        return None
    try:
        body = json.loads(text)
        job, place = body["job"], body.get("place", directory_of(storage))
    except (ValueError, KeyError, TypeError, AttributeError):
        job = place = None
    if not isinstance(job, str) or not re.fullmatch(r"[0-9a-f]{16}", job):
        raise ValueError(
            f"{storage.url}/{NAME}: is damaged; remove it (snapshots in memory, if there are any, "
            "are then not found again; checkpoints are)"
        )
    return job if place == directory_of(storage) else None


def job_name(storage: Storage) -> str:
    """The run's name, drawn if it has none."""
    job = read_job(storage)
    if job is None:
        job = secrets.token_hex(8)
        body = {"job": job, "place": directory_of(storage)}
        storage.write(NAME, [json.dumps(body).encode() + b"\n"])
    return job


def directory_of(storage: Storage) -> str:
    """The one name of where a run saves: an absolute path without links, or the URL.

    A job's name counts where it was drawn, not in a folder that was copied or moved. Who logs in
    with the URL, and by which password, is not part of it: others may see it.
    """
    if storage.local is not None:
        return str(storage.local.resolve())
    return re.sub(r"://[^/]*@", "://", storage.url)
