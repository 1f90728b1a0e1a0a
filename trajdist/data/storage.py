"""Byte-level access to local files and to URLs supported by fsspec (``s3://``, ``gs://``, ``https://``, ``memory://``).

Transient errors are retried with exponential backoff; permanent ones are reported to the user in one sentence.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from trajdist.config import Data
from trajdist.errors import DataError, UserError, one_line
from trajdist.files import open_regular

T = TypeVar("T")
PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENETUNREACH}
# Missing, forbidden or malformed URLs are permanent errors; any other network error may be transient.
LASTING_ERRORS = (FileNotFoundError, PermissionError, ImportError, NotImplementedError, ValueError, TypeError)
LASTING_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
PIECE = 2**23  # bytes per download request
OPEN_FILES = 16
# Requests at a time: network file systems and object stores take long to answer each.
THREADS = 16
LONGEST_PAUSE_S = 30.0
LOCAL_TAG = "mtime:"
MOST_SHARDS = 1_000_000
# Of an encoded image: Pillow refuses those of more than 90 million pixels, which take 8 bytes each at most.
LARGEST_IMAGE = 2**30


@dataclass(frozen=True)
class Access:
    """How to read images; see ``data.read_retries``, ``data.cache_dir`` and ``data.cache_gib``."""

    retries: int = 0
    cache_dir: str | None = None
    cache_gib: float = 100.0
    window: int = 16
    """Shards that are read at the same time; 0 for all."""

    @classmethod
    def of(cls, data: Data) -> Access:
        """As the config says."""
        return cls(data.read_retries, data.cache_dir, data.cache_gib, data.shuffle_window)


class Version(NamedTuple):
    """Identifies the contents of a file, to detect changes under the same name."""

    size: int
    tag: str
    """The modification time, or the store's equivalent (ETag)."""


def is_url(name: str) -> bool:
    return "://" in name


def has_pattern(name: str) -> bool:
    return "{" in name or glob.has_magic(name)


def expand(pattern: str) -> list[str]:
    """Expand braces (``{000..127}``, ``{a,b}``), then globs; returns the names sorted and without duplicates.

    The name of an existing local file is not a pattern. Names without wildcards need not exist.
    URLs are globbed only if they contain ``*``.

    Raises:
        ValueError: braces that stand for more than :data:`MOST_SHARDS` names.
        Exception: whatever the store raises when a URL is listed.

    >>> expand("s3://bucket/set-{08..10}.tar")
    ['s3://bucket/set-08.tar', 's3://bucket/set-09.tar', 's3://bucket/set-10.tar']
    """
    if not is_url(pattern) and os.path.exists(pattern):
        return [pattern]
    found: set[str] = set()
    names = list(islice(_braces(pattern), MOST_SHARDS + 1))
    if len(names) > MOST_SHARDS:
        raise ValueError(f"it stands for more than {MOST_SHARDS:,} shards")
    for name in names:
        if is_url(name):
            found.update(_remote_glob(name) if "*" in name else [name])
        else:
            found.update(_local_glob(name))
    return sorted(found)


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        numbers = range(int(span[1]), int(span[2]) + 1)
        choices: Iterable[str] = (str(number).zfill(len(span[1])) for number in numbers)
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(before + choice + after)


def _local_glob(name: str) -> list[str]:
    """What a name or a pattern stands for. Brackets in the name of an existing file or folder are not a pattern."""
    if not glob.has_magic(name) or os.path.exists(name):
        return [name]
    folder, pattern = os.path.split(name)
    while folder and not os.path.isdir(folder):
        folder, part = os.path.split(folder)
        pattern = os.path.join(part, pattern)
    return glob.glob(os.path.join(glob.escape(folder), pattern), recursive=True)


def _remote_glob(url: str) -> list[str]:
    system = _filesystem(url)
    return [str(system.unstrip_protocol(path)) for path in system.glob(url)]


def version(name: str) -> Version:
    """The current size in bytes and tag of a file.

    Raises:
        Exception: it is missing or cannot be reached.
    """
    if not is_url(name):
        found = os.stat(name)
        return Version(found.st_size, f"{LOCAL_TAG}{found.st_mtime_ns}")
    info = _filesystem(name).info(name)
    tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"))
    return Version(int(info.get("size") or 0), str(next((tag for tag in tags if tag), "")).strip('"'))


def read(name: str, start: int, length: int) -> bytes:
    """``length`` bytes of a file from offset ``start``; fewer at the end of the file.

    Raises:
        Exception: whatever the file system raises.
    """
    if not is_url(name):
        # Keep a reference during the read: another thread may evict the file from the LRU cache, which closes it.
        file = _opened(name)
        return os.pread(file.descriptor, length, start)
    content: bytes = _filesystem(name).cat_file(name, start=start, end=start + length)
    return content


def read_whole(url: str, limit: int) -> bytes:
    """The contents of a remote file of at most ``limit`` bytes: a server may answer with any other file.

    Raises:
        ValueError: it is larger.
        Exception: whatever the store raises.
    """
    content = bytearray()
    with open_file(url) as file:
        while piece := file.read(PIECE):  # A read may return less than was asked for.
            content += piece
            if len(content) > limit:
                raise ValueError(f"{url!r} has more than {limit:,} bytes")
    return bytes(content)


def read_exactly(name: str, start: int, length: int, retries: int) -> bytes:
    """Like :func:`read`, but returns all ``length`` bytes; a short read is retried like a transient error.

    Raises:
        OSError: the file is shorter than that.
        Exception: whatever the file system raised last.
    """

    def once() -> bytes:
        content = read(name, start, length)
        if len(content) > length:
            raise OSError(errno.ENOTSUP, "its server sends whole files where parts are asked for")
        if len(content) != length:
            number = errno.EIO if is_url(name) else 0
            raise OSError(number, f"it ends at byte {start + len(content):,}, {length - len(content):,} too soon")
        return content

    return retrying(once, retries)


def open_file(name: str) -> IO[bytes]:
    """Open a file for sequential reading in constant memory.

    Raises:
        Exception: whatever the file system raises.
    """
    if not is_url(name):
        return open(name, "rb", opener=open_regular)
    file: IO[bytes] = _filesystem(name).open(name, "rb", block_size=PIECE, cache_type="readahead")
    return file


def retrying(work: Callable[[], T], retries: int) -> T:
    """Call ``work``, retrying up to ``retries`` times after transient errors, 0.1 s, 0.4 s, 1.6 s, ... apart.

    No pause is longer than :data:`LONGEST_PAUSE_S`.

    Raises:
        Exception: whatever ``work`` raised last.
    """
    for attempt in range(retries + 1):
        try:
            return work()
        except Exception as error:
            if attempt == retries or not _may_pass(error):
                raise
            time.sleep(min(0.1 * 4**attempt, LONGEST_PAUSE_S))
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (*LASTING_ERRORS, UserError)) or type(error).__name__ in LASTING_NAMES:
        return False
    # Network libraries raise OSErrors without an errno, or exceptions of their own.
    return not isinstance(error, OSError) or not error.errno or error.errno in PASSING_ERRORS


def refusal(key: str, name: str, error: Exception) -> DataError:
    """The user-facing error for a file that cannot be read; ``key`` is the config key or argument that named it."""
    shown, reason = f"{key}: {name!r}", one_line(error) or type(error).__name__
    # fsspec reports any HTTP error status as FileNotFoundError; the cause has the actual status.
    status = getattr(error.__cause__, "status", None)
    if isinstance(error, FileNotFoundError) and status in (None, 404, 410):
        return DataError(f"{shown} does not exist: check the name, and that all shards were copied.")
    if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ in LASTING_NAMES:
        return DataError(f"{shown} may not be read ({reason}): check its permissions and your credentials.")
    if isinstance(error, ImportError):
        extra = EXTRAS.get(name.partition("://")[0])
        fix = f"pip install 'trajdist[{extra}]'" if extra else "install it"
        return DataError(f"{shown} needs another package ({reason}): {fix}.")
    return DataError(f"{shown} cannot be read ({reason}): fix it, or try again later.")


def read_bytes(path: Path, retries: int) -> bytes:
    """The contents of a local image file, with retries after transient errors.

    Raises:
        OSError: it cannot be read, is not a regular file, or is too large for an image.
    """

    def once() -> bytes:
        with open(path, "rb", opener=open_regular) as file:
            check_size(os.fstat(file.fileno()).st_size)
            return file.read()

    return retrying(once, retries)


def check_size(size: int) -> None:
    """Refuse a file of so many bytes as an image, before it fills the memory.

    Raises:
        OSError: it is too large.
    """
    if size > LARGEST_IMAGE:
        raise OSError(errno.EFBIG, f"{size:,} bytes are too many for an image")


class _File:
    """A file descriptor closed with its last reference, so that any thread may evict it while another one reads."""

    def __init__(self, path: str) -> None:
        self.descriptor = open_regular(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(path: str) -> _File:
    return _File(path)


def _filesystem(url: str) -> Any:
    """fsspec caches one instance per process and thread, so none is carried through a fork."""
    import fsspec

    return fsspec.core.url_to_fs(url)[0]
