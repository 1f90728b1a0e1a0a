"""Runs the tour and draws its pictures: python docs/make_tour.py [RUN_DIR]; minutes, unless that run is done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

DOCS = Path(__file__).parent
SHOWN = 5


def run(run_dir: Path) -> None:
    """The commands of docs/index.md."""
    trajdist = [sys.executable, "-m", "trajdist"]
    labelled, out = str(run_dir / "heldout"), str(run_dir / "evaluation")
    commands = (
        [*trajdist, "run", "quickstart", f"run_dir={run_dir}"],
        [sys.executable, "-m", "trajdist.data.defects", "skimage:gravel/heldout", labelled],
        [*trajdist, "evaluate", str(run_dir), labelled, "--out", out, "--explain"],
    )
    for command in commands:
        subprocess.run(command, check=True)


def rows_of(run_dir: Path) -> list[dict[str, object]]:
    lines = (run_dir / "evaluation" / "scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def draw_maps(run_dir: Path) -> None:
    """Some crops with defects above their maps."""
    rows = rows_of(run_dir)
    maps = load_file(run_dir / "evaluation" / "maps.safetensors")["maps"]
    defects = [number for number, row in enumerate(rows) if "good" not in str(row["image"])]
    chosen = [defects[round(at)] for at in np.linspace(0, len(defects) - 1, SHOWN)]
    figure, axes = plt.subplots(2, SHOWN, figsize=(9, 3.7), layout="constrained")
    for column, number in enumerate(chosen):
        image = Image.open(run_dir / "heldout" / str(rows[number]["image"])).convert("L").resize((160, 160))
        axes[0, column].imshow(image, cmap="gray")
        shown = axes[1, column].imshow(maps[number], cmap="inferno", vmin=0, vmax=8)
        axes[0, column].set_title(f"p = {rows[number]['p_value']:.3f}", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[1, :], fraction=0.02, label="deviations")
    save(figure, "tour-maps.png")


def draw_scores(run_dir: Path) -> None:
    rows = rows_of(run_dir)
    good = [row["score"] for row in rows if "good" in str(row["image"])]
    bad = [row["score"] for row in rows if "good" not in str(row["image"])]
    bins = np.linspace(min(good + bad), max(good + bad), 30)
    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    axis.hist(good, bins, alpha=0.7, label="clean")
    axis.hist(bad, bins, alpha=0.7, label="with a defect")
    threshold = min(row["score"] for row in rows if row["is_anomalous"])
    axis.axvline(threshold, color="black", linestyle="--", label="smallest score called anomalous")
    axis.set(xlabel="score", ylabel="crops")
    axis.legend(frameon=False)
    save(figure, "tour-scores.png")


def draw_training(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record and "memory_bytes" in record]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 3.6), layout="constrained", sharex=True)
    for phase in (1, 2):
        chosen = [(at, record) for at, record in enumerate(records) if record["phase"] == phase]
        above.plot([at for at, _ in chosen], [record["loss"] for _, record in chosen], label=f"phase {phase}")
        below.plot([at for at, _ in chosen], [record["memory_bytes"] / 2**20 for _, record in chosen])
    above.set(ylabel="loss")
    above.legend(frameon=False)
    below.set(ylabel="memory, MiB", xlabel="lines of metrics.jsonl")
    below.set_ylim(bottom=0)
    save(figure, "tour-training.png")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(DOCS / name, dpi=100)
    plt.close(figure)
    print(DOCS / name)


def main() -> None:
    run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tour")
    run(run_dir)
    for draw in (draw_maps, draw_scores, draw_training):
        draw(run_dir)


if __name__ == "__main__":
    main()
