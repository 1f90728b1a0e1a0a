"""Trajectories of images that were seen before, on disk in bfloat16.

One sparse file with a record per image, at the image's number times the record's size, and a file with a byte per
image that says whether its record is there. That byte is set after the record has reached the disk, so a kill at any
moment costs records, never their truth; any number of processes, of any later world size, read and add. Files are
read and not mapped: pages of a map would count as the memory of the process.

Shape suffixes: B images, P places, K chosen places, L blocks, D channels of a trajectory.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trajdist.artifacts import fingerprint
from trajdist.errors import ArtifactError, ConfigError, one_line
from trajdist.files import write_at, write_json
from trajdist.sharding import Int64s

PAGE = 4096
GIB = 2**30
# macOS has no fdatasync.
SYNC = getattr(os, "fdatasync", os.fsync)
# When batches wait, records are made durable in groups of this many bytes.
SYNC_BYTES = 64 * 2**20
# Batches that wait for the disk; with more the training waits.
QUEUE = 2


class Cached(NamedTuple):
    """Which slots of a batch the cache has.

    Attributes:
        trajectories: bfloat16 ``[h, K, L, D]`` of the slots ``hits``.
        hits, misses: int64, slot numbers; the batch's images are those of ``misses``, perhaps padded.
        numbers: of the images in ``misses``; -1 for one that cannot be used.
    """

    trajectories: torch.Tensor
    hits: torch.Tensor
    misses: torch.Tensor
    numbers: torch.Tensor


class TrajectoryCache:
    """The records of one image set under one extractor. Cheap to send to worker processes.

    Args:
        folder: the parent of the caches; this one's name follows from ``key``.
        key: everything a trajectory depends on, written beside the records.
        shape: ``(P, L, D)``.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], num_images: int, shape: tuple[int, int, int]) -> None:
        self.folder = folder / fingerprint({}, {**key, "num_images": num_images, "shape": list(shape)})[:16]
        self.num_images, self.shape, self._key = num_images, shape, dict(key)
        self.record_bytes = 2 * int(np.prod(shape))
        # No page belongs to two records: network file systems cache by the page.
        self.stride = -(-self.record_bytes // PAGE) * PAGE
        self._open: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def create(self) -> None:
        """Make the folder and its files, unless they are there.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "key.json", self._key)
            for name in ("records", "present"):
                (self.folder / name).touch()
            os.truncate(self.folder / "present", self.num_images)
        except (OSError, ArtifactError) as error:
            raise ConfigError(
                f"cache.dir={str(self.folder.parent)!r} cannot be written ({error}): name another folder."
            ) from None

    def __len__(self) -> int:
        """Number of images whose records are there."""
        count, descriptor = 0, self._descriptor("present")
        for start in range(0, self.num_images, 2**20):
            count += os.pread(descriptor, 2**20, start).count(b"\1")
        return count

    def read(self, number: int, record_PLD: npt.NDArray[np.uint16]) -> bool:
        """Fill ``record_PLD`` (uint16, the bits of bfloat16) with an image's record; False if there is none."""
        try:
            if os.pread(self._descriptor("present"), 1, number) != b"\1":
                return False
            return os.preadv(self._descriptor("records"), [record_PLD.data], number * self.stride) == self.record_bytes
        except OSError:
            return False

    def write(self, number: int, record_PLD: npt.NDArray[np.uint16]) -> None:
        """Write a record; it is not there yet, see :meth:`commit`."""
        write_at(self._descriptor("records"), record_PLD.data, number * self.stride)

    def commit(self, numbers: list[int]) -> None:
        """Make written records durable, then say that they are there."""
        SYNC(self._descriptor("records"))
        for number in numbers:
            os.pwrite(self._descriptor("present"), b"\1", number)

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC)
        return self._open[name]


def look_up(cache: TrajectoryCache, numbers: Int64s, places_BK: torch.Tensor | None) -> Cached:
    """Read what the cache has of these images, one per slot; ``places_BK`` None takes all places."""
    hits: list[int] = []
    misses: list[int] = []
    found: list[npt.NDArray[np.uint16]] = []
    record_PLD = np.empty(cache.shape, np.uint16)
    for slot, number in enumerate(numbers.tolist()):
        if not cache.read(number, record_PLD):
            misses.append(slot)
            continue
        hits.append(slot)
        found.append(record_PLD.copy() if places_BK is None else record_PLD[places_BK[slot].numpy()])
    chosen = cache.shape[0] if places_BK is None else places_BK.shape[1]
    bits_hKLD = np.stack(found) if found else np.empty((0, chosen, *cache.shape[1:]), np.uint16)
    trajectories = torch.from_numpy(bits_hKLD).view(torch.bfloat16)
    return Cached(
        trajectories,
        torch.tensor(hits, dtype=torch.int64),
        torch.tensor(misses, dtype=torch.int64),
        torch.from_numpy(numbers[misses]),
    )


def padded(count: int, slots: int) -> int:
    """``count`` rounded up to a quarter of the slots: few sizes of batch, each compiled and tuned once."""
    quarter = -(-slots // 4)
    return min(slots, -(-count // quarter) * quarter)


class CacheWriter:
    """Adds to a cache in a thread of its own. When the room is used up or the disk fails it stops adding, and says so.

    Args:
        room: images that this process may add.
    """

    def __init__(self, cache: TrajectoryCache, room: int) -> None:
        self._cache, self._room = cache, room
        self.ended = ""
        self._waiting: queue.Queue[tuple[list[int], torch.Tensor, torch.cuda.Event | None] | None]
        self._waiting = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._work, name="cache", daemon=True)
        self._thread.start()

    def add(self, numbers: torch.Tensor, trajectories_BPLD: torch.Tensor) -> None:
        """Keep these images' trajectories, bfloat16 on any device; numbers below 0 are left out."""
        if self.ended:
            return
        cuda = trajectories_BPLD.is_cuda
        on_host = torch.empty(trajectories_BPLD.shape, dtype=torch.bfloat16, pin_memory=cuda)
        on_host.copy_(trajectories_BPLD, non_blocking=cuda)
        self._waiting.put((numbers.tolist(), on_host, torch.cuda.current_stream().record_event() if cuda else None))

    def close(self) -> str:
        """Write what waits; returns why the cache stopped growing, if it did."""
        self._waiting.put(None)
        self._thread.join()
        return self.ended

    def _work(self) -> None:
        written: list[int] = []
        try:
            while item := self._waiting.get():
                written += self._write(*item)
                if self._waiting.empty() or len(written) * self._cache.stride > SYNC_BYTES:
                    self._cache.commit(written)
                    written = []
            self._cache.commit(written)
        except Exception as error:  # Whatever it is, the training must not wait for this thread for ever.
            self._stop(f"the cache in {str(self._cache.folder)!r} cannot be written ({one_line(error)})")

    def _write(self, numbers: list[int], trajectories_BPLD: torch.Tensor, copied: torch.cuda.Event | None) -> list[int]:
        if copied is not None:
            copied.synchronize()
        bits_BPLD = trajectories_BPLD.view(torch.uint16).numpy()
        usable = [(number, bits_PLD) for number, bits_PLD in zip(numbers, bits_BPLD, strict=True) if number >= 0]
        kept = usable[: self._room]
        for number, bits_PLD in kept:
            self._cache.write(number, bits_PLD)
        self._room -= len(kept)
        if len(kept) < len(usable):
            self.ended = f"the cache in {str(self._cache.folder)!r} is full (cache.max_gib)"
        return [number for number, _ in kept]

    def _stop(self, why: str) -> None:
        self.ended = why
        # Whoever waits for room in the queue must not wait for ever.
        while True:
            with contextlib.suppress(queue.Empty):
                if self._waiting.get(timeout=1.0) is None:
                    return
