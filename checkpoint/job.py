"""The name under which the holders of a run are found again: drawn once, kept with its checkpoints.

A run that is begun anew in an emptied folder has another name, so that it never takes the memory of
the old one for its own. Torch-free.
"""

import json
import re
import secrets

from phalanx.checkpoint.storage import Storage

NAME = "job.json"


def read_job(storage: Storage) -> str | None:
    """The run's name; None where it never saved anything.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        text = storage.read(NAME)
    except FileNotFoundError:
        return None
    try:
        job = json.loads(text)["job"]
    except (ValueError, KeyError, TypeError):
        job = None
    if not isinstance(job, str) or not re.fullmatch(r"[0-9a-f]{16}", job):
        raise ValueError(
            f"{storage.url}/{NAME}: is damaged; remove it (snapshots in memory, if there are any, "
            "are then not found again; checkpoints are)"
        )
    return job


def job_name(storage: Storage) -> str:
    """The run's name, drawn if it has none."""
    job = read_job(storage)
    if job is None:
        job = secrets.token_hex(8)
        storage.write(NAME, [json.dumps({"job": job}).encode() + b"\n"])
    return job
