"""What the Python API accepts as pictures: file names, PIL images, arrays and tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from trajdist.data.decode import OVERSHOOT, decode, to_rgb, upright
from trajdist.data.storage import read_bytes
from trajdist.errors import DataError
from trajdist.files import user_path


def several(images: Any) -> Iterable[Any]:
    """Any number of pictures; a single one becomes a batch of one.

    Raises:
        DataError: neither a picture nor several.
    """
    if _is_one(images):
        return [images]
    try:
        return iter(images)
    except TypeError:
        kind = type(images).__name__
        raise DataError(f"images={images!r:.40} of type {kind} is not a picture or a list of them: pass one.") from None


def _is_one(images: Any) -> bool:
    """Whether this is a single picture, or the name of its file."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim in (2, 3)
    return isinstance(images, (Image.Image, str, Path))


def to_pil(image: Any, size: int) -> Image.Image:
    """Convert to upright RGB. A file is decoded as ``trajdist score`` does, for a square of ``size`` pixels.

    Raises:
        OSError: a file that cannot be read.
        DataError: an array or tensor that is not a picture.
    """
    if isinstance(image, Image.Image):
        return to_rgb(upright(image.copy()))
    if isinstance(image, (str, Path)):
        return decode(read_bytes(user_path(image), retries=0), size)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # NumPy has no bfloat16.
        pixels = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    else:
        pixels = np.asarray(image)
    if pixels.ndim not in (2, 3) or not pixels.size or (pixels.ndim == 3 and pixels.shape[2] > 4):
        kind = "tensors [3, H, W]" if isinstance(image, torch.Tensor) else "arrays [H, W, 3]"
        raise DataError(f"a picture of shape {list(np.shape(image))} cannot be used: pass {kind} or [H, W].")
    eight_bits = _checked_eight_bits(pixels)
    return to_rgb(Image.fromarray(eight_bits[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else eight_bits))


def _checked_eight_bits(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale floats from 0..1 and uint16 from its whole range; values out of range are refused, not wrapped."""
    if pixels.dtype.kind in "fb":
        pixels = pixels.astype(np.float32)
        low, high = pixels.min(), pixels.max()
        # Resampling overshoots a little; anything beyond was normalised, lies in 0..255 or is NaN.
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
            raise DataError(f"a picture of floats holds {low:.3g} to {high:.3g}: scale its values to 0..1.")
        return np.rint(pixels.clip(0, 1) * 255.0).astype(np.uint8)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        return np.rint(pixels / 257.0).astype(np.uint8)
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
        raise DataError(f"a picture of type {pixels.dtype} must hold integers from 0 to 255, or be uint16 or float.")
    return pixels.astype(np.uint8)
