"""The files of a scoring: rows in input order, raw maps, names of pictures.

Shape suffixes: N images, H W grid.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trajdist.artifacts import fingerprint
from trajdist.errors import ArtifactError, os_errors
from trajdist.files import exists, open_regular, replacing, sync_contents, write_at
from trajdist.scoring.pictures import Floats

Row = dict[str, Any]
# Required in every row: its readers rely on them.
REQUIRED = frozenset(("image", "score", "p_value", "is_anomalous"))
Placed = tuple[int, Row]


def read_rows(out: Path) -> Iterator[Row]:
    """The rows of scores.jsonl, one after another.

    Raises:
        ArtifactError: a line is not a row.
    """
    path = out / "scores.jsonl"
    with open(path, "rb", opener=open_regular) as handle:
        for number, line in enumerate(handle, start=1):
            row = _parse(line)
            if row is None:
                raise ArtifactError(f"{str(path)!r} is damaged in line {number}: restore it, or name another --out.")
            yield row


def _parse(line: bytes) -> Row | None:
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and row.keys() >= REQUIRED and _is_whole(row):
            return row
    return None


def _is_whole(row: Row) -> bool:
    """Whether a row has a score and a p-value, or else the reason why not."""
    figures = row["score"], row["p_value"]
    return all(isinstance(figure, (int, float)) for figure in figures) or (figures == (None, None) and "error" in row)


def count_rows(out: Path) -> int:
    """Number of complete lines in scores.jsonl; 0 if there is no such file."""
    rows = out / "scores.jsonl"
    if not exists(rows):
        return 0
    with open(rows, "rb") as handle:
        return sum(line.endswith(b"\n") for line in handle)


def keep_rows(out: Path, count: int) -> None:
    """Truncate scores.jsonl, if it exists, after the first ``count`` lines."""
    rows = out / "scores.jsonl"
    if exists(rows):
        with open(rows, "rb") as handle:
            kept = sum(len(line) for line in islice(handle, count))
        os.truncate(rows, kept)


def replace_rows(out: Path, rows: Mapping[int, Row]) -> None:
    """Replace the rows at these positions, atomically."""
    path = out / "scores.jsonl"
    with replacing(path) as new, open(path, encoding="utf-8") as lines, open(new, "w", encoding="utf-8") as handle:
        for position, line in enumerate(lines):
            handle.write(json.dumps(rows[position]) + "\n" if position in rows else line)


def failed_positions(out: Path) -> list[int]:
    """Positions, in input order, of the images that could not be read."""
    return [position for position, row in enumerate(read_rows(out)) if row["score"] is None]


def scored_rows(out: Path) -> Iterator[Placed]:
    """Position and row of the images that could be read."""
    return (item for item in enumerate(read_rows(out)) if item[1]["score"] is not None)


def most_anomalous(rows: Iterable[Placed], count: int) -> list[Placed]:
    """Those with the largest scores, in constant memory."""
    return heapq.nlargest(count, rows, key=lambda item: item[1]["score"])


def least_anomalous(rows: Iterable[Placed], count: int) -> list[Placed]:
    """Those with the smallest scores."""
    return heapq.nsmallest(count, rows, key=lambda item: item[1]["score"])


def unreadable(out: Path, most: int) -> tuple[list[Row], int]:
    """The rows of the first images that could not be read, and how many there are in all."""
    rows: list[Row] = []
    count = 0
    for row in read_rows(out):
        if row["score"] is None:
            count += 1
            rows += [row] * (count <= most)
    return rows, count


def picture_name(image: str) -> str:
    """A flat file name that is unique for the image's path: ``a/b.jpg`` -> ``a__b.jpg``."""
    # A name that does not come from a file system may hold a NUL.
    flat = image.replace("_", "_u").replace("/", "__").replace("\\", "_b").replace("\0", "_0")
    # Most file systems allow 255 bytes; the hash keeps shortened names apart.
    raw = os.fsencode(flat)
    return flat if len(raw) <= 200 else f"{raw[:150].decode(errors='ignore')}-{fingerprint({}, {'text': image})[:16]}"


class MapsFile:
    """``maps.safetensors``: one float32 tensor ``maps`` ``[N, H, W]``, filled in place, NaN where an image failed.

    One process writes, between :meth:`open` and :meth:`close`; all may read.

    Attributes:
        is_there: whether there is an earlier process's file to continue.
    """

    def __init__(self, path: Path, count: int, side: int) -> None:
        self._path, self._shape = path, (count, side, side)
        entry = {"dtype": "F32", "shape": self._shape, "data_offsets": [0, count * side * side * 4]}
        header = json.dumps({"maps": entry}).encode()
        header += b" " * (-len(header) % 8)
        self._prefix = len(header).to_bytes(8, "little") + header
        self._size = len(self._prefix) + count * side * side * 4
        self._descriptor: int | None = None

    @property
    def is_there(self) -> bool:
        return self._path.is_file() and self._path.stat().st_size == self._size

    def open(self) -> None:
        """Create the file unless it is there; called by one process only."""
        if not self.is_there:
            with open(self._path, "wb") as handle:
                handle.write(self._prefix)
                handle.truncate(self._size)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, maps: list[tuple[int, Floats | None]]) -> None:
        """Fill in maps by position; they are on the disk when this returns.

        Written, not memory-mapped: a full disk would kill a process that maps the file.
        """
        assert self._descriptor is not None
        failed_HW = np.full(self._shape[1:], np.nan, np.float32)
        for position, cells_HW in maps:
            whole_HW = np.ascontiguousarray(failed_HW if cells_HW is None else cells_HW, np.float32)
            write_at(self._descriptor, whole_HW.data, len(self._prefix) + position * whole_HW.nbytes)
        sync_contents(self._descriptor)

    def read(self, start: int, stop: int) -> Floats:
        """The maps at positions ``[start, stop)``, float32 ``[B, H, W]``.

        Raises:
            ArtifactError: the file cannot be read, or has become shorter.
        """
        side, fix = self._shape[1], "let all machines see the same folder, and run the same command again"
        with os_errors(f"{str(self._path)!r} cannot be read", fix=fix), open(self._path, "rb") as handle:
            handle.seek(len(self._prefix) + start * side**2 * 4)
            maps = np.fromfile(handle, np.float32, (stop - start) * side**2)
            if len(maps) < (stop - start) * side**2:
                raise OSError("it is too short")
        return maps.reshape(-1, side, side)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
