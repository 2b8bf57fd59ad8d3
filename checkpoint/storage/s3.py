"""S3 and what speaks like it: uploads in pieces that are sent once, and go on after a break.

A file appears when its upload is completed, so nothing is renamed. Pieces that arrived stay with
the server: when a broken-off write is done again, those that hold the same bytes (by the MD5 that
the server gives as ETag) are not sent again. Deleting a folder also ends the uploads below it.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import md5
from itertools import chain
from typing import Any

import fsspec

from phalanx.checkpoint.storage.base import Bytes
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.fsspec import PARALLEL, FsspecStorage, wrong_options
from phalanx.checkpoint.storage.rate_limit import RateLimit

MAX_PIECES = 10_000
"""Of one upload; S3's limit."""
DELETED_AT_ONCE = 1000
"""Keys of one request; S3's limit."""


class S3Storage(FsspecStorage):
    """The objects below a prefix of a bucket."""

    def names(self, folder: str = "") -> list[str]:
        """See Storage; as elsewhere, a folder is there from its first file's first bytes on.

        Raises:
            FileNotFoundError: there is no such bucket, which is not the same as an empty one.
        """
        found = super().names(folder)
        if not found and not folder:
            self._check_bucket()
        return sorted({*found, *self._folders_in_the_making(folder)})

    def write(
        self, path: str, pieces: Iterable[Bytes], *, on_bytes: Callable[[int], None] | None = None
    ) -> int:
        """See Storage; up to four pieces are on their way at a time."""
        told = on_bytes or (lambda _count: None)
        blocks = self._blocks(pieces)
        first = next(blocks, bytearray())
        second = next(blocks, None)
        if second is not None:
            return self._multipart(path, chain((first, second), blocks), told)
        bucket, key = self._key(path)
        self._limit.take(len(first))
        self._call(path, "put_object", Bucket=bucket, Key=key, Body=first)
        told(len(first))
        return len(first)

    def delete(self, path: str) -> None:
        """See Storage.

        Raises:
            OSError: something below it could not be deleted.
        """
        bucket, key = self._key(path)
        for upload in self._uploads(path):
            if upload["Key"] == key or upload["Key"].startswith(f"{key}/"):
                self._abort(path, upload)
        found = self._try(path, lambda: self._fs.find(self._path(path)))
        keys = [item.removeprefix(f"{bucket}/") for item in found]
        for at in range(0, len(keys), DELETED_AT_ONCE):
            objects = [{"Key": item} for item in keys[at : at + DELETED_AT_ONCE]]
            answer = self._call(
                path, "delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True}
            )
            for error in answer.get("Errors", ()):
                raise OSError(
                    errno.EACCES,
                    f"cannot be deleted: {error.get('Code')} {error.get('Message', '')}",
                    f"s3://{bucket}/{error.get('Key')}",
                )

    def _multipart(
        self, path: str, blocks: Iterable[bytearray], told: Callable[[int], None]
    ) -> int:
        bucket, key = self._key(path)
        upload_id, stored = self._open_upload(path)
        sent: deque[tuple[int, Future[str]]] = deque()
        parts: list[dict[str, Any]] = []
        size = 0

        def settle() -> None:
            nonlocal size
            count, future = sent.popleft()
            parts.append({"PartNumber": len(parts) + 1, "ETag": future.result()})
            size += count
            told(count)

        pool = ThreadPoolExecutor(PARALLEL)
        try:
            for number, block in enumerate(blocks, 1):
                if number > MAX_PIECES:
                    raise OSError(
                        errno.EFBIG,
                        f"longer than {MAX_PIECES} pieces of {self._piece_bytes >> 20} MB; "
                        "use a larger checkpoint.storage.piece_mb",
                        self._where(path),
                    )
                if len(sent) == PARALLEL:
                    settle()
                there = stored.get(number)
                work = pool.submit(self._send, path, upload_id, number, block, there)
                sent.append((len(block), work))
            while sent:
                settle()
        finally:
            pool.shutdown(cancel_futures=True)
        self._complete(path, {"Bucket": bucket, "Key": key, "UploadId": upload_id}, parts, size)
        return size

    def _send(
        self, path: str, upload_id: str, number: int, block: bytearray, there: str | None
    ) -> str:
        """Upload one piece, unless it is there with this ETag; its ETag."""
        if there is not None and there.strip('"') == md5(block, usedforsecurity=False).hexdigest():
            return there
        bucket, key = self._key(path)
        self._limit.take(len(block))
        answer = self._call(
            path,
            "upload_part",
            Bucket=bucket,
            Key=key,
            UploadId=upload_id,
            PartNumber=number,
            Body=block,
        )
        return str(answer["ETag"])

    def _complete(
        self, path: str, upload: dict[str, str], parts: list[dict[str, Any]], size: int
    ) -> None:
        try:
            self._call(
                path, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}
            )
        except FileNotFoundError:  # where an answer was lost, the first try completed it
            if not self.exists(path) or self.size(path) != size:
                raise

    def _open_upload(self, path: str) -> tuple[str, dict[int, str]]:
        """An upload to this path, and the ETags of the pieces that it has already."""
        bucket, key = self._key(path)
        uploads = [upload for upload in self._uploads(path) if upload["Key"] == key]
        if not uploads:
            answer = self._call(path, "create_multipart_upload", Bucket=bucket, Key=key)
            return str(answer["UploadId"]), {}
        *old, newest = sorted(uploads, key=lambda upload: str(upload.get("Initiated")))
        for upload in old:
            self._abort(path, upload)
        stored: dict[int, str] = {}
        marker = 0
        while True:
            answer = self._call(
                path,
                "list_parts",
                Bucket=bucket,
                Key=key,
                UploadId=newest["UploadId"],
                PartNumberMarker=marker,
            )
            stored |= {part["PartNumber"]: part["ETag"] for part in answer.get("Parts", ())}
            if not answer.get("IsTruncated"):
                return str(newest["UploadId"]), stored
            marker = int(answer["NextPartNumberMarker"])

    def _check_bucket(self) -> None:
        bucket, _ = self._key("")
        try:
            self._call("", "head_bucket", Bucket=bucket)
        except FileNotFoundError:
            reason = f"there is no bucket {bucket}"
            raise FileNotFoundError(errno.ENOENT, reason, self.url) from None

    def _folders_in_the_making(self, folder: str) -> set[str]:
        """Folders below `folder` that hold uploads, and perhaps nothing else."""
        _, key = self._key(folder)
        inside = f"{key}/" if key else ""
        keys = [upload["Key"] for upload in self._uploads(folder)]
        below = [found.removeprefix(inside) for found in keys if found.startswith(inside)]
        return {path.partition("/")[0] for path in below if "/" in path}

    def _uploads(self, path: str) -> list[dict[str, Any]]:
        """Uploads below a path that were never completed; none where the server does not tell."""
        bucket, key = self._key(path)
        try:
            answer = self._call(path, "list_multipart_uploads", Bucket=bucket, Prefix=key)
        except OSError as error:  # a request of its own right, which a save can do without
            if error.errno in (errno.EACCES, errno.ENOSYS):
                return []
            raise
        return list(answer.get("Uploads", ()))

    def _abort(self, path: str, upload: dict[str, Any]) -> None:
        bucket, _ = self._key(path)
        try:
            self._call(
                path,
                "abort_multipart_upload",
                Bucket=bucket,
                Key=upload["Key"],
                UploadId=upload["UploadId"],
            )
        except FileNotFoundError:  # it has ended meanwhile
            return

    def _key(self, path: str) -> tuple[str, str]:
        bucket, _, key = self._path(path).partition("/")
        return bucket, key

    def _call(self, path: str, method: str, **arguments: Any) -> dict[str, Any]:
        fs: Any = self._fs
        answer: dict[str, Any] = self._try(path, lambda: fs.call_s3(method, **arguments))
        return answer


def open_s3(url: str, config: StorageConfig, *, limit: RateLimit) -> S3Storage:
    """The storage at an s3:// URL.

    Raises:
        ValueError: the URL names no bucket, or the options are not s3fs's.
    """
    options = dict(config.options)
    requests = dict(options.pop("config_kwargs", {}))
    requests.setdefault("retries", {"max_attempts": 0})  # tries are counted in one place: retry
    try:
        fs, root = fsspec.url_to_fs(
            url,
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs=requests,
            **options,
        )
        fs.retries = 1
        fs.connect()
    except (TypeError, ValueError, KeyError) as error:
        raise wrong_options(url, config, error) from error
    if not root.strip("/"):
        raise ValueError(f"{url}: names no bucket; give s3://bucket/folder")
    return S3Storage(fs, root, url=url, config=config, limit=limit)
