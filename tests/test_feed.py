"""The feed: one pass through the backbone for several streams, and nothing read for a stream that is closed."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from trajdist.data.loader import ImageBatch
from trajdist.runtime.clock import Clock
from trajdist.training.feed import Branch, Feed, Stream

CPU = torch.device("cpu")


class Extractor:
    """One number of each image."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        return images[:, :1, 0, 0].float()


def batches(count: int, first: int) -> list[ImageBatch]:
    values = range(first, first + count)
    return [
        ImageBatch(torch.full((2, 3, 4, 4), value, dtype=torch.uint8), torch.ones(2), torch.zeros(()), [])
        for value in values
    ]


def feed_of(*streams: list[ImageBatch]) -> tuple[list[Branch], Extractor]:
    extractor = Extractor()
    made = Feed(extractor, CPU, nullcontext, Clock(CPU))
    return [made.add(Stream(loader)) for loader in streams], extractor


def test_each_stream_gets_its_own_from_one_pass():
    (one, two), extractor = feed_of(batches(3, 10), batches(2, 20))
    found = [(next(one)[1].tolist(), next(two)[1].tolist()) for _ in range(2)]
    assert found == [([[10.0]] * 2, [[20.0]] * 2), ([[11.0]] * 2, [[21.0]] * 2)]
    assert next(one)[1].tolist() == [[12.0]] * 2
    assert next(two, None) is None
    assert extractor.seen == [4, 4, 2]


def test_a_stream_that_was_closed_before_it_began_is_not_read():
    """As of a domain that had stopped early when its run was killed."""
    (one, two), extractor = feed_of(batches(3, 10), batches(3, 20))
    two.close()
    assert len(list(one)) == 3
    assert extractor.seen == [2, 2, 2]
