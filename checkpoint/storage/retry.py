"""Requests that are tried again while trying again may help."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0

HOPELESS_TYPES = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
HOPELESS_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}
"""Classes of drivers that are not imported here: nothing was sent."""
HOPELESS_ERRNOS = {errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM, errno.ENOSYS}
BROKEN_ON_THE_WAY = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
"""S3's codes for a request that arrived damaged; drivers call them invalid."""


def retry(action: Callable[[], T], *, where: str, retries: int) -> T:
    """What `action` returns, tried again after 0.5 s, 1 s, 2 s, ... up to 30 s.

    Args:
        where: what it is about, as a URL, for the message.

    Raises:
        OSError: `where`, the reason, and how often it was tried; of the class that it was
            (FileNotFoundError, PermissionError) where trying again cannot help.
    """
    start = time.monotonic()
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:
            if is_hopeless(error):
                raise _named(error, where) from error
            if attempt == retries:
                tried = f"tried {attempt + 1} times in {time.monotonic() - start:.1f} s"
                raise OSError(errno.EIO, f"{_reason(error)} ({tried})", where) from error
        time.sleep(min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S))
    raise AssertionError("the last attempt returns or raises")


def is_hopeless(error: Exception) -> bool:
    """Whether the same request would fail again."""
    response = getattr(error.__cause__, "response", None)  # of botocore's errors
    if isinstance(response, dict) and response.get("Error", {}).get("Code") in BROKEN_ON_THE_WAY:
        return False
    return (
        isinstance(error, HOPELESS_TYPES)
        or type(error).__name__ in HOPELESS_NAMES
        or (isinstance(error, OSError) and error.errno in HOPELESS_ERRNOS)
    )


def _named(error: Exception, where: str) -> Exception:
    """The same error with `where` in its text."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "No such file", where)
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, _reason(error), where)
    if isinstance(error, OSError):
        return OSError(error.errno or errno.EIO, _reason(error), where)
    return OSError(errno.EINVAL, _reason(error), where)


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
