"""`phalanx data`: text into token files, and a look at them."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module

from phalanx.launch.bad_input import BadInput, user_input
from phalanx.launch.config.app import Job, run


def data(argv: Sequence[str]) -> None:
    """Prepare token files, or show what is in them."""
    action = argv[0] if argv else ""
    if action not in ("prepare", "show"):
        raise BadInput(f"data {action}: unknown; choose prepare or show")
    run("data", argv[1:], partial(_data, action=action), starts_ranks=False)


def _data(job: Job, *, action: str) -> None:
    module = import_module("phalanx.train.data.prepare")
    with user_input():
        if action == "prepare":
            module.prepare(job.config.data)
        else:
            print(module.show(job.config.data))
