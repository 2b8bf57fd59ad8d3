"""The storage behind a URL: S3 by its own class, which tells of each piece, others by fsspec."""

import fsspec
from fsspec.registry import known_implementations

from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.fsspec import FsspecStorage, wrong_options
from phalanx.checkpoint.storage.rate_limit import RateLimit
from phalanx.checkpoint.storage.s3 import open_s3

S3_PROTOCOLS = ("s3", "s3a")


def open_url(url: str, config: StorageConfig, *, limit: RateLimit) -> FsspecStorage:
    """The storage at a URL.

    Raises:
        ValueError: no driver is known or installed for it, or the options are not its own.
    """
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        advice = "" if package == "fsspec" else f" (pip install {package})"
        raise ValueError(
            f"{url}: the driver of {protocol}:// is not installed{advice}: {error}"
        ) from error
    except ValueError:
        known = ", ".join(sorted({"s3", "gs", "abfs", "hdfs", "sftp"} & set(known_implementations)))
        raise ValueError(
            f"{url}: {protocol}:// is no storage that fsspec knows; give a folder, or a URL as "
            f"s3://bucket/folder ({known}, ...)"
        ) from None
    if protocol in S3_PROTOCOLS:
        return open_s3(url, config, limit=limit)
    try:
        fs, root = fsspec.url_to_fs(
            url, skip_instance_cache=True, use_listings_cache=False, **config.options
        )
    except (TypeError, ValueError, KeyError) as error:
        raise wrong_options(url, config, error) from error
    return FsspecStorage(fs, root, url=url, config=config, limit=limit)
