"""The files of a scoring: rows in input order, raw maps, names of pictures.

Shape suffixes: N images, H W grid.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trajdist.artifacts import fingerprint
from trajdist.pictures import Floats

Row = dict[str, Any]


def read_rows(out: Path) -> Iterator[Row]:
    """The lines of scores.jsonl, one after another."""
    with open(out / "scores.jsonl", encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def most_anomalous(out: Path, count: int) -> list[tuple[int, Row]]:
    """Position and row of the images with the largest scores, in constant memory."""
    return heapq.nlargest(count, _scored_rows(out), key=lambda item: item[1]["score"])


def least_anomalous(out: Path, count: int) -> list[tuple[int, Row]]:
    """Position and row of the images with the smallest scores."""
    return heapq.nsmallest(count, _scored_rows(out), key=lambda item: item[1]["score"])


def _scored_rows(out: Path) -> Iterator[tuple[int, Row]]:
    return ((position, row) for position, row in enumerate(read_rows(out)) if row["score"] is not None)


def picture_name(image: str) -> str:
    """A flat file name that is unique for the image's path: ``a/b.jpg`` -> ``a__b.jpg``."""
    flat = image.replace("_", "_u").replace("/", "__").replace("\\", "__")
    # Most file systems allow 255 bytes; the hash keeps shortened names apart.
    return flat if len(flat.encode()) <= 200 else f"{flat.encode()[:150].decode(errors='ignore')}-{hash_of(image)[:16]}"


def hash_of(text: str) -> str:
    return fingerprint({}, {"text": text})


class MapsFile:
    """``maps.safetensors``: one float32 tensor ``maps`` ``[N, H, W]``, filled in place, NaN where an image failed."""

    def __init__(self, path: Path, count: int, side: int, writes: bool) -> None:
        self._maps: np.memmap[Any, np.dtype[np.float32]] | None = None
        if not writes:
            return
        shape = (count, side, side)
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, count * side * side * 4]}
        header = json.dumps({"maps": entry}).encode()
        header += b" " * (-len(header) % 8)
        prefix = len(header).to_bytes(8, "little") + header
        total = len(prefix) + count * side * side * 4
        if not path.exists() or path.stat().st_size != total:
            with open(path, "wb") as handle:
                handle.write(prefix)
                handle.truncate(total)
        self._maps = np.memmap(path, np.float32, "r+", offset=len(prefix), shape=shape)

    def write(self, maps: list[tuple[int, Floats | None]]) -> None:
        assert self._maps is not None
        for position, cells_HW in maps:
            self._maps[position] = np.nan if cells_HW is None else cells_HW

    def close(self) -> None:
        if self._maps is not None:
            self._maps.flush()
        self._maps = None
