"""Small images for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, side: int = 48) -> Image.Image:
    """A blotchy colour picture."""
    random = np.random.default_rng(seed)
    blotches = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blotches).resize((side, side), Image.Resampling.BICUBIC)


def write_images(folder: Path, count: int, side: int = 48) -> Path:
    """Fill a folder with PNG images that differ; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise(number, side).save(folder / f"{number:04d}.png")
    return folder
