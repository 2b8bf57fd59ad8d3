"""The storage behind a path or URL. The driver of a URL is imported when one is opened."""

from functools import cache
from pathlib import Path

from phalanx.checkpoint.storage.base import Storage
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.rate_limit import RateLimit


def open_storage(url: str | Path, config: StorageConfig | None = None) -> Storage:
    """The storage at a path, or at a URL that fsspec knows.

    Raises:
        ValueError: the URL is none, its driver is not installed, or its options are wrong.
    """
    from phalanx.checkpoint.storage.local import LocalStorage

    config = config or StorageConfig()
    limit = _shared_limit(config.limit_mb_s)
    text = str(url)
    if isinstance(url, str) and "://" in text and not text.startswith("file://"):
        from phalanx.checkpoint.storage.url import open_url

        return open_url(text, config, limit=limit)
    return LocalStorage(Path(text.removeprefix("file://")), limit=limit)


@cache
def _shared_limit(mb_s: float) -> RateLimit:
    """One limit for all that this process writes."""
    return RateLimit(mb_s * 1e6)
