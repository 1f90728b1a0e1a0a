"""Images that cannot be used, and hardly any images at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from images import write_images
from jobs import launch
from outcome import assert_done

from trajdist.cli import main

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def arguments(images: Path, run_dir: Path, *overrides: str) -> list[str]:
    sets = [f"data.{name}.path={images}" for name in ("imagenet", "domain")]
    every = [f"data.{name}.num_samples=-1" for name in ("imagenet", "domain")]
    return ["run", "debug", f"run_dir={run_dir}", *sets, *every, "runtime.mixed_precision=no", *overrides]


def bad_images(run_dir: Path) -> list[tuple[str, str]]:
    lines = map(json.loads, (run_dir / "bad_images.jsonl").read_text().splitlines())
    return [(line["set"], line["image"]) for line in lines]


def test_each_bad_image_is_listed_once(tmp_path, capsys):
    images = write_images(tmp_path / "images", 12)
    (images / "0002.png").write_bytes(b"")
    (images / "0005.png").write_bytes((images / "0005.png").read_bytes()[:200])
    (images / "0007.png").write_text("an error page")
    (images / "0011.png").unlink()
    os.symlink(tmp_path / "nowhere", images / "0011.png")
    run_dir = tmp_path / "run"
    assert main(arguments(images, run_dir, "data.max_bad_fraction=0.5", "calibration.holdout_fraction=0")) == 0
    named = ["0002.png", "0005.png", "0007.png", "0011.png"]
    assert sorted(bad_images(run_dir)) == [(name, image) for name in ("domain", "imagenet") for image in named]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [(phase["images"], phase["failures"]) for phase in summary.values()] == [(16, 8), (16, 8)]
    assert_done(run_dir)
    capsys.readouterr()
    assert main(["audit", str(run_dir)]) == 0
    assert "phase 1, epoch 2 did without 0002.png (OSError: the file is empty)" in capsys.readouterr().out


@pytest.mark.parametrize("count", [4, 12])
def test_too_many_bad_images(count, tmp_path, capsys):
    """Refused in the statistics pass, before anything is learned; the list is there."""
    images = write_images(tmp_path / "images", 12)
    for number in range(count):
        (images / f"{number:04d}.png").write_bytes(b"spoilt")
    overrides = ["calibration.holdout_fraction=0", f"data.max_bad_fraction={1 if count == 12 else 0.1}"]
    assert main(arguments(images, tmp_path / "run", *overrides)) == 3
    error = capsys.readouterr().err
    said = "none of 12 images could be used" if count == 12 else "4 of 12 images could not be used"
    assert said in error
    assert "bad_images.jsonl" in error
    assert len(bad_images(tmp_path / "run")) == count
    assert not (tmp_path / "run" / "phase1" / "trajectory.safetensors").exists()


def test_images_that_vanish_during_the_training(tmp_path, capsys, monkeypatch):
    from trajdist.training import loop

    images = write_images(tmp_path / "images", 12)
    update = loop.update

    def vanish(*args):
        for file in images.glob("000[0-5].png"):
            file.unlink()
        return update(*args)

    monkeypatch.setattr(loop, "update", vanish)
    assert main(arguments(images, tmp_path / "run", "calibration.holdout_fraction=0")) == 3
    assert "more than data.max_bad_fraction=0.05 allows" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "batch_size"), [(1, 8), (9, 8), (2, 1)], ids=["one image", "a last one", "ones"])
def test_few_images(count, batch_size, tmp_path):
    images = write_images(tmp_path / "images", count)
    sizes = [f"data.{name}.batch_size={batch_size}" for name in ("imagenet", "domain")]
    assert main(arguments(images, tmp_path / "run", *sizes, "calibration.holdout_fraction=0")) == 0
    assert_done(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [phase["images"] for phase in summary.values()] == [2 * count, 2 * count]


def test_more_processes_than_images(tmp_path):
    images = write_images(tmp_path / "images", 1)
    done = launch(arguments(images, tmp_path / "run"), num_processes=2, timeout_s=150)
    assert done.returncode == 0, done.stderr
    assert_done(tmp_path / "run")


@pytest.mark.parametrize("name", ["imagenet", "domain"])
def test_no_images_to_train_on(name, tmp_path, capsys):
    images = write_images(tmp_path / "images", 2)
    assert main(arguments(images, tmp_path / "run", f"data.{name}.num_samples=0")) == 2
    assert f"data.{name}.num_samples = 0 is not possible: input leaves nothing to train on" in capsys.readouterr().err


def test_other_images_than_the_run_began_with(tmp_path, capsys):
    images = write_images(tmp_path / "images", 4)
    assert main(arguments(images, tmp_path / "run")) == 0
    (images / "0003.png").rename(images / "0009.png")
    summary = tmp_path / "run" / "summary.json"
    summary.write_text("{}")
    assert main(arguments(images, tmp_path / "run")) == 3
    assert "restore them, or start over with --fresh" in capsys.readouterr().err
