"""Detection quality: trains the quality config, evaluates it on two labelled sets, and compares it with two
memory-hungry baselines on the same backbone, images and grid.

    python benchmarks/quality.py --imagenet DIR --patch DIR --road DIR --out DIR [--seeds 0 1]

``--imagenet`` is a folder of clean photographs for Phase 1; ``--patch`` a labelled set (MVTec layout) of similar
photographs; ``--road`` a labelled set of a target domain with ``train/good`` to adapt on. Nothing is tuned on the
labels, and training images are never scored. Prints a table and writes ``quality.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trajdist.data.base import ImageSource
from trajdist.data.decode import Fit, to_square
from trajdist.data.labelled import GOOD, LabelledFolder
from trajdist.data.sources import ImageFolder
from trajdist.extraction.projection import BlockMoments
from trajdist.extraction.trajectory import TrajectoryExtractor, pool
from trajdist.saved.bundle import load_extractor
from trajdist.scoring.histogram import ScoreHistogram
from trajdist.scoring.metrics import PixelScores, curve

SIZE, BATCH = 224, 32
BANK_CELLS, BANK_BLOCKS = 20_000, (5, 11)  # Two middle blocks, zero-based.
Cells = Callable[[torch.Tensor], torch.Tensor]


def trajdist(*arguments: str) -> float:
    """Run a trajdist command; returns its duration in seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "trajdist", *arguments], check=True)
    return time.monotonic() - started


def batches(source: ImageSource, fit: Fit) -> Iterator[torch.Tensor]:
    """All images in batches, uint8 ``[B, 3, S, S]``."""
    for start in range(0, len(source), BATCH):
        numbers = range(start, min(start + BATCH, len(source)))
        squares = [to_square(source.load(number, SIZE), SIZE, fit) for number in numbers]
        yield torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


def pooled(extractor: TrajectoryExtractor, images: torch.Tensor) -> list[torch.Tensor]:
    """All blocks of a batch, float32 ``[B, P, C]`` each. (Unlike trajdist, the baselines keep all blocks.)"""
    found: list[torch.Tensor] = []
    extractor.backbone(images, lambda block, map_BCHW: found.append(pool(map_BCHW, extractor.resolution)))
    return found


def gaussians(extractor: TrajectoryExtractor, clean: Iterable[torch.Tensor]) -> Cells:
    """One Gaussian per block for all places (cf. PaDiM, Defard et al. 2021); sums squared Mahalanobis distances."""
    moments = [BlockMoments(block.channels, torch.device("cpu")) for block in extractor.backbone.blocks]
    for images in clean:
        for moment, rows in zip(moments, pooled(extractor, images), strict=True):
            moment.update(rows.flatten(0, 1), torch.ones(rows.shape[0] * rows.shape[1]))
    maps = []
    for moment in moments:
        covariance = moment.covariance_CC
        covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
        maps.append((moment.mean_C.float(), torch.linalg.cholesky(torch.linalg.inv(covariance)).float()))

    def cells(images: torch.Tensor) -> torch.Tensor:
        parts = zip(pooled(extractor, images), maps, strict=True)
        return torch.stack([((rows - mean) @ root).square().sum(-1) for rows, (mean, root) in parts]).sum(0)

    return cells


def nearest_neighbour(extractor: TrajectoryExtractor, clean: Iterable[torch.Tensor]) -> Cells:
    """Distance to the nearest neighbour in a memory bank of clean cells (cf. PatchCore, Roth et al. 2022)."""

    def features(images: torch.Tensor) -> torch.Tensor:
        blocks = pooled(extractor, images)
        side = extractor.resolution
        maps = torch.cat([blocks[block] for block in BANK_BLOCKS], -1).transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False).flatten(2).transpose(1, 2)

    rows = torch.cat([features(images).flatten(0, 1) for images in clean])
    bank = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:BANK_CELLS]]
    return lambda images: torch.stack([torch.cdist(each, bank).amin(1) for each in features(images)])


def auroc_of(cells: Cells, dataset: LabelledFolder, side: int) -> dict[str, float | None]:
    """Image AUROC of the maximum cell score, and pixel AUROC of the interpolated map."""
    images = {True: ScoreHistogram(), False: ScoreHistogram()}
    pixels, position = PixelScores(), 0
    for batch in batches(dataset, "squash"):
        maps = cells(batch).unflatten(1, (side, side))
        full = F.interpolate(maps[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
        for slot in range(len(batch)):
            pixels.update(full[slot], dataset.mask(position + slot, SIZE, "squash"))
            images[dataset.kind(position + slot) != GOOD].update(maps[slot].amax())
        position += len(batch)
    return {"image_auroc": curve(images[True], images[False]).area(), "pixel_auroc": pixels.curve().area()}


def measure_seed(arguments: argparse.Namespace, seed: int, out: Path) -> dict[str, object]:
    """Train and evaluate one seed."""
    run_dir = str(out / f"seed{seed}")
    road = Path(arguments.road) / "train" / GOOD
    settings = [f"data.imagenet.path={arguments.imagenet}", f"data.domain.path={road}", f"run_dir={run_dir}"]
    seconds = {
        "phase1": trajdist("train", arguments.config, *settings, f"seed={seed}", *arguments.override),
        "phase2": trajdist("adapt", arguments.config, *settings, f"seed={seed}", *arguments.override),
    }
    results: dict[str, object] = {"training_s": seconds}
    for name, dataset, phase in (
        ("patch", arguments.patch, "1"),
        ("road", arguments.road, "2"),
        ("road unadapted", arguments.road, "1"),
    ):
        target = out / f"seed{seed}-{name.replace(' ', '-')}"
        trajdist("evaluate", run_dir, dataset, "--out", str(target), "--phase", phase, "--overlays", "none")
        results[name] = json.loads((target / "metrics.json").read_text())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("imagenet", "patch", "road", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--config", default="quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--override", nargs="*", default=[], help="key=value for the config")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {f"seed {seed}": measure_seed(arguments, seed, out) for seed in arguments.seeds}
    extractor = load_extractor(out / f"seed{arguments.seeds[0]}" / "phase1" / "trajectory.safetensors")
    # As in trajdist, photographs are cropped, and labelled and domain images squashed.
    sets: dict[str, tuple[ImageSource, Fit, LabelledFolder]] = {
        "patch": (
            ImageFolder(Path(arguments.imagenet), "--imagenet"),
            "crop",
            LabelledFolder(Path(arguments.patch), "--patch"),
        ),
        "road": (
            ImageFolder(Path(arguments.road) / "train" / GOOD, "--road"),
            "squash",
            LabelledFolder(Path(arguments.road), "--road"),
        ),
    }
    for method in (gaussians, nearest_neighbour):
        with torch.no_grad():
            results[method.__name__] = {
                name: auroc_of(method(extractor, batches(clean, fit)), test, extractor.resolution)
                for name, (clean, fit, test) in sets.items()
            }
    (out / "quality.json").write_text(json.dumps(results, indent=2))
    print(f"{'':24s}{'set':>16s}{'image AUROC':>14s}{'pixel AUROC':>14s}")
    for method_name, by_set in results.items():
        assert isinstance(by_set, dict)
        for name, metrics in by_set.items():
            if name != "training_s":
                print(f"{method_name:24s}{name:>16s}{metrics['image_auroc']:14.3f}{metrics['pixel_auroc']:14.3f}")


if __name__ == "__main__":
    main()
