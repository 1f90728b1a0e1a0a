"""The image source interface (an ordered list with random access from any process) and helpers for its subclasses."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from PIL import Image

from trajdist.data.decode import DIM, decode, is_dim

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Endings of pictures that are not read although users may expect it; files with any other ending need no mention.
OTHER_PICTURES = {".apng", ".arw", ".avif", ".cr2", ".dds", ".dng", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif"}
OTHER_PICTURES |= {".jp2", ".jpe", ".jpx", ".jxl", ".nef", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".qoi"}
OTHER_PICTURES |= {".sgi", ".tga"}

# How many images are looked at before a command begins.
FIRST_IMAGES = 4


class ImageSource(ABC):
    """An indexed list of images. Subclasses implement the abstract methods and may override the rest."""

    fingerprint: str
    """Hash of the names and their order, not of the contents."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of image ``index`` as shown to users, such as its path relative to the folder."""

    @abstractmethod
    def load(self, index: int, size: int | None) -> Image.Image:
        """Decode image ``index`` to RGB; ``size`` is a hint as for :func:`trajdist.data.decode.decode`.

        Raises:
            Exception: whatever reading or decoding raises.
        """

    def classes(self) -> npt.NDArray[np.int64] | None:
        """The class of each image, int64 ``[N]``; None if unknown."""
        return None

    def shard_sizes(self) -> list[int]:
        """Images per shard, in order; a single shard if random access is as cheap as sequential access."""
        return [len(self)]

    def scattered(self) -> ImageSource:
        """The same images, for a pass that reads a few from everywhere: no whole shard is fetched for them."""
        return self

    def version(self, index: int) -> int:
        """A positive int64 that changes with the contents of image ``index``, as far as file size and time reveal it.

        0 if that is unknown at the moment. By default, contents cannot change.
        """
        return 1

    def stamp(self) -> str | None:
        """Hash that changes with the contents, as far as file sizes and times reveal it; None if they cannot change."""
        return None


class EncodedSource(ImageSource):
    """A source whose images are encoded files."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded bytes of image ``index``.

        Raises:
            Exception: whatever the file system or the store raises.
        """

    def path(self, index: int) -> str:
        """The file's path within its folder or shard, including the class folder if there is one."""
        return self.name(index)

    def label(self, index: int) -> str | None:
        """The label that the image came with, as text; None if it has none, or only that of its folder."""
        return None

    def load(self, index: int, size: int | None) -> Image.Image:
        return decode(self.read(index), size)


class Names:
    """A list of names packed into one buffer (about 60 bytes per name) that worker processes share."""

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


def told_of_dim(source: ImageSource, numbers: Iterable[int]) -> str:
    """What to tell users if the images with these numbers can be read, and all of them are nearly black; else empty."""
    with suppress(Exception):  # Unreadable images are reported when it is their turn.
        if all(is_dim(source.load(number, None)) for number in numbers):
            return (
                f"the first images are nearly black (no value above {DIM} of 255): if they are a 12-bit camera's "
                "values in 16-bit files, multiply them by 16"
            )
    return ""


def numbered(classes: Iterable[str]) -> npt.NDArray[np.int64] | None:
    """Number the class names in order of first appearance, int64 ``[N]``; None if there are fewer than two classes."""
    numbers: dict[str, int] = {}
    found = np.fromiter((numbers.setdefault(name, len(numbers)) for name in classes), np.int64)
    return found if len(numbers) > 1 else None


def version_of(size: int, tag: int | str) -> int:
    """What :meth:`ImageSource.version` gives for a file of this size and modification time (or similar)."""
    digest = hashlib.sha256(f"{size} {tag}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") >> 1 or 1
