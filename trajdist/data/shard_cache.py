"""Local disk cache of remote shards, shared by all processes on a machine; bounded, with LRU eviction.

A shard appears in the folder complete or not at all. A downloader holds a lock named after the shard, so a partial file
whose lock is free belongs to a killed download. An eviction may unlink a shard that another process is reading; its
open file descriptor stays valid.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trajdist.data.storage import PIECE, Version, read_exactly
from trajdist.errors import os_errors
from trajdist.files import GIB

# Files with other names in the folder are not ours.
NAME = "[0-9a-f]" * 24
SHARD, PART = ".tar", ".part"


class ShardCache:
    """Copies of remote shards.

    Args:
        folder: where they are kept; created if missing.
        limit_gib: limit on their total size, in GiB.

    Raises:
        ArtifactError: the folder is not writable.
    """

    def __init__(self, folder: Path, limit_gib: float) -> None:
        self._folder, self._limit = folder, int(limit_gib * GIB)
        with os_errors(f"data.cache_dir={str(folder)!r} cannot be written", fix="name another"):
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked("room"):
                pass

    def path_of(self, url: str, version: Version, retries: int) -> Path:
        """The local copy of a shard, downloaded first if missing.

        Another process may evict the copy at any time, so be prepared for ``FileNotFoundError`` when opening it.

        Raises:
            OSError: the disk is full, or the folder has disappeared.
            Exception: whatever the store raises.
        """
        copy = self._copy_of(url, version)
        if not copy.exists():
            with self._locked(copy.stem):
                if not copy.exists():
                    self._download(url, version, copy, retries)
        with suppress(FileNotFoundError):
            os.utime(copy)  # The mtime is the time of last use, for eviction.
        return copy

    def has(self, url: str, version: Version) -> bool:
        """Whether there is a local copy of a shard."""
        return self._copy_of(url, version).exists()

    def _copy_of(self, url: str, version: Version) -> Path:
        digest = hashlib.sha256(f"{url}\n{version.size}\n{version.tag}".encode()).hexdigest()
        return self._folder / f"{digest[:24]}{SHARD}"

    def _download(self, url: str, version: Version, copy: Path, retries: int) -> None:
        part = copy.with_suffix(PART)
        # Left by a killed download of this shard. We hold its lock now, so it would count as a live download.
        part.unlink(missing_ok=True)
        self._reserve(part, version.size)
        try:
            with open(part, "r+b") as file:
                for start in range(0, version.size, PIECE):
                    file.write(read_exactly(url, start, min(PIECE, version.size - start), retries))
                file.flush()
                os.fsync(file.fileno())  # Or a power cut could leave a complete file of zeros.
            os.replace(part, copy)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: Path, size: int) -> None:
        """Wait for room, then create the file at its final size. Terminates because other downloads finish or die."""
        while not self._try_to_reserve(part, size):
            time.sleep(0.05)

    def _try_to_reserve(self, part: Path, size: int) -> bool:
        with self._locked("room"):
            if not self._make_room(size):
                return False
            try:
                with open(part, "wb") as file:
                    _allocate(file.fileno(), size)
            except OSError:
                part.unlink(missing_ok=True)
                raise
            return True

    def _make_room(self, size: int) -> bool:
        self._drop_dead_downloads()
        copies = sorted(self._sizes(SHARD), key=lambda entry: entry[1].st_mtime_ns)
        taken = sum(stat.st_size for _, stat in [*copies, *self._sizes(PART)])
        for path, stat in copies:
            if taken + size <= self._limit:
                break
            path.unlink(missing_ok=True)
            taken -= stat.st_size
        return taken + size <= self._limit

    def _drop_dead_downloads(self) -> None:
        for part, _ in list(self._sizes(PART)):
            with self._locked(part.stem, wait=False) as free:
                if free:
                    part.unlink(missing_ok=True)

    def _sizes(self, ending: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(NAME + ending):
            with suppress(FileNotFoundError):
                yield path, path.stat()

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock ``name``; with ``wait=False``, yields False if it is already held."""
        with open(self._folder / f".{name}.lock", "a") as file:
            try:
                # flock belongs to the open file description, so it excludes other threads and forked processes too.
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its final size and, where the system can, its disk space: a full disk is known before downloading.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
