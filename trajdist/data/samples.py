"""Photographs and textures shipped in scikit-image's wheel: a built-in dataset that needs no download.

``skimage:photos`` is crops of colour photographs; ``skimage:gravel``, ``skimage:grass`` and ``skimage:brick`` are crops
of a single texture. Crops come from the left 70 % of a picture; with ``/heldout`` appended, from the right 30 %, which
no training crop overlaps.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from PIL import Image

from trajdist.data.base import ImageSource
from trajdist.data.decode import to_rgb
from trajdist.errors import DataError
from trajdist.sharding import key64, mix64

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")
TEXTURES = {name: (f"{name}.png",) for name in ("gravel", "grass", "brick")}
COLLECTIONS = {"photos": PHOTOS, **TEXTURES}
CROPS_PER_PICTURE = {"photos": 40, "gravel": 120, "grass": 120, "brick": 120}
HELDOUT_CROPS_PER_PICTURE = {"photos": 6, "gravel": 36, "grass": 36, "brick": 36}
TRAIN_SHARE = 0.7


class SamplePhotos(ImageSource):
    """Square crops, each a pure function of its index.

    Args:
        path: one of the names above.
        key: the config key or argument that it came from, for error messages.

    Raises:
        DataError: an unknown name, or scikit-image is not installed.
    """

    def __init__(self, path: str, key: str) -> None:
        collection, _, part = path.removeprefix("skimage:").partition("/")
        if collection not in COLLECTIONS or part not in ("", "heldout"):
            choices = ", ".join(f"skimage:{name}" for name in COLLECTIONS)
            raise DataError(f"{key}={path!r} is not a sample set: choose {choices}, or one of these with /heldout.")
        try:
            import skimage.data  # noqa: F401
        except ImportError:
            raise DataError(f"{key}={path!r} needs scikit-image: pip install 'trajdist[quickstart]'.") from None
        self._collection, self._heldout = collection, part == "heldout"
        per_picture = HELDOUT_CROPS_PER_PICTURE if self._heldout else CROPS_PER_PICTURE
        self._crops = per_picture[collection]
        self.fingerprint = hashlib.sha256(f"{path}:{len(self)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(COLLECTIONS[self._collection]) * self._crops

    def name(self, index: int) -> str:
        picture, crop = divmod(index, self._crops)
        stem = COLLECTIONS[self._collection][picture].rsplit(".", 1)[0]
        return f"{stem}-{'heldout-' if self._heldout else ''}{crop:03d}.png"

    def load(self, index: int, size: int | None) -> Image.Image:
        picture, crop = divmod(index, self._crops)
        image = _picture(COLLECTIONS[self._collection][picture])
        return image.crop(self._box(image.size, picture, crop))

    def _box(self, picture_size: tuple[int, int], picture: int, crop: int) -> tuple[int, int, int, int]:
        """A random square within this split's part of the picture; both splits use the same distribution of sizes."""
        width, height = picture_size
        border = round(width * TRAIN_SHARE)
        left, right = (border, width) if self._heldout else (0, border)
        largest = min(width - border, height)
        smallest = round(0.75 * largest)
        draws = mix64(np.arange(3, dtype=np.uint64) + np.uint64(key64(picture, crop, self._heldout)))
        side_draw, x_draw, y_draw = (int(draw) for draw in draws)
        side = smallest + side_draw % (largest - smallest + 1)
        x = left + x_draw % (right - left - side + 1)
        y = y_draw % (height - side + 1)
        return x, y, x + side, y + side


@functools.lru_cache(maxsize=8)
def _picture(file: str) -> Image.Image:
    from importlib import resources

    with resources.files("skimage").joinpath("data", file).open("rb") as handle:
        image = Image.open(handle)
        image.load()
    return to_rgb(image)
