"""Images made ready for ``trajdist pack``: read, and scaled down if asked, by worker processes, in order."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from trajdist.data.base import EXTENSIONS, EncodedSource
from trajdist.data.decode import decode, open_image, reason
from trajdist.errors import DataError, TrainingError, one_line

CHUNK = 4  # images per worker task
AHEAD_BYTES = 2**29  # of images waiting to be written
FIRST = 2  # tasks submitted until one of them shows how large images are


@dataclass(frozen=True)
class Options:
    """How shards are written.

    Attributes:
        shard_bytes: maximum shard size, not counting extended headers and tar's final padding; a larger image gets a
            shard of its own.
        short_side: images with a longer short side are scaled down to it, in pixels; None keeps all files unchanged.
        quality: JPEG quality of the scaled images.
    """

    shard_bytes: int = 2**28
    short_side: int | None = None
    quality: int = 95


class Packed(NamedTuple):
    """An image ready to be written.

    Attributes:
        name: its path within the source, with the extension ``.jpg`` if it was scaled.
        content: the encoded image.
        source_bytes: size of the source file.
        problem: why an image that should have been scaled is packed unchanged; None if there was no problem.
    """

    name: str
    content: bytes
    source_bytes: int
    problem: str | None


def prepared(source: EncodedSource, options: Options, start: int, stop: int, workers: int) -> Iterator[Packed]:
    """Images ``start`` to ``stop - 1``, in order; a bounded number is prepared ahead.

    Raises:
        DataError: a file cannot be read.
        TrainingError: a worker process was killed.
    """
    parts = (range(first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK))
    if workers < 2 or stop - start <= CHUNK:
        for part in parts:
            yield from _prepare(source, options, part)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (source, options)) as pool:
        try:
            yield from _in_order(pool, parts, 2 * workers)
        except BrokenProcessPool:
            raise TrainingError("a packing process was killed (out of memory?): run the same command again.") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, parts: Iterator[range], ahead: int) -> Iterator[Packed]:
    """Results in order. Each waiting task, finished or not, counts as large as the largest so far."""
    waiting: deque[Future[list[Packed]]] = deque()
    largest = 0
    for part in parts:
        waiting.append(pool.submit(_work, part))
        while len(waiting) >= (max(1, min(ahead, AHEAD_BYTES // largest)) if largest else FIRST):
            images = waiting.popleft().result()
            largest = max(largest, sum(len(image.content) for image in images))
            yield from images
    while waiting:
        yield from waiting.popleft().result()


_job: tuple[EncodedSource, Options]


def _start_worker(source: EncodedSource, options: Options) -> None:
    global _job
    _job = source, options
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent dies: otherwise workers would wait for ever, as each keeps the others' queue open."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(part: range) -> list[Packed]:
    return _prepare(*_job, part)


def _prepare(source: EncodedSource, options: Options, part: range) -> list[Packed]:
    return [_prepare_one(source, options, index) for index in part]


def _prepare_one(source: EncodedSource, options: Options, index: int) -> Packed:
    try:
        raw = source.read(index)
    except Exception as error:  # Every store has its own errors.
        why = one_line(error) or type(error).__name__
        raise DataError(f"{source.name(index)!r} cannot be read ({why}): restore it or remove it.") from None
    name = source.path(index)
    if not name.lower().endswith(EXTENSIONS):  # Readers of shards know an image by its ending.
        name += _ending(raw)
    if options.short_side is None:
        return Packed(name, raw, len(raw), None)
    try:
        scaled = _scaled(raw, options.short_side, options.quality)
    except Exception as error:  # Decoders can raise anything on malformed bytes. Training reports it too.
        return Packed(name, raw, len(raw), reason(error))
    if scaled is None:
        return Packed(name, raw, len(raw), None)
    return Packed(f"{name.rpartition('.')[0]}.jpg", scaled, len(raw), None)


def _ending(raw: bytes) -> str:
    """The usual ending of an encoded image; that of a JPEG if it cannot be read."""
    with suppress(Exception), open_image(raw) as image:
        ending = f".{str(image.format).lower()}"
        return ending if ending in EXTENSIONS else ".jpg"
    return ".jpg"


def _scaled(raw: bytes, short_side: int, quality: int) -> bytes | None:
    """The image as a JPEG scaled to this short side; None if it is not larger than that."""
    image = decode(raw, short_side)
    short = min(image.size)
    if short <= short_side:
        return None
    size = [max(1, round(side * short_side / short)) for side in image.size]
    content = io.BytesIO()
    image.resize((size[0], size[1]), Image.Resampling.BICUBIC).save(content, "JPEG", quality=quality)
    return content.getvalue()
