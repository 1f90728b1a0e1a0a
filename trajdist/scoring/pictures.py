"""Renders anomaly maps: the image, the map overlaid on it and a colour bar, side by side.

Shape suffixes: S pixels per side, K colours, L steps.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Dark to bright through red with uniformly increasing lightness: readable for colour-blind users and in greyscale.
_ANCHORS_K3 = np.array(
    [[6, 4, 24], [58, 12, 96], [126, 30, 108], [190, 55, 82], [236, 104, 37], [251, 166, 24], [252, 255, 164]],
    np.float64,
)
# Finer than 8-bit colour can resolve.
_SHADES = 1024
_POSITIONS = np.linspace(0, len(_ANCHORS_K3) - 1, _SHADES)
_RAMP_K3 = np.stack(
    [np.interp(_POSITIONS, np.arange(len(_ANCHORS_K3)), _ANCHORS_K3[:, channel]) for channel in range(3)], -1
).astype(np.uint8)
# The same colours for CSS.
COLOURS = [f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in _ANCHORS_K3]
_GAP, _BAR, _LABEL = 8, 14, 46
# A colour that the ramp does not have.
_OUTLINE = (45, 212, 255)
_NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def colour(values: Floats) -> Pixels:
    """Map values in 0..1 (clipped; NaN as 0), any shape, to RGB: uint8, with a last dimension of 3 added."""
    shades: Pixels = _RAMP_K3[(np.nan_to_num(values, nan=0.0).clip(0.0, 1.0) * (_SHADES - 1)).astype(np.int16)]
    return shades


def outline(picture: Image.Image, mask_SS: npt.NDArray[np.bool_]) -> Image.Image:
    """Trace the borders of a mask, bool and of the picture's size, two pixels wide: inside and outside of its edge."""
    padded = np.pad(mask_SS, 1)
    around = [padded[1 + dy :, 1 + dx :][: mask_SS.shape[0], : mask_SS.shape[1]] for dy, dx in _NEIGHBOURS]
    border_SS = np.logical_or.reduce([mask_SS, *around]) & ~np.logical_and.reduce([mask_SS, *around])
    traced_SS3 = np.array(picture)
    traced_SS3[border_SS] = _OUTLINE
    return Image.fromarray(traced_SS3)


def overlay(image_SS3: Pixels, map_SS: Floats, low: float, high: float) -> Image.Image:
    """Overlay an anomaly map on the greyscale image.

    Opacity is 25 % and colour darkest at ``low`` and below; 85 % and brightest at ``high`` and above.

    Args:
        image_SS3: uint8 RGB.
        map_SS: float32 scores.
    """
    strength_SS = np.clip((map_SS - low) / max(high - low, 1e-9), 0.0, 1.0).astype(np.float32)
    grey_SS1 = image_SS3.mean(-1, keepdims=True, dtype=np.float32)
    opacity_SS1 = (0.25 + 0.6 * strength_SS)[..., None]
    mixed = grey_SS1 * (1 - opacity_SS1) + colour(strength_SS) * opacity_SS1
    return Image.fromarray(mixed.astype(np.uint8))


def panel(image_SS3: Pixels, map_SS: Floats, low: float, high: float) -> Image.Image:
    """The image, the overlay and a colour bar labelled ``low`` and ``high``; arguments as for :func:`overlay`."""
    side = image_SS3.shape[0]
    canvas = Image.new("RGB", (2 * side + 2 * _GAP + _BAR + _LABEL, side), "white")
    canvas.paste(Image.fromarray(image_SS3), (0, 0))
    canvas.paste(overlay(image_SS3, map_SS, low, high), (side + _GAP, 0))
    left = 2 * side + 2 * _GAP
    ramp = np.linspace(1.0, 0.0, side, dtype=np.float32)[:, None].repeat(_BAR, 1)
    canvas.paste(Image.fromarray(colour(ramp)), (left, 0))
    pen = ImageDraw.Draw(canvas)
    pen.text((left + _BAR + 4, 0), f"{high:.3g}", "black")
    pen.text((left + _BAR + 4, side - 12), f"{low:.3g}", "black")
    return canvas


def png(image: Image.Image) -> bytes:
    """PNG bytes, compressed for speed rather than size."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def jpeg(image: Image.Image) -> bytes:
    """JPEG bytes, for pages with many pictures."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def profile(errors_L: Floats) -> Image.Image:
    """Bar chart of each block's error at one place; blocks are numbered from 1."""
    width, height = max(320, 26 * len(errors_L) + 50), 160
    bottom = height - 18
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    top = max(float(errors_L.max(initial=0.0)), 1e-9)
    step = (width - 50) / max(len(errors_L), 1)
    for block, error in enumerate(errors_L):
        x = 44 + block * step
        shade = tuple(colour(np.array(0.2 + 0.6 * error / top, np.float32)).tolist())
        pen.rectangle((x, bottom - (bottom - 14) * float(error) / top, x + 0.7 * step, bottom), fill=shade)
        pen.text((x, bottom + 3), str(block + 1), "black")
    pen.text((2, 8), f"{top:.3g}", "black")
    pen.text((2, bottom - 10), "0", "black")
    return canvas
