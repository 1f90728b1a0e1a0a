"""Held-out crops with synthetic defects, in MVTec layout: a labelled set for evaluating the quickstart.

    python -m trajdist.data.defects skimage:gravel/heldout DIR

Each defect is a pure function of the crop's index; the ground truth is the set of pixels it changed.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from trajdist.data.base import ImageSource
from trajdist.data.sources import open_source
from trajdist.errors import UserError
from trajdist.files import user_path
from trajdist.screen import lines_on_screen
from trajdist.sharding import key64

SIDE = 224
Draw = Callable[[Image.Image, np.random.Generator], Image.Image]


def scratch(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A thin jagged line, very dark or very bright."""
    points = np.cumsum(np.vstack([random.uniform(50, 170, 2), random.uniform(-26, 26, (6, 2))]), 0)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).line([tuple(point) for point in points.tolist()], 255, int(random.integers(3, 6)), "curve")
    shade = int(random.choice([25, 235]))
    return Image.composite(Image.new("RGB", image.size, (shade,) * 3), image, mask)


def stain(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A discoloured spot with a soft edge."""
    x, y, radius = *random.uniform(50, 174, 2), random.uniform(14, 26)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).ellipse((x - radius, y - 0.7 * radius, x + radius, y + 0.7 * radius), 255)
    tint = tuple(int(part) for part in random.integers(30, 200, 3))
    stained = Image.blend(image, Image.new("RGB", image.size, tint), 0.65)
    return Image.composite(stained, image, mask.filter(ImageFilter.GaussianBlur(3)))


def foreign(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A foreign object: a hard-edged square with a checked texture of its own."""
    side = int(random.integers(22, 40))
    x, y = (int(value) for value in random.integers(20, SIDE - 20 - side, 2))
    checks = np.kron(random.integers(0, 2, (4, 4)), np.ones((side // 4 + 1, side // 4 + 1)))[:side, :side, None]
    colours = random.integers(0, 256, (2, 3))
    pixels = np.where(checks > 0, colours[0], colours[1]).astype(np.uint8)
    shape = Image.fromarray(np.full((side, side), 255, np.uint8)).rotate(float(random.uniform(0, 45)), expand=False)
    pasted = image.copy()
    pasted.paste(Image.fromarray(pixels), (x, y), shape)
    return pasted


DEFECTS: dict[str, Draw] = {"foreign": foreign, "scratch": scratch, "stain": stain}


def write_labelled(source: ImageSource, folder: Path) -> None:
    """Write every crop twice, clean and with a defect (kinds alternate); masks cover all visibly changed pixels."""
    kinds = list(DEFECTS)
    for kind in ("good", *kinds):
        (folder / "test" / kind).mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        (folder / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
    for index in range(len(source)):
        image = source.load(index, SIDE).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        kind = kinds[index % len(kinds)]
        drawn = DEFECTS[kind](image, np.random.default_rng(key64(index, kinds.index(kind))))
        changed = np.asarray(ImageChops.difference(image, drawn)).max(-1) > 2
        _write(image, folder / "test" / "good" / f"{index:03d}.png")
        _write(drawn, folder / "test" / kind / f"{index:03d}.png")
        _write(Image.fromarray(changed), folder / "ground_truth" / kind / f"{index:03d}_mask.png")


def _write(image: Image.Image, path: Path) -> None:
    """Skip a file that already holds the image: a resumed evaluation would take a rewritten one for another image."""
    content = io.BytesIO()
    image.save(content, "PNG")
    if not path.is_file() or path.read_bytes() != content.getvalue():
        path.write_bytes(content.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the set; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a labelled set: clean crops, and the same with defects.")
    parser.add_argument("source", help="such as skimage:gravel/heldout, or a folder of clean images")
    parser.add_argument("folder", type=user_path)
    arguments = parser.parse_args(argv)
    try:
        write_labelled(open_source(arguments.source, "source"), arguments.folder)
    except UserError as error:
        print(f"trajdist: {lines_on_screen(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
