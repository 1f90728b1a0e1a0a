"""Eight processes, far more than this machine has processors: the training is still that of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from images import write_images
from jobs import launch
from outcome import assert_done, read, read_lines
from safetensors.torch import load_file

from trajdist.cli import main

WORLD = 8
TINY = ("data.image_size=32", "model.spatial_resolution=2", "data.num_workers=0", "checkpoint.every_steps=2")


def arguments(images: Path, run_dir: Path, batch_size: int) -> list[str]:
    sets = {"path": images, "num_samples": -1, "num_epochs": 2, "batch_size": batch_size}
    data = [f"data.{name}.{key}={value}" for name in ("imagenet", "domain") for key, value in sets.items()]
    # PCA of few images has directions of nearly equal variance, which rounding turns about.
    fixed = ["calibration.holdout_fraction=0", "trajectory.projection=random", "runtime.mixed_precision=no"]
    return ["run", "debug", f"run_dir={run_dir}", *TINY, *data, *fixed]


def losses(run_dir: Path) -> list[float]:
    lines = read_lines(run_dir, "metrics.jsonl")
    return [line["loss"] for line in lines if line["event"] == "step"]


def ledger(run_dir: Path) -> list[dict]:
    lines = read_lines(run_dir, "ledger.jsonl")
    return [{**line, "num_processes": 0} for line in lines]


@pytest.mark.usefixtures("fresh_accelerate")
def test_eight_processes_are_one_process(tmp_path):
    """11 images: the second step has three, and five processes have none."""
    images = write_images(tmp_path / "images", 11)
    done = launch(arguments(images, tmp_path / "many", 1), num_processes=WORLD, timeout_s=200)
    assert done.returncode == 0, done.stderr
    assert main(arguments(images, tmp_path / "one", WORLD)) == 0
    assert {phase["num_processes"] for phase in read(tmp_path / "many", "summary.json").values()} == {WORLD}
    assert_done(tmp_path / "many")
    assert ledger(tmp_path / "many") == ledger(tmp_path / "one")
    # Two steps in each of two epochs of both phases.
    assert len(losses(tmp_path / "one")) == 8
    torch.testing.assert_close(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-6)
    for file in ("phase1/model.safetensors", "phase2/adapter/adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / "many" / file), load_file(tmp_path / "one" / file)
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(
                weight, theirs[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
