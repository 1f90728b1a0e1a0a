"""Tar shards in WebDataset's layout, on disk or in an object store, with random access through their indexes.

Nothing is ever extracted to disk, so no member name or link in a shard can cause path traversal.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from trajdist import launcher
from trajdist.data import storage
from trajdist.data.base import EXTENSIONS, EncodedSource, Names, numbered, version_of
from trajdist.data.shard_cache import ShardCache
from trajdist.data.shard_index import BLOCK, ShardIndex, load_index
from trajdist.data.storage import THREADS, Access, Version
from trajdist.errors import DataError, UserError
from trajdist.files import GIB, user_path
from trajdist.screen import LINE_EVERY_S, on_screen

SHOWN = 5
T = TypeVar("T")


class TarShards(EncodedSource):
    """The images of tar shards, shard after shard; see :mod:`trajdist.data.shard_index` for what counts as an image.

    Args:
        paths: paths or URLs of the shards.
        key: the config key or argument that they came from, for error messages.
        access: retries, and where remote shards are cached.

    Raises:
        DataError: no images; a shard that is missing, unreadable or damaged; or a cache too small for the shards that
            are read at the same time.
        ArtifactError: the cache folder is not writable.
    """

    def __init__(self, paths: Sequence[str], key: str, access: Access) -> None:
        self._paths, self._access, self._downloads = list(paths), access, True
        self._cache = self._open_cache()
        self._shards = _open_shards(self._paths, key, access)
        self._check_room(key)
        self._ends = np.cumsum([len(shard.names) for shard in self._shards])
        if not len(self):
            raise DataError(f"{key}={paths[0]!r} holds no images: members that end in {', '.join(EXTENSIONS)} count.")
        self._shown = _shown(self._paths)
        digest = hashlib.sha256()
        for shown, shard in zip(self._shown, self._shards, strict=True):
            digest.update(os.fsencode(f"{shown}/{shard.names.fingerprint}\0"))
        self.fingerprint = digest.hexdigest()
        _tell_left_out(self._paths, self._shards)

    def _open_cache(self) -> ShardCache | None:
        if self._access.cache_dir is None or not any(map(storage.is_url, self._paths)):
            return None
        return ShardCache(user_path(self._access.cache_dir), self._access.cache_gib)

    def _check_room(self, key: str) -> None:
        if self._cache is None:
            return
        remote = sorted(version.size for path, version in self._versions() if storage.is_url(path))
        used = sum(remote[-self._access.window :])  # A window of 0 shards means all of them.
        if used > self._access.cache_gib * GIB:
            raise DataError(
                f"data.cache_gib={self._access.cache_gib:g} is less than the {used / GIB:.3g} GiB of the shards of "
                f"{key} that are read at the same time: raise it, or lower data.shuffle_window."
            )

    def _versions(self) -> list[tuple[str, Version]]:
        return [(path, shard.version) for path, shard in zip(self._paths, self._shards, strict=True)]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, int]:
        """Index of the shard, and of the image within it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + len(self._shards[shard].names)

    def name(self, index: int) -> str:
        """Such as ``train-000007.tar/n01440764/n01440764_10026.jpg``."""
        shard, member = self._find(index)
        return f"{self._shown[shard]}/{self._shards[shard].names[member]}"

    def path(self, index: int) -> str:
        """The member's name, such as ``n01440764/n01440764_10026.jpg``."""
        shard, member = self._find(index)
        return self._shards[shard].names[member]

    def read(self, index: int) -> bytes:
        """The encoded bytes of image ``index``.

        Raises:
            OSError: the shard has changed since it was indexed, or the member is too large for an image.
            Exception: whatever the store raises.
        """
        shard, member = self._find(index)
        start, size = int(self._shards[shard].offsets[member]) - BLOCK, int(self._shards[shard].sizes[member])
        storage.check_size(size)
        location = self._location(shard)
        try:
            content = storage.read_exactly(location, start, BLOCK + size, self._access.retries)
        except FileNotFoundError:
            # Evicted from the cache between the lookup and the read.
            content = storage.read_exactly(self._paths[shard], start, BLOCK + size, self._access.retries)
        if zlib.crc32(content[:BLOCK]) != self._shards[shard].headers[member]:
            raise OSError(f"{self._shown[shard]} has changed since it was indexed")
        return content[BLOCK:]

    def scattered(self) -> TarShards:
        other = copy.copy(self)
        other._downloads = False
        return other

    def _location(self, shard: int) -> str:
        """Where to read a shard from: the local copy if there is a cache with room for it."""
        name = self._paths[shard]
        if self._cache is None or not storage.is_url(name):
            return name
        if not self._downloads and not self._cache.has(name, self._shards[shard].version):
            return name
        try:
            return str(self._cache.path_of(name, self._shards[shard].version, self._access.retries))
        except OSError as error:
            if not error.errno:
                raise
            return name  # With a full disk, read remotely: slower but correct.

    def classes(self) -> npt.NDArray[np.int64] | None:
        """From the ``.cls`` members, or else the folders within the shards; see :func:`numbered`."""
        return numbered(name for shard in self._shards for name in shard.classes)

    def label(self, index: int) -> str | None:
        """The content of its ``.cls`` member."""
        shard, member = self._find(index)
        text, folder = self._shards[shard].classes[member], os.path.dirname(self.path(index))
        return text if text.isdecimal() or text != folder else None

    def shard_sizes(self) -> list[int]:
        return [len(shard.names) for shard in self._shards]

    def version(self, index: int) -> int:
        return version_of(*self._shards[self._find(index)[0]].version)

    def stamp(self) -> str:
        facts = "".join(f"{name} {version.size} {version.tag}|" for name, version in self._versions())
        return hashlib.sha256(facts.encode(errors="surrogateescape")).hexdigest()


def _shown(paths: Sequence[str]) -> Sequence[str]:
    """Base names, or the full paths if base names are not unique."""
    short = [os.path.basename(path) for path in paths]
    return short if len(set(short)) == len(short) else paths


class _Shard:
    """A compact in-memory index."""

    def __init__(self, index: ShardIndex) -> None:
        self.version = Version(*index.version)
        self.names = Names(index.names)
        self.offsets, self.sizes = np.array(index.offsets, np.int64), np.array(index.sizes, np.int64)
        self.headers = np.array(index.headers, np.uint32)
        self.classes = Names(index.classes)
        self.left_out = index.left_out


def _open_shards(paths: list[str], key: str, access: Access) -> list[_Shard]:
    """Load all indexes; processes of one job start at different shards, so that each can reuse the others' indexes.

    Raises:
        DataError: a shard is missing, unreadable, damaged, compressed or truncated.
    """
    folder = user_path(access.cache_dir or "~/.cache/trajdist")
    first = launcher.rank() * len(paths) // launcher.world() % len(paths)
    failed = threading.Event()

    def load(path: str) -> tuple[str, _Shard | None]:
        if failed.is_set():
            return path, None
        try:
            return path, _Shard(storage.retrying(lambda: load_index(path, folder), access.retries))
        except Exception as error:  # Every store has its own errors.
            failed.set()
            raise error if isinstance(error, UserError) else storage.refusal(key, path, error) from None

    with ThreadPoolExecutor(min(THREADS, len(paths))) as threads:
        found = dict(_shown_while_loading(threads.map(load, paths[first:] + paths[:first]), len(paths)))
    return [shard for path in paths if (shard := found[path]) is not None]


def _shown_while_loading(loading: Iterable[T], total: int) -> Iterable[T]:
    """The same, with a bar on a terminal, elsewhere with a line a minute; from the main process only."""
    console, title = Console(stderr=True), "indexes of the shards"
    if launcher.rank():
        return loading
    # rich before 14.3 ends even a disabled bar with an empty line.
    if console.is_terminal:
        return track(loading, title, total, console=console, transient=True)
    return _telling(loading, title, total)


def _telling(loading: Iterable[T], title: str, total: int) -> Iterator[T]:
    told = time.monotonic()
    for count, item in enumerate(loading, start=1):
        if time.monotonic() - told > LINE_EVERY_S:
            told = time.monotonic()
            print(f"trajdist: {title}: {count:,}/{total:,}", file=sys.stderr, flush=True)
        yield item


def _tell_left_out(paths: list[str], shards: list[_Shard]) -> None:
    if launcher.rank():
        return
    lines = [
        on_screen(f"{path}: {name} is left out: {reason}")
        for path, shard in zip(paths, shards, strict=True)
        for name, reason in shard.left_out.items()
    ]
    more = [f"and {len(lines) - SHOWN} more members, all named in the shards' index files"]
    for line in lines[:SHOWN] + (more if len(lines) > SHOWN else []):
        print(f"trajdist: {line}", file=sys.stderr)
