"""Generic synthetic defects drawn into clean images; the contrast objective of Phase 2 learns to tell them from clean
places.

Shape suffixes: S pixels per side, P places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from trajdist.sharding import DRAWING, key64

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Raised with every change of what is drawn or what counts as defective: losses of other versions do not compare.
DRAWN = 2


@dataclass(frozen=True)
class DefectDraw:
    """Draws a defect into an image, as a pure function of the image's position in its epoch, independent of batching.

    Attributes:
        resolution: places per side of the grid on which coverage is reported.
        seed, phase, purpose: select the random stream.
    """

    resolution: int
    seed: int
    phase: int
    purpose: int = DRAWING

    def __call__(self, image_SS3: Pixels, epoch: int, position: int) -> tuple[Pixels, Floats]:
        """The image with a defect, uint8 ``[S, S, 3]``, and the fraction of each place it covers, float32 ``[P]``."""
        random = np.random.default_rng(key64(self.seed, self.phase, self.purpose, epoch, position))
        drawn_SS3, cover_SS = draw_defect(image_SS3, random)
        share = Image.fromarray(cover_SS).resize((self.resolution, self.resolution), Image.Resampling.BOX)
        return drawn_SS3, np.asarray(share).ravel()


def draw_defect(image_SS3: Pixels, random: np.random.Generator) -> tuple[Pixels, Floats]:
    """Draw a jagged line or a blob with a soft edge and random opacity.

    Returns:
        The image, uint8 ``[S, S, 3]``, and the defect's coverage, float32 ``[S, S]`` from 0 to 1 (before opacity).
    """
    side = len(image_SS3)
    shape = _shape(side, random)
    while not shape.getbbox():
        shape = _shape(side, random)
    cover_SS = np.asarray(shape.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.5) * side / 224)), np.float32)
    cover_SS = cover_SS / 255.0
    strength = random.uniform(0.3, 1.0)
    fillings = (_shade, _colour, _texture, _moved)
    filling_SS3 = fillings[random.integers(len(fillings))](image_SS3.astype(np.float32), random)
    mixed_SS3 = image_SS3 + strength * cover_SS[..., None] * (filling_SS3 - image_SS3)
    return mixed_SS3.clip(0, 255).astype(np.uint8), cover_SS


def _shape(side: int, random: np.random.Generator) -> Image.Image:
    """A line or a blob, white on black; a blob may be empty."""
    return _line(side, random) if random.random() < 0.5 else _blob(side, random)


def _line(side: int, random: np.random.Generator) -> Image.Image:
    """A random walk with correlated direction."""
    angle, point = random.uniform(0, 2 * np.pi), random.uniform(0, side, 2)
    points = [tuple(point.tolist())]
    for _ in range(int(random.integers(4, 24))):
        angle += random.normal(0, 0.4)
        point = point + random.uniform(6, 14) * side / 224 * np.array([np.cos(angle), np.sin(angle)])
        points.append(tuple(point.tolist()))
    mask = Image.new("L", (side, side))
    width = max(1, round(int(random.integers(1, 7)) * side / 224))
    ImageDraw.Draw(mask).line(points, fill=255, width=width, joint="curve")
    return mask


def _blob(side: int, random: np.random.Generator) -> Image.Image:
    """A smooth random field thresholded at its median, within a circle."""
    field = Image.fromarray(random.standard_normal((int(random.integers(3, 9)),) * 2).astype(np.float32))
    heights_SS = np.asarray(field.resize((side, side), Image.Resampling.BICUBIC))
    centre, radius = random.uniform(20, 204, 2) * side / 224, random.uniform(15, 50) * side / 224
    rows, columns = np.mgrid[:side, :side]
    inside_SS = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
    return Image.fromarray(((heights_SS > np.median(heights_SS)) & inside_SS).astype(np.uint8) * 255)


def _shade(image_SS3: Floats, random: np.random.Generator) -> Floats:
    """The image, lighter or darker."""
    shift = random.uniform(30, 110) * random.choice([-1.0, 1.0]) + random.normal(0, 12, 3)
    return image_SS3 + shift.astype(np.float32)


def _colour(image_SS3: Floats, random: np.random.Generator) -> Floats:
    """A uniform colour."""
    return np.broadcast_to(random.uniform(0, 255, 3).astype(np.float32), image_SS3.shape)


def _texture(image_SS3: Floats, random: np.random.Generator) -> Floats:
    """Coloured noise of random grain: foreign material."""
    grain = int(random.integers(2, max(3, len(image_SS3) // 3)))
    noise = Image.fromarray(random.integers(0, 256, (grain, grain, 3), dtype=np.uint8))
    return np.asarray(noise.resize(image_SS3.shape[:2], Image.Resampling.BICUBIC), np.float32)


def _moved(image_SS3: Floats, random: np.random.Generator) -> Floats:
    """The image itself, rotated by a multiple of 90 degrees, shifted, and lighter or darker."""
    side = len(image_SS3)
    turned_SS3 = np.rot90(image_SS3, int(random.integers(4)))
    shift = random.integers(side // 8, side - side // 8, 2).tolist()
    moved_SS3: Floats = np.roll(turned_SS3, shift, (0, 1)) * np.float32(random.uniform(0.7, 1.3))
    return moved_SS3
