"""Remote shards on a disk of this machine, for all processes on it: bounded, least recently used first out.

A shard is in the folder whole or not at all. Whoever downloads one holds a lock of its name meanwhile, so that a killed
download is known by its free lock; whoever reads one may lose its name to somebody else's download, never its bytes.
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
from trajdist.errors import ArtifactError

GIB = 2**30
PART = ".part"


class ShardCache:
    """Copies of remote shards.

    Args:
        folder: where they are; made if need be.
        limit_gib: the most that they take together.

    Raises:
        ArtifactError: the folder cannot be written.
    """

    def __init__(self, folder: Path, limit_gib: float) -> None:
        self._folder, self._limit = folder, int(limit_gib * GIB)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked("room"):
                pass
        except OSError as error:
            raise ArtifactError(
                f"data.cache_dir={str(folder)!r} cannot be written ({error.strerror}): name another."
            ) from None

    def path_of(self, url: str, version: Version, retries: int) -> Path:
        """A copy of a shard, downloaded first where there is none.

        Raises:
            OSError: the disk is full, or the folder is gone.
            Exception: whatever the store raises.
        """
        digest = hashlib.sha256(f"{url}\n{version.size}\n{version.tag}".encode()).hexdigest()
        copy = self._folder / f"{digest[:24]}.tar"
        if not copy.exists():
            with self._locked(copy.stem):
                if not copy.exists():
                    self._download(url, version, copy, retries)
        with suppress(FileNotFoundError):
            os.utime(copy)  # The time of the last use.
        return copy

    def _download(self, url: str, version: Version, copy: Path, retries: int) -> None:
        part = copy.with_suffix(PART)
        self._reserve(part, version.size)
        try:
            with open(part, "r+b") as file:
                for start in range(0, version.size, PIECE):
                    file.write(read_exactly(url, start, min(PIECE, version.size - start), retries))
            os.replace(part, copy)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, part: Path, size: int) -> None:
        """Begin a file of its final size, when there is room; other downloads end or die, so this ends."""
        while not self._try_to_reserve(part, size):
            time.sleep(0.05)

    def _try_to_reserve(self, part: Path, size: int) -> bool:
        with self._locked("room"):
            if not self._make_room(size):
                return False
            with open(part, "wb") as file:
                file.truncate(size)
            return True

    def _make_room(self, size: int) -> bool:
        self._drop_dead_downloads()
        copies = sorted(self._sizes("*.tar"), key=lambda entry: entry[1].st_mtime_ns)
        taken = sum(stat.st_size for _, stat in [*copies, *self._sizes(f"*{PART}")])
        for path, stat in copies:
            if taken + size <= self._limit:
                break
            path.unlink(missing_ok=True)
            taken -= stat.st_size
        return taken + size <= self._limit

    def _drop_dead_downloads(self) -> None:
        for part, _ in list(self._sizes(f"*{PART}")):
            with self._locked(part.stem, wait=False) as free:
                if free:
                    part.unlink(missing_ok=True)

    def _sizes(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(pattern):
            with suppress(FileNotFoundError):
                yield path, path.stat()

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock by name; ``wait=False`` yields False where somebody else holds it."""
        with open(self._folder / f".{name}.lock", "a") as file:
            try:
                # A lock of the open file: threads and forked processes exclude each other as well.
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
