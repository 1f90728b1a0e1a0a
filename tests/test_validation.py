"""Validation between epochs: what it measures, what it keeps, when it stops, and that a restart changes none of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from images import write_images
from jobs import launch, start, stop_after_lines
from outcome import read_lines
from PIL import Image

from trajdist.artifacts import read_tensors
from trajdist.cli import main
from trajdist.config_files import load_config
from trajdist.data.defects import write_labelled
from trajdist.data.sources import open_source
from trajdist.errors import ConfigError
from trajdist.training.keeper import Keeper, is_better
from trajdist.training.validation import Examiner

SMALL = ("data.image_size=32", "runtime.mixed_precision=no", "calibration.holdout_fraction=0.2")
EVERY = "validation.every_epochs=1"


def train(run_dir: Path, *overrides: str) -> list[dict]:
    """Phase 1 of the debug config; its validations."""
    assert main(["train", "debug", f"run_dir={run_dir}", *SMALL, *overrides]) == 0
    return validations(run_dir)


def told_of_choosing(capsys) -> bool:
    """Whether it was said that the held-out images are no longer as good as new ones."""
    return "the held-out images also chose the weights" in " ".join(capsys.readouterr().out.split())


def validations(run_dir: Path) -> list[dict]:
    lines = read_lines(run_dir, "metrics.jsonl")
    return [line for line in lines if line["event"] == "validation"]


def model_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run_dir / "phase1" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def scripted(monkeypatch):
    """Validations with losses from a list; the weights that were validated."""
    seen: list[dict[str, torch.Tensor]] = []

    def script(losses: list[float]) -> list[dict[str, torch.Tensor]]:
        def validate(self: Examiner, weights: dict[str, torch.Tensor]) -> dict:
            seen.append({name: weight.detach().clone() for name, weight in weights.items()})
            return {"loss": losses[len(seen) - 1]}

        monkeypatch.setattr(Examiner, "validate", validate)
        return seen

    return script


def test_off_by_default(debug_run):
    assert not validations(debug_run)
    assert "validation" not in json.loads((debug_run / "summary.json").read_text())["phase1"]


def test_held_out_loss_is_that_of_the_saved_model(tmp_path, fresh_accelerate):
    options = ("data.imagenet.num_epochs=3", "model.type=vae", "train.kl_weight=0.5", "train.learning_rate=0.01")
    found = train(tmp_path / "run", *options, EVERY, "validation.keep=last")
    assert [line["epoch"] for line in found] == [1, 2, 3]
    assert found[0]["images"] == 48
    assert found[2]["loss"] < found[0]["loss"], "it learns"
    for line in found:
        assert line["kl"] > 0.01
        assert line["loss"] == pytest.approx(line["recon"] + 0.5 * line["kl"]), "the whole loss from the first epoch on"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["phase1"]
    assert summary["validation"]["last"] == found[2]
    assert summary["validation"]["kept"] == "last"
    plain = tmp_path / "plain"
    assert not train(plain, *options)
    assert same(model_of(plain), model_of(tmp_path / "run")), "looking changes nothing"


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path, fresh_accelerate, monkeypatch, capsys):
    """It is not compared with others: which weights are the best nobody could tell."""
    validate = Examiner.validate

    def spoilt(self: Examiner, weights: dict[str, torch.Tensor]) -> dict:
        return validate(self, {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()})

    monkeypatch.setattr(Examiner, "validate", spoilt)
    command = ["train", "debug", f"run_dir={tmp_path}", *SMALL, EVERY, "data.imagenet.num_epochs=1"]
    assert main(command) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "the loss of 48 held-out images of data.imagenet.path is not finite" in told


def test_patience_stops_and_the_best_is_kept(tmp_path, fresh_accelerate, scripted, capsys):
    seen = scripted([3.0, 2.0, 1.0, 4.0, 1.5, 0.1])
    found = train(tmp_path, EVERY, "data.imagenet.num_epochs=6", "early_stopping.patience=2")
    assert [line["epoch"] for line in found] == [1, 2, 3, 4, 5]
    assert told_of_choosing(capsys)
    assert same(model_of(tmp_path), seen[2])
    assert not same(model_of(tmp_path), seen[4])
    summary = json.loads((tmp_path / "summary.json").read_text())["phase1"]
    assert (summary["epochs"], summary["validation"]["best"]["epoch"]) == (5, 3)
    assert summary["validation"]["stopped_early"]
    assert main(["audit", str(tmp_path)]) == 0
    again = ["train", "debug", f"run_dir={tmp_path}", *SMALL, EVERY, "early_stopping.patience=2"]
    assert main([*again, "data.imagenet.num_epochs=9"]) == 0
    assert len(seen) == 5, "what stopped early is done"


def test_the_last_is_kept_if_asked_for(tmp_path, fresh_accelerate, scripted, capsys):
    seen = scripted([1.0, 2.0, 3.0])
    train(tmp_path, EVERY, "data.imagenet.num_epochs=3", "validation.keep=last")
    assert not told_of_choosing(capsys)
    assert same(model_of(tmp_path), seen[2])


def test_every_other_epoch_and_the_last(tmp_path, fresh_accelerate, scripted):
    scripted([3.0, 2.0, 1.0])
    found = train(tmp_path, "validation.every_epochs=2", "data.imagenet.num_epochs=5")
    assert [line["epoch"] for line in found] == [2, 4, 5]


def test_the_average_of_the_weights(tmp_path, fresh_accelerate, monkeypatch):
    steps: list[dict[str, torch.Tensor]] = []
    follow, begin = Keeper.follow, Keeper.__init__

    def spy(self: Keeper, weights: dict[str, torch.Tensor], step: int) -> None:
        steps.append({name: weight.detach().double().clone() for name, weight in weights.items()})
        follow(self, weights, step)

    def first(self: Keeper, weights: dict[str, torch.Tensor], *options) -> None:
        steps.append({name: weight.detach().double().clone() for name, weight in weights.items()})
        begin(self, weights, *options)

    monkeypatch.setattr(Keeper, "follow", spy)
    monkeypatch.setattr(Keeper, "__init__", first)
    train(tmp_path, "ema.decay=0.35")
    average, *later = steps
    for decay, weights in zip([1 / 10, 2 / 11, 3 / 12, 4 / 13, 0.35, 0.35, 0.35, 0.35], later, strict=True):
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    saved = model_of(tmp_path)
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-4, atol=1e-6)
    assert not all(torch.equal(saved[name].double(), later[-1][name]) for name in saved)


RESUMED = (EVERY, "ema.decay=0.9", "early_stopping.patience=3", "checkpoint.every_steps=3", "logging.every_steps=1")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_restart_changes_nothing(tmp_path, world):
    """Stopped in the middle, at the same number of processes: byte for byte."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["train", "debug", *SMALL, *RESUMED, "data.imagenet.num_epochs=8", "train.learning_rate=0.02"]
    reference = launch([*options, f"run_dir={whole}"], world)
    assert reference.returncode == 0, reference.stderr
    job = start([*options, f"run_dir={cut}"], world)
    stop_after_lines(job, cut, 6)
    resumed = launch([*options, f"run_dir={cut}"], world)
    assert resumed.returncode == 0, resumed.stderr
    assert validations(cut) == validations(whole)
    assert digest(cut / "phase1" / "model.safetensors") == digest(whole / "phase1" / "model.safetensors")
    assert main(["audit", str(cut)]) == 0


def test_two_processes_find_what_one_finds(tmp_path):
    """Batches that are not full, of ten labelled images of which one is damaged."""
    crops, labelled, runs = write_images(tmp_path / "crops", 5), tmp_path / "labelled", {}
    write_labelled(open_source(str(crops), "source"), labelled)
    (labelled / "test" / "good" / "001.png").write_bytes(b"no picture")
    options = [*SMALL, *RESUMED, f"validation.path={labelled}", "data.max_bad_fraction=0.2"]
    for world, batch in ((1, 8), (2, 4)):
        run_dir = tmp_path / str(world)
        sizes = [f"data.{name}.batch_size={batch}" for name in ("imagenet", "domain")]
        finished = launch(["train", "debug", *options, f"run_dir={run_dir}", *sizes], world)
        assert finished.returncode == 0, finished.stderr
        runs[world] = validations(run_dir)
    assert len(runs[1]) == len(runs[2]) == 2
    for one, two in zip(runs[1], runs[2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["labelled_images"] == two["labelled_images"] == 9
        for key in ("image_auroc", "pixel_auroc"):
            assert one[key] == pytest.approx(two[key], abs=1e-3)


def test_labelled_images_are_judged_as_evaluate_judges_them(tmp_path, fresh_accelerate):
    """In both phases, of which the second whitens as the first left it; wide images, of which the middle is used."""
    crops, labelled, run_dir = write_images(tmp_path / "crops", 9), tmp_path / "labelled", tmp_path / "run"
    write_labelled(open_source(str(crops), "source"), labelled)
    for file in labelled.rglob("*.png"):
        with Image.open(file) as image:
            wide = image.resize((96, 64), Image.Resampling.NEAREST)
        wide.save(file)
    command = ["run", "debug", f"run_dir={run_dir}", "runtime.mixed_precision=no", EVERY, "validation.keep=last"]
    # Fast enough that the adapted model would be whitened otherwise.
    contrast = ["domain_adaptation.objective=contrast", "domain_adaptation.lora.learning_rate=0.05"]
    assert main([*command, *contrast, "data.domain.fit=crop", f"validation.path={labelled}"]) == 0
    for phase in (1, 2):
        out = tmp_path / str(phase)
        evaluate = ["evaluate", str(run_dir), str(labelled), "--phase", str(phase), "--out", str(out)]
        assert main([*evaluate, "--overlays", "none"]) == 0
        found = [line for line in validations(run_dir) if line["phase"] == phase][-1]
        metrics = json.loads((out / "metrics.json").read_text())
        assert found["labelled_images"] == 18
        assert found["image_auroc"] == pytest.approx(metrics["image_auroc"], abs=1e-3)
        assert found["pixel_auroc"] == pytest.approx(metrics["pixel_auroc"], abs=1e-3)


def test_without_masks_images_choose_the_weights(tmp_path, fresh_accelerate, capsys):
    labelled, run_dir = tmp_path / "labelled", tmp_path / "run"
    write_labelled(open_source("skimage:gravel/heldout", "source"), labelled)
    shutil.rmtree(labelled / "ground_truth")
    command = ["train", "debug", f"run_dir={run_dir}", "runtime.mixed_precision=no", EVERY]
    assert main([*command, f"validation.path={labelled}"]) == 0
    assert not told_of_choosing(capsys), "the labelled ones did"
    for found in validations(run_dir):
        assert found["pixel_auroc"] is None
        assert 0 < found["image_auroc"] < 1
    summary = json.loads((run_dir / "summary.json").read_text())["phase1"]
    assert 0 < summary["time"]["validation"] < summary["seconds"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["early_stopping.patience=3"], "early_stopping.patience=3 needs validations"),
        (["validation.path=/x"], "validation.path='/x' needs validations"),
        ([EVERY, "calibration.holdout_fraction=0"], "has nothing to validate on"),
    ],
)
def test_keys_that_need_each_other(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)


def test_good_images_alone_tell_nothing_apart(tmp_path, capsys):
    labelled = tmp_path / "labelled"
    write_labelled(open_source("skimage:gravel/heldout", "source"), labelled)
    for folder in (labelled / "test").iterdir():
        if folder.name != "good":
            for path in folder.iterdir():
                path.unlink()
    command = ["train", "debug", f"run_dir={tmp_path / 'run'}", EVERY, f"validation.path={labelled}"]
    assert main(command) == 3
    assert "only good images" in capsys.readouterr().err


def test_once_there_is_an_auroc_only_a_higher_one_is_better():
    """The labelled images may be unreadable for one validation."""
    none, low, high = ({"loss": loss, "image_auroc": auroc} for loss, auroc in ((0.1, None), (0.9, 0.6), (0.5, 0.9)))
    assert is_better(low, none)
    assert not is_better({"image_auroc": None}, {"image_auroc": None}), "without held-out images there is no loss"
    assert is_better(high, low)
    assert not is_better(none, low)
    assert not is_better(low, high)


def test_of_equal_image_aurocs_that_of_the_pixels_decides_and_then_the_loss():
    first, second, third = (
        {"image_auroc": 1.0, "pixel_auroc": pixel, "loss": loss} for pixel, loss in ((0.8, 0.3), (0.9, 0.5), (0.9, 0.4))
    )
    assert is_better(second, first)
    assert is_better(third, second)
    assert not is_better(third, third)
    assert not is_better(first, second)
