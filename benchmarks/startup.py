"""Start-up time in seconds, each measurement in a fresh process; medians with range.

    python benchmarks/startup.py [--rounds 5] [--json FILE] [CONFIG] [key=value ...]

Measures ``trajdist --help``, ``import torch``, ``import trajdist.training.phases`` (torch and everything else that
training needs), the same plus building the backbone, and ``trajdist train`` until the first line of metrics.jsonl,
which follows the first step. By default the config is ResNet-50 with random weights on 32 of scikit-image's
photographs. "own" is the run's time beyond imports and building the backbone: statistics over those images, their
eigenvectors, the model, and the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import over_rounds
from rich.console import Console
from rich.table import Table

SMALL = ("backbone.weights=none", "data.imagenet.path=skimage:photos", "data.imagenet.num_samples=32")
POLL_S = 0.01
BUILD = """
import sys, trajdist.training.phases
from trajdist.saved.bundle import new_extractor
from trajdist.config_files import load_config
new_extractor(load_config(sys.argv[1], sys.argv[2:]))
"""


def seconds(*arguments: str) -> float:
    """Wall time of a Python process from start to exit."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_step(config: list[str]) -> float:
    """Seconds from the start of ``trajdist train`` to its first line of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "run", "metrics.jsonl")
        command = [sys.executable, "-m", "trajdist", "train", *config, f"run_dir={metrics.parent}"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(POLL_S)
        taken = time.perf_counter() - started
        process.kill()
        process.wait()
        return taken


def measure(config: list[str], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    # The first round, which loads the files into the page cache, is discarded.
    for number in range(rounds + 1):
        one = {
            "trajdist --help": seconds("-m", "trajdist", "--help"),
            "import torch": seconds("-c", "import torch"),
            "import trajdist.training.phases": seconds("-c", "import trajdist.training.phases"),
            "and build the backbone": seconds("-c", BUILD, *config),
            "train to its first step": first_step(config),
        }
        one["own"] = one["train to its first step"] - one["and build the backbone"]
        for name, taken in one.items() if number else ():
            found.setdefault(name, []).append(taken)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("config", nargs="?", default="default")
    parser.add_argument("overrides", nargs="*", default=list(SMALL))
    arguments = parser.parse_args()
    found = measure([arguments.config, *arguments.overrides], arguments.rounds)
    made = Table(title="seconds", title_justify="left")
    for name in ("", "median", "least", "greatest"):
        made.add_column(name, justify="right" if name else "left")
    for name, times in found.items():
        made.add_row(name, *(f"{value:.2f}" for value in over_rounds(times).values()))
    Console().print(made)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
