"""How close does training come to the cost of the frozen backbone's forward pass? Interleaved in one process.

    python benchmarks/throughput.py [--backbones resnet50 ...] [--models autoencoder ...] [--images DIR] [--count 256]
                                    [--rounds 3] [--short] [--json FILE] [key=value ...]

In every round, on the same images and batch size (images/s; medians over the rounds; ratios within a round, with
their range):

(a) limit      the forward pass alone: channels last, BatchNorm folded, up to the last block, compiled if the config
               says so, on batches decoded in advance, with trajdist's allocator settings
(b) stream     the plain streaming loop of benchmarks/reference.py
(c) collect    collect all trajectories first, then train on them
(d) trajdist   the training loop of one epoch of ``trajdist train``; the row "whole command" includes start-up,
               statistics and calibration
(e) cached     the same once cache.dir contains the trajectories

With --short only (a) and (d) are timed, (a) before and after (d): for epochs of thousands of images.

"arithmetic" is the floating-point operations of the backbone over those of a step: the value that (d) / (a) reaches if
the model's operations run as fast as the backbone's. Backbones have random weights unless ``backbone.weights`` is set;
speed does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import ratio, seconds
from reference import Reference, reference, repeated, usual_allocator
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from trajdist.cli import main as trajdist
from trajdist.config import Config
from trajdist.config_files import load_config
from trajdist.data.loader import SlotDataset
from trajdist.data.sources import open_source
from trajdist.extraction.trajectory import TrajectoryExtractor, call_frozen
from trajdist.models.losses import trajectory_losses
from trajdist.planning.task import autocast
from trajdist.runtime.allocator import keep_freed_memory
from trajdist.runtime.processes import device_type, precision
from trajdist.saved import bundle
from trajdist.sharding import Slots
from trajdist.training.train import place_draw

BACKBONES = {
    "resnet50": ["backbone.name=resnet50", "model.spatial_resolution=7"],
    "efficientnet_lite0": ["backbone.name=efficientnet_lite0", "model.spatial_resolution=14"],
    "vit_b_16": ["backbone.name=vit_b_16", "model.spatial_resolution=7"],
}
MODELS = {
    "autoencoder": ["model.type=autoencoder"],
    "vae": ["model.type=vae"],
    "transformer": ["model.type=transformer", "model.hidden_dim=128", "train.cell_fraction=0.25"],
}
EPOCHS = 3
# Enough to fit a projection; it does not affect the speed of an epoch.
STATISTICS_IMAGES = 32


@dataclass
class Case:
    """One backbone with one model: its config overrides, and the workloads to time."""

    overrides: list[str]
    config: Config
    extractor: TrajectoryExtractor
    batches: list[torch.Tensor]
    reference: Reference
    forward: Callable[[torch.Tensor], torch.Tensor]
    folder: Path

    def limit(self) -> float:
        """Seconds of the forward pass alone over all images."""
        return seconds(lambda: [self.forward(batch) for batch in self.batches])

    def train(self, name: str, *overrides: str) -> tuple[float, float]:
        """Run ``trajdist train`` for one epoch; returns the seconds of its loop and of the whole command."""
        run_dir = self.folder / name
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = trajdist(["train", "default", *self.overrides, f"run_dir={run_dir}", *overrides, "--fresh"])
        if code:
            raise SystemExit(f"{printed.getvalue()}\ntrajdist ended with {code}")
        whole = time.perf_counter() - started
        # The command ran in this process: collect its reference cycles before the next measurement.
        gc.collect()
        return float(json.loads((run_dir / "summary.json").read_text())["phase1"]["seconds"]), whole


def open_case(backbone: str, model: str, arguments: argparse.Namespace, images: Path, folder: Path) -> Case:
    overrides = [
        "backbone.weights=none",
        f"data.imagenet.path={images}",
        f"trajectory.statistics_images={STATISTICS_IMAGES}",
        "calibration.holdout_fraction=0",
        *BACKBONES[backbone],
        *MODELS[model],
        *arguments.overrides,
    ]
    config = load_config("default", overrides)
    extractor = bundle.new_extractor(config).to(torch.device(device_type()))
    folder.mkdir()
    return Case(
        overrides,
        config,
        extractor,
        decoded(config, images),
        reference(config, extractor, images),
        forward_alone(extractor, config.backbone.compile, precision(config.runtime.mixed_precision)),
        folder,
    )


def decoded(config: Config, images: Path) -> list[torch.Tensor]:
    """The images as uint8 batches ``[B, 3, S, S]`` on the device."""
    source, size = open_source(str(images), "IMAGES"), config.data.imagenet.batch_size
    data = SlotDataset(source, lambda epoch, positions: positions, config.data.image_size, "crop")
    slots = [Slots(0, start, min(start + size, len(source)), size) for start in range(0, len(source), size)]
    return [data[slot].images.to(device_type()) for slot in slots]


def forward_alone(
    extractor: TrajectoryExtractor, compile: bool, precision: str = "no"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The backbone up to its last block; returns that output, lest the compiler eliminate the computation."""

    @torch.no_grad()
    def forward(images_BCSS: torch.Tensor) -> torch.Tensor:
        last: list[torch.Tensor] = []

        def visit(block: int, activation: torch.Tensor) -> None:
            last[:] = [activation]

        with autocast(device_type(), precision):
            extractor.backbone(images_BCSS, visit)
        return last[0]

    if not compile:
        return forward
    return partial(call_frozen, torch.compile(forward, fullgraph=True, dynamic=False))


def gflop_per_image(case: Case) -> dict[str, float]:
    """GFLOP per image of the backbone's forward pass alone, of the extraction in training, and of a step of the model.

    With few places, extraction can take less than the forward pass: the last block is computed there alone.
    """
    extractor, config = case.extractor, case.config
    image = case.batches[0][:1]
    with FlopCounterMode(display=False) as backbone:
        forward_alone(extractor, compile=False)(image)
    draw = place_draw(config, 1, extractor)
    places_1K = torch.arange(draw.count if draw else extractor.resolution**2, device=image.device)[None]
    with FlopCounterMode(display=False) as extraction:
        trajectories_1KLD = extractor.at(image, places_1K)
    target_NLD = trajectories_1KLD.flatten(0, 1)
    with FlopCounterMode(display=False) as model:
        losses = trajectory_losses(case.reference.model(target_NLD), target_NLD, extractor.projection.valid_LD, 1, 1.0)
        losses.loss.sum().backward()
    case.reference.model.zero_grad()
    counters = {"backbone": backbone, "extraction": extraction, "model": model}
    return {name: counter.get_total_flops() / 1e9 for name, counter in counters.items()}


def measure_short(case: Case, rounds: int) -> dict[str, Any]:
    """Time the limit and the training loop alone; the limit is the mean of the passes before and after."""
    count = sum(len(batch) for batch in case.batches)
    rates: dict[str, list[float]] = {"limit": [], "trajdist": [], "trajdist, whole command": []}
    for batch in case.batches[:8]:
        case.forward(batch)
    limit = case.limit()
    for _ in range(rounds):
        plain, whole = case.train("plain")
        before, limit = limit, case.limit()
        for name, taken in zip(rates, ((before + limit) / 2, plain, whole), strict=True):
            rates[name].append(count / taken)
    return report(case, count, rates)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time every workload once per round, after a warm-up round."""
    count, cache = sum(len(batch) for batch in case.batches), f"cache.dir={case.folder / 'cache'}"
    rates: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        limit = case.limit()
        with usual_allocator():
            stream = case.reference.stream()
            collecting, training = case.reference.collect()
        plain, whole = case.train("plain")
        shutil.rmtree(case.folder / "cache", ignore_errors=True)
        filling, _ = case.train("filling", cache)
        cached, _ = case.train("cached", cache)
        for name, epochs, taken in (
            ("limit", 1, limit),
            ("stream", 1, stream),
            ("collect", 1, collecting + training),
            ("trajdist", 1, plain),
            ("trajdist, whole command", 1, whole),
            ("cached", 1, cached),
            (f"collect, {EPOCHS} epochs", EPOCHS, collecting + EPOCHS * training),
            (f"trajdist, {EPOCHS} epochs", EPOCHS, EPOCHS * plain),
            (f"trajdist with a cache, {EPOCHS} epochs", EPOCHS, filling + (EPOCHS - 1) * cached),
        ):
            rates.setdefault(name, []).append(epochs * count / taken)
    return report(case, count, {name: values[1:] for name, values in rates.items()})


def report(case: Case, count: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    gflop = gflop_per_image(case)
    arithmetic = gflop["backbone"] / (gflop["extraction"] + gflop["model"])
    pairs = {
        "d / a": ("trajdist", "limit"),
        "d / b": ("trajdist", "stream"),
        "d / c": ("trajdist", "collect"),
        "e / d": ("cached", "trajdist"),
        f"d / c, {EPOCHS} epochs": (f"trajdist, {EPOCHS} epochs", f"collect, {EPOCHS} epochs"),
        f"d, then e / c, {EPOCHS} epochs": (f"trajdist with a cache, {EPOCHS} epochs", f"collect, {EPOCHS} epochs"),
    }
    ratios = {
        name: ratio(rates[one], rates[other]) for name, (one, other) in pairs.items() if {one, other} <= rates.keys()
    }
    ratios["d / best a"] = ratio(rates["trajdist"], [max(rates["limit"])] * len(rates["limit"]))
    return {
        "images": count,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device_type() == "cuda" else "cpu",
        "settings": case.overrides,
        "images_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratios": ratios,
        "gflop_per_image": gflop,
        "arithmetic": arithmetic,
        "d / a of the arithmetic": ratios["d / a"]["median"] / arithmetic,
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One column per case."""
    made = Table(title="images/s, and ratios: median (least to greatest)", title_justify="left")
    made.add_column("")
    for case in results:
        made.add_column(case, justify="right")
    first = next(iter(results.values()))
    for name in first["images_per_s"]:
        made.add_row(name, *(f"{one['images_per_s'][name]:.1f}" for one in results.values()))
    made.add_section()
    for name in first["ratios"]:
        made.add_row(name, *(spread(one["ratios"][name]) for one in results.values()))
    made.add_section()
    for name in first["gflop_per_image"]:
        made.add_row(f"GFLOP per image: {name}", *(f"{one['gflop_per_image'][name]:.2f}" for one in results.values()))
    for name in ("arithmetic", "d / a of the arithmetic"):
        made.add_row(name, *(f"{one[name]:.2f}" for one in results.values()))
    return made


def spread(one: dict[str, float]) -> str:
    return f"{one['median']:.2f} ({one['least']:.2f} to {one['greatest']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["resnet50"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["autoencoder"])
    parser.add_argument("--images", help="a folder of images (default: photographs of scikit-image)")
    parser.add_argument("--count", type=int, default=256, help="images of an epoch; the folder is repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="time the limit and trajdist alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as backbone.compile=true")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    keep_freed_memory()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        images = repeated(arguments.images, arguments.count, Path(folder, "images"))
        for backbone in arguments.backbones:
            for model in arguments.models:
                name = f"{backbone} {model}"
                case = open_case(backbone, model, arguments, images, Path(folder, name))
                results[name] = (measure_short if arguments.short else measure)(case, arguments.rounds)
                del case
                gc.collect()
    Console(width=60 + 30 * len(results)).print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
