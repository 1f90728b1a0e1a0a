"""On-disk cache of image trajectories in bfloat16.

One sparse file holds a fixed-size record per image, at offset image number x stride; a second file holds the version of
the image that the record was made from (:meth:`trajdist.data.base.ImageSource.version`), 8 bytes each, 0 without a
record. It is set only after the record has been synced to disk, so a kill at any moment may lose records but never
exposes a corrupt one, and the record of an image that has been replaced is not used. Any number of processes may read
and add, also in later runs with another world size. Files are read rather than memory-mapped, because mapped pages
would count towards the process's memory.

Shape suffixes: B images, P places, K chosen places, L steps, D channels of a trajectory.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trajdist.artifacts import fingerprint
from trajdist.errors import ArtifactError, ConfigError, one_line
from trajdist.files import GIB, sync_contents, write_at, write_json
from trajdist.sharding import Int64s

PAGE, VERSION_BYTES = 4096, 8
# While batches are queued, sync only after this many bytes of records.
SYNC_BYTES = 64 * 2**20
# Batches queued for writing; when the queue is full, training blocks.
QUEUE = 2


class Cached(NamedTuple):
    """Cache lookup of a batch: h slots hit, the others missed.

    Attributes:
        trajectories: bfloat16 ``[h, K, L, D]`` of the slots in ``hits``; K is P if all places are read.
        hits, misses: int64, slot numbers; the batch contains only the images in ``misses``, possibly padded.
        numbers: int64, image numbers of ``misses``; -1 for an image that could not be used.
        versions: int64, the versions of these images, from before they are read.
    """

    trajectories: torch.Tensor
    hits: torch.Tensor
    misses: torch.Tensor
    numbers: torch.Tensor
    versions: torch.Tensor


class TrajectoryCache:
    """The records of one image set under one extractor. Cheap to pickle for worker processes.

    Args:
        folder: parent folder of all caches; this cache's subfolder is named by a hash of the other arguments.
        key: everything a trajectory depends on; saved beside the records.
        num_images: images in the set.
        shape: ``(P, L, D)``.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], num_images: int, shape: tuple[int, int, int]) -> None:
        self.folder = folder / fingerprint({}, {**key, "num_images": num_images, "shape": list(shape)})[:16]
        self.num_images, self.shape, self._key = num_images, shape, dict(key)
        self.record_bytes = 2 * int(np.prod(shape))
        # Page-aligned, so no page is shared by two records: network file systems cache whole pages.
        self.stride = -(-self.record_bytes // PAGE) * PAGE
        self._open: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def create(self) -> None:
        """Create the folder and its files if they do not exist.

        Raises:
            ConfigError: the folder is not writable.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "key.json", self._key)
            for name in ("records", "versions"):
                (self.folder / name).touch()
            os.truncate(self.folder / "versions", VERSION_BYTES * self.num_images)
            # The id distinguishes this folder from the same path on another machine.
            with suppress(FileExistsError), open(self.folder / "id", "x") as file:
                file.write(uuid.uuid4().hex)
        except (OSError, ArtifactError) as error:
            raise ConfigError(
                f"cache.dir={str(self.folder.parent)!r} cannot be written ({one_line(error)}): name another folder."
            ) from None

    def identity(self) -> str:
        """Equal on all processes that share the folder, and on no others; valid once all of them have created it."""
        return (self.folder / "id").read_text()

    def __len__(self) -> int:
        """Number of images that have a record, even of an earlier version."""
        count, descriptor, part = 0, self._descriptor("versions"), 2**20
        for start in range(0, VERSION_BYTES * self.num_images, part):
            count += int(np.count_nonzero(np.frombuffer(os.pread(descriptor, part, start), np.int64)))
        return count

    def capacity(self, gib: float) -> int:
        """How many records fit into ``gib`` GiB, regardless of the number of images."""
        return int(min(gib * GIB / self.stride, 2**62))  # The limit may be infinite.

    def read(self, number: int, version: int, record_PLD: npt.NDArray[np.uint16]) -> bool:
        """Read an image's record into ``record_PLD`` (uint16, the bits of bfloat16).

        False if it is missing, unreadable or of another version; a version of 0 stands for any.
        """
        try:
            kept = self.version(number)
            if not kept or version not in (0, kept):
                return False
            return os.preadv(self._descriptor("records"), [record_PLD.data], number * self.stride) == self.record_bytes
        except OSError:
            return False

    def version(self, number: int) -> int:
        """The version of the image that its record was made from; 0 without a record.

        Raises:
            OSError: it cannot be read.
        """
        kept = os.pread(self._descriptor("versions"), VERSION_BYTES, VERSION_BYTES * number)
        return int.from_bytes(kept, sys.byteorder)

    def write(self, number: int, record_PLD: npt.NDArray[np.uint16]) -> None:
        """Write a record (uint16 ``[P, L, D]``, the bits of bfloat16); it becomes visible with :meth:`commit`.

        Raises:
            OSError: it cannot be written.
        """
        write_at(self._descriptor("records"), record_PLD.data, number * self.stride)

    def commit(self, written: Iterable[tuple[int, int]]) -> None:
        """Sync written records to disk, then set their images' versions, given as ``(number, version)``.

        Raises:
            OSError: they cannot be written.
        """
        sync_contents(self._descriptor("records"))
        for number, version in written:
            self._set_version(number, max(version, 1))

    def discard(self, number: int) -> None:
        """Invalidate an image's record.

        Raises:
            OSError: that cannot be written.
        """
        self._set_version(number, 0)

    def _set_version(self, number: int, version: int) -> None:
        raw = memoryview(version.to_bytes(VERSION_BYTES, sys.byteorder))
        write_at(self._descriptor("versions"), raw, VERSION_BYTES * number)

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC)
        return self._open[name]


def look_up(cache: TrajectoryCache, numbers: Int64s, versions: Int64s, places_BK: torch.Tensor | None) -> Cached:
    """Look up the images ``numbers`` in these versions, one per slot.

    Args:
        places_BK: int64, the places to read; None for all of them.
    """
    hits: list[int] = []
    misses: list[int] = []
    found: list[npt.NDArray[np.uint16]] = []
    record_PLD = np.empty(cache.shape, np.uint16)
    for slot, (number, version) in enumerate(zip(numbers.tolist(), versions.tolist(), strict=True)):
        if not cache.read(number, version, record_PLD):
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
        torch.from_numpy(versions[misses]),
    )


def padded(count: int, slots: int) -> int:
    """Round ``count`` up to a multiple of a quarter of the slots: few batch sizes, each compiled and tuned once."""
    quarter = -(-slots // 4)
    return min(slots, -(-count // quarter) * quarter)


class CacheWriter:
    """Adds to a cache from a background thread. Stops when its quota is used up or a write fails.

    An image may come more than once, if it was looked up before its record was committed: the first record stays.

    Args:
        room: the number of images that this process may add.

    Attributes:
        ended: why writing stopped; empty until then.
    """

    def __init__(self, cache: TrajectoryCache, room: int) -> None:
        self._cache, self._room = cache, room
        self.ended = ""
        self._written: dict[int, int] = {}  # Versions by number, not yet committed.
        self._scratch_PLD = np.empty(cache.shape, np.uint16)
        self._waiting: queue.Queue[tuple[list[tuple[int, int]], torch.Tensor, torch.cuda.Event | None] | None]
        self._waiting = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._work, name="cache", daemon=True)
        self._thread.start()

    def add(self, numbers: torch.Tensor, versions: torch.Tensor, trajectories_BPLD: torch.Tensor) -> bool:
        """Queue the trajectories of these images, bfloat16 on any device; images with negative numbers are skipped.

        Returns whether that had to wait for the disk.
        """
        if self.ended:
            return False
        cuda = trajectories_BPLD.is_cuda
        on_host = torch.empty(trajectories_BPLD.shape, dtype=torch.bfloat16, pin_memory=cuda)
        on_host.copy_(trajectories_BPLD, non_blocking=cuda)
        images = list(zip(numbers.tolist(), versions.tolist(), strict=True))
        full = self._waiting.full()
        self._waiting.put((images, on_host, torch.cuda.current_stream().record_event() if cuda else None))
        return full

    def close(self) -> str:
        """Flush the queue; returns why the cache stopped growing, or an empty string."""
        self._waiting.put(None)
        self._thread.join()
        return self.ended

    def _work(self) -> None:
        while True:
            item = self._waiting.get()
            try:
                # Once writing has ended, items are only taken out: a full queue would block training.
                if item is not None and not self.ended:
                    self._write(*item)
                if item is None or self._waiting.empty() or len(self._written) * self._cache.stride > SYNC_BYTES:
                    self._cache.commit(self._written.items())
                    self._written.clear()
            except Exception as error:  # Whatever went wrong, training must not block on this thread.
                self.ended = f"the cache in {str(self._cache.folder)!r} cannot be written ({one_line(error)})"
                self._written.clear()
            if item is None:
                return

    def _write(
        self, images: list[tuple[int, int]], trajectories_BPLD: torch.Tensor, copied: torch.cuda.Event | None
    ) -> None:
        """Write as many records as there is room for."""
        if copied is not None:
            # A new thread starts on GPU 0: a plain wait would create a CUDA context there in every process.
            with torch.cuda.device(copied.device):
                copied.synchronize()
        for (number, version), bits_PLD in zip(images, trajectories_BPLD.view(torch.uint16).numpy(), strict=True):
            if number < 0 or self._has(number, version):
                continue
            if not self._make_room(number):
                self.ended = f"the cache in {str(self._cache.folder)!r} is full (cache.max_gib)"
                break
            self._cache.write(number, bits_PLD)
            self._written[number] = version

    def _has(self, number: int, version: int) -> bool:
        """Whether the image has a readable record of this version, written by whomever."""
        return self._written.get(number) == version or self._cache.read(number, version, self._scratch_PLD)

    def _make_room(self, number: int) -> bool:
        """Reserve room for a record, reusing that of the image's earlier version; False if there is none."""
        if number in self._written:
            return True
        if self._cache.version(number):
            self._cache.discard(number)
        elif self._room:
            self._room -= 1
        else:
            return False
        return True
