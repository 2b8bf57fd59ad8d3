"""What the command line tells a user who wrote something that cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class BadInput(ValueError):
    """Something that the user wrote, told in one line; not a defect of the program."""


@contextmanager
def user_input() -> Iterator[None]:
    """Inside, a ValueError is about what the user wrote."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


def refuse_option(message: str) -> NoReturn:
    """What an argument parser calls on an option that it does not know."""
    raise BadInput(f"{message}; `phalanx --help` lists the options")
