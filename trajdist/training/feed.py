"""Batches with their trajectories, from the cache if it has them, else from the backbone.

Shape suffixes: B images, P places, K chosen places, L steps, D channels of a trajectory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from trajdist.data.loader import ImageBatch
from trajdist.data.trajectory_cache import CacheWriter
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.runtime.clock import Clock
from trajdist.runtime.processes import to_device

Pair = tuple[ImageBatch, torch.Tensor]
# One batch of each stream, keyed by stream number.
Round = dict[int, ImageBatch]


@dataclass(frozen=True)
class Stream:
    """Batches of one image set.

    Attributes:
        loader: yields batches until the last epoch ends.
        writer: stores new trajectories for later epochs; None without a cache.
    """

    loader: Iterable[ImageBatch]
    writer: CacheWriter | None = None


class Branch:
    """The batches of one stream of a feed; closing it, at any time, stops further reading from that stream."""

    def __init__(self, feed: Feed, number: int) -> None:
        self._feed, self._number = feed, number

    def __iter__(self) -> Branch:
        return self

    def __next__(self) -> Pair:
        pair = self._feed.next_of(self._number)
        if pair is None:
            raise StopIteration
        return pair

    def close(self) -> None:
        self._feed.leave(self._number)


class Feed:
    """Pairs the batches of one or several streams with their trajectories, float32. Add all streams before reading.

    Trajectories are ``[B, H, W, L, D]``; with chosen places ``[B, K, L, D]``, and with a cache ``[B, P, L, D]`` for
    all places. With drawn defects there are ``2 B`` images, the clean ones first. One pass through the backbone serves
    one batch of every stream.

    On CUDA the next batches are copied and run through the backbone on a separate CUDA stream while the current ones
    are trained on.
    """

    def __init__(
        self,
        extractor: TrajectoryExtractor,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[None]],
        clock: Clock,
    ) -> None:
        self.streams: list[Stream] = []
        self._extractor, self._device, self._autocast, self._clock = extractor, device, autocast, clock
        self._waiting: list[deque[Pair]] = []
        self._left: set[int] = set()
        self._rounds = self._read()
        self._passes = self._ahead() if device.type == "cuda" else (self._run(batches) for batches in self._rounds)

    def add(self, stream: Stream) -> Branch:
        """The batches of one more stream. Consume several streams in turn, or batches pile up."""
        self.streams.append(stream)
        self._waiting.append(deque())
        return Branch(self, len(self.streams) - 1)

    def next_of(self, number: int) -> Pair | None:
        """The next batch of a stream, or None at its end."""
        waiting = self._waiting[number]
        return waiting.popleft() if waiting or self._advance(number) else None

    def leave(self, number: int) -> None:
        """Stop reading from a stream."""
        self._left.add(number)
        self._waiting[number].clear()

    def _advance(self, number: int) -> bool:
        """Run one more pass for all streams; returns whether this one has a batch now."""
        for stream, pair in next(self._passes, {}).items():
            if stream not in self._left:
                self._waiting[stream].append(pair)
        return bool(self._waiting[number])

    def close(self) -> None:
        """Stop the loaders and their workers, even in the middle of an epoch."""
        self._passes.close()
        self._rounds.close()

    def _read(self) -> Generator[Round, None, None]:
        """Yield the next batch of every stream that is neither exhausted nor closed."""
        open_streams = {number: iter(stream.loader) for number, stream in enumerate(self.streams)}
        while open_streams:
            found: Round = {}
            self._clock.look()
            for number in sorted(set(open_streams) - self._left):
                with self._clock("data"):
                    batch = next(open_streams[number], None)
                if batch is not None:
                    found[number] = batch
            open_streams = {number: open_streams[number] for number in found}
            if found:
                yield found

    def _ahead(self) -> Generator[dict[int, Pair], None, None]:
        """Yield each pass after launching the next one on a separate CUDA stream."""
        stream = torch.cuda.Stream(self._device)
        # The weights were copied to the device by the training stream.
        stream.wait_stream(torch.cuda.current_stream())
        waiting: tuple[dict[int, Pair], torch.cuda.Event] | None = None
        for batches in self._rounds:
            with torch.cuda.stream(stream):
                following = self._run(batches), stream.record_event()
            if waiting:
                yield _hand_over(*waiting)
            waiting = following
        if waiting:
            yield _hand_over(*waiting)

    def _run(self, batches: Round) -> dict[int, Pair]:
        moved = {}
        for number, batch in batches.items():
            with self._clock("transfer"):
                # Images are copied as uint8, a quarter of the bytes, and become float there.
                moved[number] = to_device(batch, self._device)
        with self._clock("backbone"), self._autocast():
            seen = dict(zip(moved, self._extract(list(moved.values())), strict=True))
            return {
                number: (moved[number], self._complete(self.streams[number], batch, moved[number], seen[number]))
                for number, batch in batches.items()
            }

    def _extract(self, batches: list[ImageBatch]) -> Sequence[torch.Tensor]:
        """Trajectories of the images of each batch, from one backbone pass. A cache stores those of all places."""
        counts = [len(batch.images) for batch in batches]
        images = batches[0].images if len(batches) == 1 else torch.cat([batch.images for batch in batches])
        places = [batch.places for batch in batches if batch.places is not None and batch.cached is None]
        if len(images) and places:
            return self._extractor.at(images, torch.cat(places)).split(counts)
        if len(images):
            return self._extractor(images).split(counts)
        return [images] * len(batches)

    @torch.no_grad()
    def _complete(self, stream: Stream, batch: ImageBatch, on_device: ImageBatch, seen: torch.Tensor) -> torch.Tensor:
        """Merge cached trajectories with those just extracted (``seen``), all rounded to bfloat16: ``[B, K, L, D]``.

        Without a cache, ``seen`` is returned unchanged.
        """
        if batch.cached is None:
            return seen
        assert on_device.cached is not None
        known, places = on_device.cached, on_device.places
        out_BKLD = torch.zeros(len(batch.weights), *known.trajectories.shape[1:], device=on_device.weights.device)
        out_BKLD[known.hits] = known.trajectories.float()
        missing = len(batch.cached.misses)
        if missing == 0:
            return out_BKLD
        new_mPLD = seen[:missing].flatten(1, 2).bfloat16()
        # The host's copy of the numbers: reading the device's would synchronise with it.
        if stream.writer and stream.writer.add(batch.cached.numbers, batch.cached.versions, new_mPLD):
            self._clock.waited()
        chosen = new_mPLD if places is None else new_mPLD.take_along_dim(places[known.misses][..., None, None], 1)
        out_BKLD[known.misses] = chosen.float()
        return out_BKLD


def _hand_over(pairs: dict[int, Pair], ready: torch.cuda.Event) -> dict[int, Pair]:
    """Make the training stream wait for the other stream's tensors, and keep their memory until it has used them."""
    current = torch.cuda.current_stream()
    current.wait_event(ready)
    for batch, trajectories in pairs.values():
        for tensor in (trajectories, *(part for part in batch if isinstance(part, torch.Tensor))):
            tensor.record_stream(current)
    return pairs
