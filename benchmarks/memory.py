"""Does memory use stay flat? Steady-state and peak memory against the number of images.

    python benchmarks/memory.py [--counts 250 500 1000 2000 4000] [--plot docs/memory.png] [--json FILE] [key=value ...]

Three ways to train for one epoch on the same images (a folder, repeated): ``stream`` and ``collect`` from
benchmarks/reference.py, and ``trajdist train``. Each measurement runs in its own process. A thread samples its memory
every 20 ms: the resident set size, and on CUDA the bytes allocated on the device. *Steady* is the mean over the second
half of training (for ``collect``, the training after all trajectories have been collected); *peak* is the maximum over
the whole process, and is also reported for each stage. Decoding workers are not counted: they are the same for all.

By default the network is ResNet-18 at 64 pixels, which is quick; use ``backbone.name=resnet50 data.image_size=224`` for
a realistic size. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

WAYS = ("stream", "collect", "trajdist")
SMALL = ("backbone.name=resnet18", "data.image_size=64", "data.imagenet.batch_size=32", "model.feature_dim=128")
SAMPLE_EVERY_S = 0.02


class Reading(NamedTuple):
    """Bytes on the host and the device at a time, in a stage of the run."""

    at: float
    part: str
    host: int
    device: int


@dataclass
class Sampler:
    """Samples this process's memory from a background thread, along with the current stage of the run."""

    part: Callable[[], str]
    readings: list[Reading] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        import psutil
        import torch

        process = psutil.Process()
        while not self._over.wait(SAMPLE_EVERY_S):
            on_device = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
            self.readings.append(Reading(time.monotonic(), self.part(), process.memory_info().rss, on_device))

    def result(self, training: str) -> dict[str, Any]:
        """Steady and peak bytes on the host and, if used, the device, and the peak in each stage.

        Args:
            training: the name of the training stage.
        """
        self._over.set()
        self._thread.join()
        times = [one.at for one in self.readings if one.part == training]
        middle = (times[0] + times[-1]) / 2
        return {
            name: self._figures(bytes_of, training, middle)
            for name, bytes_of in {"host": lambda one: one.host, "device": lambda one: one.device}.items()
            if any(map(bytes_of, self.readings))
        }

    def _figures(self, bytes_of: Callable[[Reading], int], training: str, middle: float) -> dict[str, Any]:
        steady = [bytes_of(one) for one in self.readings if one.part == training and one.at >= middle]
        parts: dict[str, int] = {}
        for one in self.readings:
            parts[one.part] = max(parts.get(one.part, 0), bytes_of(one))
        return {"steady": sum(steady) / len(steady), "peak": max(parts.values()), "parts": parts}


def measure(way: str, images: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Take one measurement in this process."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if way == "trajdist":
            return measure_trajdist(Path(folder, "run"), overrides)
        return measure_reference(way, Path(images), overrides)


def measure_trajdist(run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    from trajdist.cli import main as trajdist

    # The stage is inferred from the files that the run has written, latest stage first.
    made = {"calibration": "phase1/model.safetensors", "training": "metrics.jsonl", "start": "config.yaml"}
    statistics_done = run_dir / "phase1" / "trajectory.safetensors"

    def part() -> str:
        found = next((name for name, file in made.items() if (run_dir / file).exists()), "import")
        return "statistics" if found == "start" and not statistics_done.exists() else found

    sampler = Sampler(part)
    assert trajdist(["train", "default", *overrides, f"run_dir={run_dir}"]) == 0
    return sampler.result("training")


def measure_reference(way: str, images: Path, overrides: Sequence[str]) -> dict[str, Any]:
    import gc

    import torch
    from reference import reference

    from trajdist.config_files import load_config
    from trajdist.runtime.processes import device_type
    from trajdist.saved import bundle

    config = load_config("default", overrides)
    extractor = bundle.new_extractor(config).to(torch.device(device_type()))
    trainer = reference(config, extractor, images)
    del extractor
    gc.collect()
    sampler = Sampler(lambda: trainer.part)
    trainer.stream() if way == "stream" else trainer.collect()
    return sampler.result("training")


def in_a_process(way: str, images: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Take one measurement in a fresh process, unaffected by the memory of earlier ones."""
    command = [sys.executable, __file__, "--measure", way, str(images), *overrides]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def middle(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median over several processes: heap fragmentation varies between them."""
    kinds = measured[0]
    return {
        kind: {name: statistics.median(one[kind][name] for one in measured) for name in ("steady", "peak")}
        | {"parts": [one[kind]["parts"] for one in measured]}
        for kind in kinds
    }


def table(results: dict[str, dict[str, Any]], kind: str) -> Table:
    """Steady and peak MiB, one row per number of images."""
    made = Table(title=f"memory of the {kind}, MiB: steady / peak", title_justify="left")
    made.add_column("images", justify="right")
    for way in WAYS:
        made.add_column(way, justify="right")
    for count in results[WAYS[0]]:
        cells = [results[way][count][kind] for way in WAYS]
        made.add_row(count, *(f"{one['steady'] / 2**20:,.0f} / {one['peak'] / 2**20:,.0f}" for one in cells))
    return made


def plot(results: dict[str, dict[str, Any]], kind: str, path: Path) -> None:
    """Plot peak (solid) and steady (dashed) memory against the number of images."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for way in WAYS:
        counts = [int(count) for count in results[way]]
        peak, steady = ([one[kind][name] / 2**30 for one in results[way].values()] for name in ("peak", "steady"))
        (line,) = axes.plot(counts, peak, marker="o", label=way)
        axes.plot(counts, steady, linestyle="--", color=line.get_color())
    axes.set(xlabel="images in the data set", ylabel=f"memory of the {kind}, GiB", ylim=(0, None))
    axes.legend(title="peak (dashed: steady)", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def growth(results: dict[str, dict[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """Growth in steady memory from the fewest to the most images: bytes in total and per image."""
    found = {}
    for way, by_count in results.items():
        few, many = min(by_count, key=int), max(by_count, key=int)
        first, last = by_count[few], by_count[many]
        added = last[kind]["steady"] - first[kind]["steady"]
        found[way] = {"added_bytes": added, "bytes_per_image": added / max(1, int(many) - int(few))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000])
    parser.add_argument("--images", help="a folder of images (default: photographs of scikit-image)")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure, of which the median counts")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.measure:
        way, folder = arguments.measure
        print(json.dumps(measure(way, folder, arguments.overrides)))
        return
    from reference import repeated

    results: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    settings = ["backbone.weights=none", "trajectory.statistics_images=64", "logging.every_steps=1"]
    settings += [*SMALL, *arguments.overrides]
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.counts:
            images = repeated(arguments.images, count, Path(folder, str(count)))
            for way in WAYS:
                overrides = [*settings, f"data.imagenet.path={images}"]
                measured = [in_a_process(way, images, overrides) for _ in range(arguments.repeats)]
                results[way][str(count)] = middle(measured)
    kinds = list(results[WAYS[0]][str(arguments.counts[0])])
    for kind in kinds:
        Console().print(table(results, kind))
    report = {"settings": settings, "memory": results, "growth": {kind: growth(results, kind) for kind in kinds}}
    print(json.dumps(report["growth"], indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        plot(results, kinds[-1], arguments.plot)


if __name__ == "__main__":
    main()
