"""Where images come from. A source is a numbered, ordered list of images that any process can read at random."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from trajdist.data.decode import decode
from trajdist.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENETUNREACH}


class ImageSource(Protocol):
    """A numbered list of images."""

    fingerprint: str
    """Changes when the list does: names and order, not contents."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What people call image ``index``: its path below the folder."""
        ...

    def load(self, index: int, size: int | None) -> Image.Image:
        """Decode image ``index`` to RGB; ``size`` is a hint as for :func:`trajdist.data.decode.decode`."""
        ...


def open_source(path: str | None, key: str, read_retries: int = 0) -> ImageSource:
    """The source that ``path`` names; ``key`` is the config key or argument it came from, for the error.

    Raises:
        DataError: nothing there, or no images in it.
    """
    if not path:
        raise DataError(f"{key} is not set: name a folder of images, as in {key}=/data/images.")
    if path.startswith("skimage:"):
        from trajdist.data.samples import SamplePhotos

        return SamplePhotos(path, key)
    return ImageFolder(Path(path).expanduser(), key, read_retries)


class ImageFolder:
    """All image files below a folder, with or without class folders, sorted by path; or one image file.

    A million names are kept in one buffer (about 60 bytes each), which worker processes share.
    """

    def __init__(self, root: Path, key: str, read_retries: int = 0) -> None:
        if not root.exists():
            raise DataError(f"{key}={str(root)!r} does not exist: name a folder of images.")
        self._root = root if root.is_dir() else root.parent
        self._retries = read_retries
        names = _list_images(root) if root.is_dir() else [root.name]
        if not names:
            raise DataError(f"{key}={str(root)!r} holds no images: files that end in {', '.join(EXTENSIONS)} count.")
        encoded = [os.fsencode(name) for name in names]
        self._buffer = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded])
        self.fingerprint = hashlib.sha256(b"\0".join(encoded)).hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._buffer[start : int(self._ends[index])])

    def load(self, index: int, size: int | None) -> Image.Image:
        return decode(read_bytes(self._root / self.name(index), self._retries), size)


def _list_images(root: Path) -> list[str]:
    """Paths below ``root``, sorted; linked folders are followed, once each."""
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative + os.sep
        names += [prefix + name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(names)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"the folder {error.filename!r} cannot be listed ({error.strerror}): make it readable.") from None


def read_bytes(path: Path, retries: int) -> bytes:
    """Read a file; an I/O error of the passing kind is tried again with growing pauses."""
    for attempt in range(retries + 1):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno not in PASSING_ERRORS or attempt == retries:
                raise
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def open_sets(wanted: dict[str, str | None], read_retries: int) -> dict[str, ImageSource]:
    """Open several sets, given as ``{"imagenet": path}``, for the keys ``data.imagenet.path`` and so on."""
    return {name: open_source(path, f"data.{name}.path", read_retries) for name, path in wanted.items()}
