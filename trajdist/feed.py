"""Batches with their trajectories: from the cache where it has them, else from the backbone.

Shape suffixes: B images, P places, K chosen places, L blocks, D channels of a trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from trajdist.clock import Clock
from trajdist.config import Config
from trajdist.data.cache import CacheWriter
from trajdist.data.loader import ImageBatch
from trajdist.runtime import to_device
from trajdist.trajectory import TrajectoryExtractor


def num_places(config: Config, extractor: TrajectoryExtractor) -> int:
    """Places of an image that a step trains on."""
    return max(1, round(config.train.cell_fraction * extractor.resolution**2))


def move(batch: ImageBatch, device: torch.device, clock: Clock) -> ImageBatch:
    """A batch on the device, where it becomes float: a quarter of the bytes travel."""
    with clock("transfer"):
        return to_device(batch, device)


@dataclass
class Feed:
    """The loader's batches, each with its trajectories ``[B, H, W, L, D]``, or of chosen places ``[B, K, L, D]``.

    On CUDA the next batch is moved and run through the backbone on a stream of its own while the present one trains.

    Attributes:
        writer: keeps new trajectories for later epochs; None without a cache.
    """

    loader: Iterable[ImageBatch]
    extractor: TrajectoryExtractor
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]]
    clock: Clock
    writer: CacheWriter | None = None

    def __iter__(self) -> Iterator[tuple[ImageBatch, torch.Tensor]]:
        batches = self._batches()
        if self.device.type == "cuda":
            return self._ahead(batches)
        return (self._run(batch) for batch in batches)

    def _batches(self) -> Iterator[ImageBatch]:
        batches = iter(self.loader)
        while True:
            with self.clock("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _ahead(self, batches: Iterator[ImageBatch]) -> Iterator[tuple[ImageBatch, torch.Tensor]]:
        stream = torch.cuda.Stream(self.device)
        # The weights were put on the device by the stream that trains.
        stream.wait_stream(torch.cuda.current_stream())
        waiting: tuple[ImageBatch, torch.Tensor, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(stream):
                following = (*self._run(batch), stream.record_event())
            if waiting:
                yield _hand_over(*waiting)
            waiting = following
        if waiting:
            yield _hand_over(*waiting)

    def _run(self, batch: ImageBatch) -> tuple[ImageBatch, torch.Tensor]:
        on_device = move(batch, self.device, self.clock)
        with self.clock("backbone"), self.autocast():
            return on_device, self._trajectories(batch, on_device)

    def _trajectories(self, batch: ImageBatch, on_device: ImageBatch) -> torch.Tensor:
        if batch.cached is not None:
            return self._completed(batch, on_device)
        if on_device.places is not None:
            return self.extractor.at(on_device.images, on_device.places)
        return self.extractor(on_device.images)

    @torch.no_grad()
    def _completed(self, batch: ImageBatch, on_device: ImageBatch) -> torch.Tensor:
        """What the cache has, and the rest from the backbone, all rounded alike: ``[B, K, L, D]``."""
        assert batch.cached is not None
        assert on_device.cached is not None
        known, places = on_device.cached, on_device.places
        out_BKLD = torch.zeros(len(batch.weights), *known.trajectories.shape[1:], device=on_device.weights.device)
        out_BKLD[known.hits] = known.trajectories.float()
        missing = len(batch.cached.misses)
        if missing == 0:
            return out_BKLD
        new_mPLD = self.extractor(on_device.images)[:missing].flatten(1, 2).bfloat16()
        if self.writer is not None:
            # The numbers are those on the host: nothing here waits for the device.
            self.writer.add(batch.cached.numbers, new_mPLD)
        chosen = new_mPLD if places is None else new_mPLD.take_along_dim(places[known.misses][..., None, None], 1)
        out_BKLD[known.misses] = chosen.float()
        return out_BKLD


def _hand_over(
    batch: ImageBatch, trajectories: torch.Tensor, ready: torch.cuda.Event
) -> tuple[ImageBatch, torch.Tensor]:
    """Make the stream that trains wait for what the other one made, and keep its memory until that is used."""
    current = torch.cuda.current_stream()
    current.wait_event(ready)
    for tensor in (trajectories, *(part for part in batch if isinstance(part, torch.Tensor))):
        tensor.record_stream(current)
    return batch, trajectories
