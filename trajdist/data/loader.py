"""Batches: a map-style dataset and a batch sampler whose order is a pure function of the plan.

Accelerate deals the sampler's micro-batches to the processes round-robin; see :mod:`trajdist.sharding`.

Shape suffixes: B slots, K chosen places, P places, S pixels per side.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from trajdist.data.base import ImageSource
from trajdist.data.decode import Fit, reason, to_square
from trajdist.data.drawing import DefectDraw
from trajdist.data.trajectory_cache import Cached, TrajectoryCache, look_up, padded
from trajdist.sharding import Int64s, PlaceDraw, Plan, Slots, digest

IndexAt = Callable[[int, Int64s], Int64s]
# Cap on workers or threads per process: each may hold a decoded image of any size.
MOST_READERS = 16
T = TypeVar("T")
U = TypeVar("U")


class ImageBatch(NamedTuple):
    """One process's micro-batch. Empty slots are grey images of weight 0.

    Attributes:
        images: uint8 ``[B, 3, S, S]``, channels last in memory.
        weights: float32 ``[B]``, 1 for an image, 0 for an empty slot.
        digest: int64 scalar, :func:`trajdist.sharding.digest` of the numbers of the usable images.
        failures: ``(number, reason)`` of each image that could not be used; its slot is empty.
        places: int64 ``[B, K]``, the places to train on; None for all of them.
        cached: the trajectory cache's hits and misses; if given, ``images`` contains only the misses (padded).
        coverage: float32 ``[B, P]``, fraction of each place covered by a synthetic defect; if given, ``images`` has
            ``2 B`` entries: the clean images, then the same images with defects.
    """

    images: torch.Tensor
    weights: torch.Tensor
    digest: torch.Tensor
    failures: list[tuple[int, str]]
    places: torch.Tensor | None = None
    cached: Cached | None = None
    coverage: torch.Tensor | None = None


class SlotDataset(Dataset[ImageBatch]):
    """Reads whole micro-batches: :class:`Slots` in, :class:`ImageBatch` out.

    Args:
        source: the images.
        index_at: maps an epoch and positions in it to image numbers.
        size: side of the square images, in pixels.
        fit: how images are made square.
        draw: chooses the places to train on; None for all.
        cache: looked up before images are decoded.
        defects: draws a defect into a copy of each image.
        threads: decode a batch's images in this many threads; below 2, in the calling thread.
    """

    def __init__(
        self,
        source: ImageSource,
        index_at: IndexAt,
        size: int,
        fit: Fit,
        draw: PlaceDraw | None = None,
        cache: TrajectoryCache | None = None,
        defects: DefectDraw | None = None,
        threads: int = 0,
    ) -> None:
        self._source, self._index_at, self._size, self._fit = source, index_at, size, fit
        self._draw, self._cache, self._defects, self._threads = draw, cache, defects, threads

    def __getitems__(self, slots: Slots) -> ImageBatch:
        # The DataLoader passes a whole batch from the sampler to this method if it exists.
        numbers = self._index_at(slots.epoch, np.arange(slots.start, slots.stop))
        places = torch.from_numpy(self._draw(slots)) if self._draw else None
        cached = self._look_up(self._cache, numbers, places) if self._cache is not None else None
        wanted = numbers if cached is None else numbers[cached.misses.numpy()]
        size = slots.size if cached is None else padded(len(wanted), slots.size)
        pixels, failures = self._load(wanted, size)
        coverage = None
        if self._defects is not None:
            pixels, coverage = self._with_defects(self._defects, pixels, slots)
        failed = [number for number, _ in failures]
        usable = ~np.isin(numbers, failed)
        weights = torch.zeros(slots.size)
        weights[: len(numbers)] = torch.from_numpy(usable).float()
        if cached is not None:
            cached.numbers[torch.from_numpy(np.isin(wanted, failed))] = -1
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return ImageBatch(images, weights, torch.tensor(digest(numbers[usable])), failures, places, cached, coverage)

    def _look_up(self, cache: TrajectoryCache, numbers: Int64s, places: torch.Tensor | None) -> Cached:
        # Before the images are read, so that one that is replaced meanwhile counts as replaced.
        versions = np.array([self._source.version(int(number)) for number in numbers], np.int64)
        return look_up(cache, numbers, versions, places)

    def _load(self, numbers: Int64s, size: int) -> tuple[npt.NDArray[np.uint8], list[tuple[int, str]]]:
        """uint8 ``[size, S, S, 3]``, grey for padding and unusable images, and ``(number, reason)`` of the latter."""
        pixels = np.full((size, self._size, self._size, 3), 128, np.uint8)

        def load(slot: int) -> list[tuple[int, str]]:
            number = int(numbers[slot])
            try:
                pixels[slot] = to_square(self._source.load(number, self._size), self._size, self._fit)
            except Exception as error:  # Decoders can raise anything on malformed bytes; report and skip.
                return [(number, reason(error))]
            return []

        failures = in_threads(load, range(len(numbers)), self._threads)
        return pixels, list(itertools.chain.from_iterable(failures))

    def _with_defects(
        self, draw: DefectDraw, pixels: npt.NDArray[np.uint8], slots: Slots
    ) -> tuple[npt.NDArray[np.uint8], torch.Tensor]:
        """The images, then copies with defects, uint8 ``[2 B, S, S, 3]``, and the coverage, float32 ``[B, P]``."""

        def drawn_at(slot: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
            return draw(pixels[slot], slots.epoch, slots.start + slot)

        pairs = in_threads(drawn_at, range(len(pixels)), self._threads)
        drawn, coverage = (np.stack(part) for part in zip(*pairs, strict=True))
        return np.concatenate([pixels, drawn]), torch.from_numpy(coverage)

    def __getitem__(self, slots: Slots) -> ImageBatch:
        return self.__getitems__(slots)


def in_threads(work: Callable[[T], U], items: Iterable[T], threads: int) -> list[U]:
    """Map ``work`` over ``items`` in a thread pool; results in order. Fewer than two threads: in the calling thread."""
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


class SlotSampler(BatchSampler):
    """Yields all processes' micro-batches in round-robin order, from the cursor to the end of the last epoch."""

    def __init__(self, plan: Plan, cursor: int = 0) -> None:
        self._plan, self._cursor = plan, cursor
        # For Accelerate's BatchSamplerShard: it yields a round of batches only if the last one's length (Slots.__len__)
        # equals batch_size, and drop_last stops it from completing a final round by concatenating batches as lists.
        self.batch_size, self.drop_last = plan.slots, True

    def __iter__(self) -> Iterator[Any]:
        return self._plan.shares(self._cursor)

    def __len__(self) -> int:
        steps = self._plan.total_steps - self._plan.step_index_at(self._cursor)
        return steps * self._plan.micro_batches * self._plan.world


def build_loader(
    dataset: SlotDataset, plan: Plan, *, cursor: int = 0, num_workers: int, pin_memory: bool
) -> DataLoader[ImageBatch]:
    """The loader over all processes' micro-batches, for Accelerate to shard.

    Args:
        cursor: images consumed so far; must lie between two steps.
    """
    return DataLoader(
        dataset,
        batch_sampler=SlotSampler(plan, cursor),
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals if num_workers else None,
        # Since Python 3.14 the default on Linux is forkserver: each worker of each pass would import torch anew, and a
        # signal to the process group would kill the server.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )


def _as_is(batch: object) -> ImageBatch:
    return cast(ImageBatch, batch)


def _ignore_signals(worker: int) -> None:
    """Leave signals sent to the process group to the training process, which shuts its workers down itself."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def processors() -> int:
    """CPUs available to this process when it started: later Accelerate may bind it to those near its GPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_workers(setting: int | str, local_world: int, device_type: str) -> int:
    """Worker processes per training process.

    ``auto`` is the process's share of the CPUs less its compute threads, at most :data:`MOST_READERS`. When training on
    the CPU, all torch threads compute and extra workers would only compete with them.
    """
    if isinstance(setting, int):
        return setting
    computing = torch.get_num_threads() if device_type == "cpu" else 1
    return min(MOST_READERS, max(0, processors() // local_world - computing))


def resolve_threads(setting: int | str, workers: int) -> int:
    """Decoding threads in the training process: with ``auto`` and no workers, one per torch thread, else 0."""
    return min(MOST_READERS, torch.get_num_threads()) if setting == "auto" and not workers else 0
