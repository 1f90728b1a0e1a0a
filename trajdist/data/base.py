"""What a source of images is: a numbered, ordered list that any process can read at random; and what sources share."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from trajdist.data.decode import decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class ImageSource(ABC):
    """A numbered list of images. What has a body here need not be written again."""

    fingerprint: str
    """Changes when the list does: names and order, not contents."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What people call image ``index``: its path below the folder."""

    @abstractmethod
    def load(self, index: int, size: int | None) -> Image.Image:
        """Decode image ``index`` to RGB; ``size`` is a hint as for :func:`trajdist.data.decode.decode`."""

    def classes(self) -> npt.NDArray[np.int64] | None:
        """The class of each image, ``[N]``; None where nobody knows."""
        return None

    def shard_sizes(self) -> list[int]:
        """Images in each shard, in order; one shard where reading at random costs no more."""
        return [len(self)]

    def stamp(self) -> str | None:
        """Changes when contents do, as far as sizes and times tell; None where they never do."""
        return None


class EncodedSource(ImageSource):
    """A source of image files."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of image ``index``, as it is."""

    def path(self, index: int) -> str:
        """Where that file is within its folder or shard: its class, if it has one, and its own name."""
        return self.name(index)

    def load(self, index: int, size: int | None) -> Image.Image:
        return decode(self.read(index), size)


class Names:
    """A million names in one buffer (about 60 bytes each), which worker processes share."""

    def __init__(self, names: Iterable[str]) -> None:
        buffer, digest = bytearray(), hashlib.sha256()
        ends: list[int] = []
        for name in names:
            encoded = os.fsencode(name)
            digest.update(b"\0" + encoded if ends else encoded)
            buffer += encoded
            ends.append(len(buffer))
        self._buffer, self._ends = bytes(buffer), np.array(ends, np.int64)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._buffer[start : int(self._ends[index])])


def numbered(classes: Iterable[str]) -> npt.NDArray[np.int64] | None:
    """Classes by number, in order of appearance; None where all are of one class."""
    numbers: dict[str, int] = {}
    found = np.fromiter((numbers.setdefault(name, len(numbers)) for name in classes), np.int64)
    return found if len(numbers) > 1 else None
