"""Settings of storage."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class StorageConfig:
    """How the storage behind checkpoint.dir is used."""

    options: dict[str, Any] = field(default_factory=dict)
    """What fsspec's file system of a URL takes, as {endpoint_url: https://...} for s3://."""
    retries: int = 5
    """Times that a failed request is tried again, after 0.5 s, 1 s, 2 s, ... up to 30 s."""
    limit_mb_s: float = 0.0
    """Most megabytes a second that a node writes; 0 = no limit."""
    piece_mb: int = 16
    """Megabytes of one request; what is tried again, or written anew after a break, is one."""

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"checkpoint.storage.retries={self.retries}: must be 0 or more")
        if not 0 <= self.limit_mb_s < float("inf"):
            raise ValueError(
                f"checkpoint.storage.limit_mb_s={self.limit_mb_s}: must be finite, 0 or more"
            )
        if not 5 <= self.piece_mb <= 1024:
            raise ValueError(
                f"checkpoint.storage.piece_mb={self.piece_mb}: must be between 5 (what S3 takes) "
                "and 1024"
            )
