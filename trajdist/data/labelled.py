"""Labelled images in the layout of MVTec AD (Bergmann et al. 2019).

``test/good/*`` (or ``test/ok/*``, as in BTAD), ``test/<defect>/*``, and the masks
``ground_truth/<defect>/<stem>_mask.png`` or ``<stem>.png``, whose non-zero pixels are defective. As in MVTec LOCO AD
(Bergmann et al. 2022) ``<stem>`` may be a folder of masks, which are taken together. Without a folder ``ground_truth``
only whole images are labelled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops

from trajdist.data.base import EXTENSIONS, OTHER_PICTURES, EncodedSource
from trajdist.data.decode import Fit, cut_out, open_image, reason, upright
from trajdist.data.regions import Doubles, Mask, region_shares
from trajdist.data.sources import GOOD_FOLDERS, ImageFolder
from trajdist.data.storage import read_bytes
from trajdist.errors import DataError, os_errors
from trajdist.files import user_path

GOOD = "good"
# Formats without loss: in a JPEG pixels that are clean differ from zero.
MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff")
# EXIF orientations that exchange width and height.
LYING = {5, 6, 7, 8}
LAYOUT = "test/good/*, test/<defect>/* and, if pixels are labelled, ground_truth/<defect>/<name>_mask.png"


class Truth(NamedTuple):
    """What is defective in an image, at the size of its map.

    Attributes:
        mask_SS: bool, resampled by nearest neighbour: a fair sample of the pixels, though thin defects may vanish.
        regions_SS: float64, of :func:`trajdist.data.regions.region_shares`, in which no region is lost.
    """

    mask_SS: Mask
    regions_SS: Doubles


class LabelledFolder(EncodedSource):
    """The test images, sorted by path, with their defect kinds and masks.

    Args:
        path: the folder that contains ``test`` and ``ground_truth``, as the user wrote it.
        key: the argument that it came from, for error messages.
        read_retries: how often a read is retried after a transient I/O error.

    Attributes:
        kinds: "good", then the defects in alphabetical order.
        has_masks: whether there is a folder ground_truth.

    Raises:
        DataError: not a local folder, no test folder, no good images, an image that is not directly in a class
            folder, or, if there is a folder ground_truth, a defect image without a mask of its own.
    """

    def __init__(self, path: str | Path, key: str, read_retries: int = 0) -> None:
        root = user_path(path)
        if "://" in str(path):
            raise DataError(f"{key}={str(path)!r} is not a local folder: copy it to one that holds {LAYOUT}.")
        if not os.path.isdir(root / "test"):
            raise DataError(f"{key}={str(root)!r} has no folder test: name the folder that holds {LAYOUT}.")
        self._root, self._retries = root, read_retries
        self._images = ImageFolder(root / "test", key, read_retries)
        self.fingerprint = self._images.fingerprint
        folders: set[str] = set()
        for index in range(len(self)):
            parts = PurePath(self.name(index)).parts
            if len(parts) != 3:
                raise DataError(f"{self._shown(index)} is not directly in a class folder: the layout is {LAYOUT}.")
            folders.add(parts[1])
        clean = folders & GOOD_FOLDERS
        if len(clean) != 1:
            found = "images in test/good and in test/ok" if clean else "no images in test/good or test/ok"
            raise DataError(f"{key}={str(root)!r} has {found}: put all clean images into one of them.")
        self.kinds = [GOOD, *sorted(folders - clean)]
        self.has_masks = os.path.isdir(root / "ground_truth")
        if not self.has_masks:
            # Where some processes see masks and others do not, defects would count as clean pixels.
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} without masks".encode()).hexdigest()
        self._masks = {kind: _files_in(root / "ground_truth" / kind) for kind in self.kinds[1:]}
        self._refuse_shared_masks()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The path relative to the root, such as ``test/crack/003.png``."""
        return os.path.join("test", self._images.name(index))

    def read(self, index: int) -> bytes:
        return self._images.read(index)

    def version(self, index: int) -> int:
        return self._images.version(index)

    def stamp(self) -> str:
        return self._images.stamp()

    def kind(self, index: int) -> str:
        """ "good" or the name of the defect."""
        folder = PurePath(self.name(index)).parts[1]
        return GOOD if folder in GOOD_FOLDERS else folder

    def has_mask(self, index: int) -> bool:
        """Whether there is a mask: not for good images, and for none without a folder ground_truth."""
        return self.has_masks and self.kind(index) != GOOD

    def mask(self, index: int, size: int, fit: Fit) -> Mask:
        """The mask of :meth:`truth`, without the work for its regions."""
        return _nearest(self._cut_mask(index, fit), size)

    def truth(self, index: int, size: int, fit: Fit) -> Truth:
        """What is defective, resized like the loader resizes the image, so that the two align.

        Nothing is in a good image, and where there are no masks.

        Raises:
            DataError: the mask or its image cannot be read, or the mask has another aspect ratio than its image.
        """
        mask = self._cut_mask(index, fit)
        return Truth(_nearest(mask, size), region_shares(np.asarray(mask) > 0, size))

    def _cut_mask(self, index: int, fit: Fit) -> Image.Image:
        """What is used of the mask, at its own size; a single black pixel if there is none."""
        if not self.has_mask(index):
            return Image.new("L", (1, 1))
        path = self._mask_path(index)
        with _reading("mask", path):
            mask = _united([_read_mask(read_bytes(part, self._retries)) for part in _mask_files(path)])
        image = self._root / self.name(index)
        with _reading("image", image):
            (width, height), turned = _upright_size(read_bytes(image, self._retries))
        # A mask may have another scale than its image, with sides rounded to whole pixels.
        if 2 * abs(mask.width * height - mask.height * width) > width + height:
            fix = ": give the mask its image's shape."
            if turned and mask.size == (height, width):
                fix = " once it is upright by its EXIF orientation: turn the mask in the same way."
            raise DataError(
                f"the mask {str(path)!r} is {mask.width} x {mask.height} pixels but its image {width} x {height}{fix}"
            )
        return cut_out(mask, fit)

    def _mask_path(self, index: int) -> Path:
        """The file or folder of masks of a defective image."""
        kind, stem = self.kind(index), PurePath(self.name(index)).stem
        folder = self._root / "ground_truth" / kind
        for name in (f"{stem}{end}{extension}" for end in ("_mask", "") for extension in MASK_EXTENSIONS):
            if name in self._masks[kind]:
                return folder / self._masks[kind][name]
        if stem in self._masks[kind] and os.path.isdir(folder / stem):
            return folder / stem
        wanted = str(folder / f"{stem}_mask.png")
        raise DataError(
            f"{self._shown(index)} has no mask: add {wanted!r}, or move ground_truth away to measure images only."
        )

    def _refuse_shared_masks(self) -> None:
        image_of: dict[Path, int] = {}
        for index in filter(self.has_mask, range(len(self))):
            path = self._mask_path(index)
            if path in image_of:
                raise DataError(
                    f"{self._shown(image_of[path])} and {self._shown(index)} share the mask {str(path)!r}: "
                    "rename one image and give it a mask of its own."
                )
            image_of[path] = index

    def _shown(self, index: int) -> str:
        return repr(str(self._root / self.name(index)))


@contextmanager
def _reading(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Hostile bytes make decoders raise anything.
        raise DataError(f"the {what} {str(path)!r} cannot be read ({reason(error)}): restore it.") from None


def _nearest(mask: Image.Image, size: int) -> Mask:
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0


def _files_in(folder: Path) -> dict[str, str]:
    """Names by themselves and with their extensions in lower case.

    One listing: a stat per file is slow on network file systems.
    """
    if not os.path.isdir(folder):
        return {}
    with os_errors(f"the folder {str(folder)!r} cannot be listed", fix="make it readable", kind=DataError):
        names = sorted(os.listdir(folder))
    return {PurePath(name).stem + PurePath(name).suffix.lower(): name for name in names} | {
        name: name for name in names
    }


def _mask_files(path: Path) -> list[Path]:
    """The file itself, or the masks in the folder.

    Raises:
        ValueError: the folder holds pictures in a format that is none of a mask, or folders.
    """
    if not path.is_dir():
        return [path]
    inside = sorted(each for each in path.iterdir() if each.name[0] != ".")
    masks: list[Path] = []
    for each in inside:
        if each.suffix.lower() in MASK_EXTENSIONS:
            masks.append(each)
        elif each.suffix.lower() in {*EXTENSIONS, *OTHER_PICTURES} or each.is_dir():
            raise ValueError(f"{each.name!r} in it is no mask: {', '.join(MASK_EXTENSIONS)} count")
    return masks


def _united(masks: list[Image.Image]) -> Image.Image:
    """What is marked in any of the masks."""
    if len({mask.size for mask in masks}) != 1:
        raise ValueError(f"{len(masks)} masks of different sizes" if masks else "a folder without masks")
    return reduce(ImageChops.lighter, masks)


def _upright_size(raw: bytes) -> tuple[tuple[int, int], bool]:
    """Width and height of what :func:`trajdist.data.decode.decode` would return, from the header alone.

    Returns:
        That size, and whether the file has width and height exchanged.
    """
    with open_image(raw) as image:
        lies_on_its_side = False
        with suppress(Exception):  # Damaged metadata; see decode.
            lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in LYING
        if image.format == "TIFF":
            image.load()  # Pillow turns TIFFs upright itself, the size before the pixels and the tag.
            return image.size, lies_on_its_side
        width, height = image.size
    return ((height, width) if lies_on_its_side else (width, height)), lies_on_its_side


def _read_mask(raw: bytes) -> Image.Image:
    """An 8-bit grey image, 255 where any channel is non-zero; alpha is ignored."""
    with open_image(raw) as image:
        mask = upright(image)
    # Leave high-bit-depth greys alone: converting them to 8 bits would round small values to 0.
    if mask.mode not in ("1", "L", "I", "F") and not mask.mode.startswith("I;16"):
        mask = mask.convert("RGB")
    marked = np.asarray(mask) > 0
    return Image.fromarray((marked.any(-1) if marked.ndim == 3 else marked).astype(np.uint8) * 255)
