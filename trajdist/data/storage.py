"""Bytes by name: files of this machine, and URLs that fsspec opens (``s3://``, ``gs://``, ``https://``, ``memory://``).

What fails in passing is tried again with growing pauses; what cannot get better is one sentence.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from trajdist.errors import DataError, UserError, one_line

T = TypeVar("T")
PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENETUNREACH}
# A URL that is not there, may not be read or cannot be understood stays so; anything else a network does may pass.
LASTING_ERRORS = (FileNotFoundError, PermissionError, ImportError, NotImplementedError, ValueError, TypeError)
LASTING_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
PIECE = 2**23  # bytes of a download at a time
OPEN_FILES = 16
LOCAL_TAG = "mtime:"


@dataclass(frozen=True)
class Access:
    """How images are reached; see ``data.read_retries``, ``data.cache_dir`` and ``data.cache_gib``."""

    retries: int = 0
    cache_dir: str | None = None
    cache_gib: float = 100.0
    window: int = 16
    """Shards that are read at the same time."""


class Version(NamedTuple):
    """Tells two contents of one name apart."""

    size: int
    tag: str
    """The time of the last change, or what the store says instead (ETag)."""


def is_url(name: str) -> bool:
    return "://" in name


def has_pattern(name: str) -> bool:
    return "{" in name or glob.has_magic(name)


def expand(pattern: str) -> list[str]:
    """Names that a pattern stands for, sorted, each once: braces (``{000..127}``, ``{a,b}``), then ``*``.

    Names without ``*`` need not exist.

    Raises:
        Exception: whatever the store of a URL raises when it is asked for a list.

    >>> expand("s3://bucket/set-{08..10}.tar")
    ['s3://bucket/set-08.tar', 's3://bucket/set-09.tar', 's3://bucket/set-10.tar']
    """
    found: set[str] = set()
    for name in _braces(pattern):
        if is_url(name):
            found.update(_remote_glob(name) if "*" in name else [name])
        else:
            found.update(glob.glob(name, recursive=True) if glob.has_magic(name) else [name])
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
        choices = [str(number).zfill(len(span[1])) for number in numbers]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(before + choice + after)


def _remote_glob(url: str) -> list[str]:
    system = _filesystem(url)
    return [str(system.unstrip_protocol(path)) for path in system.glob(url)]


def version(name: str) -> Version:
    """Size and tag of a file as it is now.

    Raises:
        Exception: it is not there, or cannot be reached.
    """
    if not is_url(name):
        stat = os.stat(name)
        return Version(stat.st_size, f"{LOCAL_TAG}{stat.st_mtime_ns}")
    info = _filesystem(name).info(name)
    tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"))
    return Version(int(info.get("size") or 0), str(next((tag for tag in tags if tag), "")).strip('"'))


def read(name: str, start: int, length: int) -> bytes:
    """Some bytes of a file, fewer where it ends before.

    Raises:
        Exception: whatever the file system raises.
    """
    if not is_url(name):
        # Held while it is read: another thread may have it fall out of the list of open files, which closes it.
        file = _opened(name)
        return os.pread(file.descriptor, length, start)
    content: bytes = _filesystem(name).cat_file(name, start=start, end=start + length)
    return content


def read_whole(url: str) -> bytes:
    """A small remote file.

    Raises:
        Exception: whatever the store raises.
    """
    content: bytes = _filesystem(url).cat_file(url)
    return content


def read_exactly(name: str, start: int, length: int, retries: int) -> bytes:
    """As :func:`read`, tried again; a transfer that was cut short is a passing error, a local file's end is not.

    Raises:
        Exception: whatever the file system raised at last; ``OSError`` where the file ends before.
    """

    def once() -> bytes:
        content = read(name, start, length)
        if len(content) != length:
            number = errno.EIO if is_url(name) else 0
            raise OSError(number, f"it ends at byte {start + len(content):,}, {length - len(content):,} too soon")
        return content

    return retrying(once, retries)


def open_file(name: str) -> IO[bytes]:
    """For reading from front to back, in constant memory."""
    if not is_url(name):
        return open(name, "rb")
    file: IO[bytes] = _filesystem(name).open(name, "rb", block_size=PIECE, cache_type="readahead")
    return file


def retrying(work: Callable[[], T], retries: int) -> T:
    """The result of ``work``, which is tried again ``retries`` times after errors that may pass."""
    for attempt in range(retries + 1):
        try:
            return work()
        except Exception as error:
            if attempt == retries or not _may_pass(error):
                raise
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (*LASTING_ERRORS, UserError)) or type(error).__name__ in LASTING_NAMES:
        return False
    # Libraries of the network raise OSErrors without a number, or errors of their own.
    return not isinstance(error, OSError) or not error.errno or error.errno in PASSING_ERRORS


def refusal(key: str, name: str, error: Exception) -> DataError:
    """A sentence for a name that cannot be read."""
    shown, reason = f"{key}: {name!r}", one_line(error, 200) or type(error).__name__
    # Over plain HTTP any refusal is reported as a file that is not there; its cause knows better.
    status = getattr(error.__cause__, "status", None)
    if isinstance(error, FileNotFoundError) and status in (None, 404, 410):
        return DataError(f"{shown} does not exist: check the name, and that all shards were copied.")
    if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ in LASTING_NAMES:
        return DataError(f"{shown} may not be read ({reason}): check its permissions and your credentials.")
    if isinstance(error, ImportError):
        extra = EXTRAS.get(name.partition("://")[0])
        return DataError(f"{shown} needs another package ({reason}): pip install 'trajdist[{extra}]'.")
    return DataError(f"{shown} cannot be read ({reason}): mend it, or try again later.")


def read_bytes(path: Path, retries: int) -> bytes:
    """A whole local file; an I/O error of the passing kind is tried again with growing pauses."""
    return retrying(path.read_bytes, retries)


class _File:
    """Closed when nobody reads from it any more, so that any thread may drop it from the list of open files."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(path: str) -> _File:
    return _File(path)


def _filesystem(url: str) -> Any:
    """fsspec keeps one for each process and thread: none is carried through a fork."""
    import fsspec

    return fsspec.core.url_to_fs(url)[0]
