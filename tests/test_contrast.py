"""Phase 2 against drawn defects: what is drawn, what it costs a model not to see it, and that it learns to."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from images import write_images
from jobs import launch
from outcome import assert_done
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from test_loop import arguments, assert_same_training, batches, records
from torch import nn

from trajdist.cli import main
from trajdist.config import Lora
from trajdist.data.drawing import DefectDraw, draw_defect
from trajdist.data.loader import ImageBatch, SlotDataset
from trajdist.data.sources import open_source
from trajdist.errors import StopRequested
from trajdist.models.reconstruction import Reconstruction
from trajdist.models.registry import build_model
from trajdist.saved.lora import attach
from trajdist.scoring.residuals import ResidualModel
from trajdist.sharding import DRAWING, VALIDATION, Selection, Slots
from trajdist.training import loop
from trajdist.training.objectives import CLEAN, COVERED, ContrastModel, DefectContrast, contrast_losses
from trajdist.training.optimization import make_optimizer
from trajdist.training.validation import Examiner

CONTRAST = ("domain_adaptation.objective=contrast", "checkpoint.every_steps=2")
DRAW = DefectDraw(4, seed=0, phase=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 21)


@pytest.fixture(scope="module")
def one_process(images, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert main(arguments("run", images, run_dir, *batches(16, 1), *CONTRAST)) == 0
    return run_dir


@pytest.mark.parametrize("side", [16, 64, 224])
def test_what_is_not_covered_is_not_changed(side):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    covers = []
    for seed in range(60):
        before = image.copy()
        drawn, cover = draw_defect(image, np.random.default_rng(seed))
        assert np.array_equal(image, before)
        assert (drawn.shape, drawn.dtype, cover.shape) == (image.shape, np.uint8, (side, side))
        assert 0 <= cover.min() < cover.max() <= 1, "there is always something"
        assert np.array_equal(drawn[cover == 0], image[cover == 0])
        covers.append(float((cover > 0.5).mean()))
    assert max(covers) < 0.3


def test_a_defect_is_of_its_position_alone():
    image = np.full((64, 64, 3), 99, np.uint8)
    drawn, coverage = DRAW(image, 1, 5)
    again, same = DRAW(image, 1, 5)
    assert np.array_equal(drawn, again)
    assert np.array_equal(coverage, same)
    assert coverage.shape == (16,)
    others = [DRAW(image, 2, 5), DRAW(image, 1, 6)]
    others += [replace(DRAW, **{key: 1})(image, 1, 5) for key in ("seed", "phase", "purpose")]
    assert not any(np.array_equal(other, drawn) for other, _ in others)


def dataset(images, defects: DefectDraw | None) -> SlotDataset:
    source = open_source(str(images), "data.domain.path")
    return SlotDataset(source, Selection.draw(21, -1, 0, 0, 2).train, 32, "crop", defects=defects)


def test_batches_hold_the_clean_images_first(images):
    plain, pairs = (dataset(images, defects)[Slots(1, 16, 21, 8)] for defects in (None, DRAW))
    assert torch.equal(pairs.images[:8], plain.images)
    assert pairs.images.shape[0] == 16
    assert (pairs.images[8:] != plain.images).any()
    assert pairs.coverage.shape == (8, 16)
    assert torch.equal(pairs.weights, plain.weights)
    assert torch.equal(pairs.digest, plain.digest)
    # However the epoch is cut.
    part = dataset(images, DRAW)[Slots(1, 18, 20, 2)]
    assert torch.equal(part.images[2:], pairs.images[10:12])
    assert torch.equal(part.coverage, pairs.coverage[2:4])


def test_losses_are_the_formula():
    generator = torch.Generator().manual_seed(0)
    clean, drawn = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
    coverage = torch.rand(3, 16, generator=generator).square()
    coverage[:, :5] = 0
    coverage[1] *= 0.08 / coverage[1].max()  # A thin defect.
    coverage[2] = 0.004  # One that covers no place enough.
    limits = [COVERED, 0.04, CLEAN]
    ours = contrast_losses(clean, drawn, coverage)
    for image in range(3):
        missed = [
            np.log1p(np.exp(-s))
            for s, c in zip(drawn[image].tolist(), coverage[image].tolist(), strict=True)
            if c > limits[image]
        ]
        alarms = [np.log1p(np.exp(s)) for s in clean[image].tolist()]
        alarms += [
            np.log1p(np.exp(s))
            for s, c in zip(drawn[image].tolist(), coverage[image].tolist(), strict=True)
            if c < CLEAN
        ]
        wanted = 0.5 * (np.mean(missed) if missed else 0) + 0.5 * np.mean(alarms)
        assert float(ours[image]) == pytest.approx(float(wanted))


@pytest.mark.usefixtures("fresh_accelerate")
def test_held_out_images_get_other_defects(images, tmp_path, monkeypatch):
    """Epoch 0 and positions from 0 on are those of training as well."""
    drawn, draw = [], DefectDraw.__call__

    def noted(self: DefectDraw, image, epoch: int, position: int):
        drawn.append((self.purpose, epoch))
        return draw(self, image, epoch, position)

    monkeypatch.setattr(DefectDraw, "__call__", noted)
    validated = ["validation.every_epochs=1", "calibration.holdout_fraction=0.2", "data.num_workers=0"]
    assert main(arguments("run", images, tmp_path / "run", *batches(16, 1), *CONTRAST, *validated)) == 0
    assert set(drawn) == {(DRAWING, 0), (DRAWING, 1), (VALIDATION, 0)}


@pytest.mark.usefixtures("fresh_accelerate")
def test_accumulation_is_one_batch(images, one_process, tmp_path):
    """Five images in the last step: its third and fourth micro-batch are empty."""
    assert main(arguments("run", images, tmp_path / "run", *batches(4, 4), *CONTRAST)) == 0
    assert_same_training(tmp_path / "run", one_process)


def test_two_processes_are_one(images, one_process, tmp_path):
    done = launch(arguments("run", images, tmp_path / "run", *batches(8, 1), *CONTRAST), num_processes=2, timeout_s=150)
    assert done.returncode == 0, done.stderr
    assert_done(tmp_path / "run")
    assert_same_training(tmp_path / "run", one_process)


@pytest.mark.usefixtures("fresh_accelerate")
def test_stopped_and_resumed_it_is_the_same_to_the_bit(images, one_process, tmp_path, monkeypatch):
    finish_step, begun, rates = loop.finish_step, [], []

    def stopping(job, step):
        if job.phase == 2:
            rates.append([group["lr"] for group in job.optimizer.param_groups])
        if job.phase == 2 and step.index == 1 and not begun:
            begun.append(step)
            job.session.stop.ask("the test wants it")
        finish_step(job, step)

    monkeypatch.setattr(loop, "finish_step", stopping)
    command = arguments("run", images, tmp_path / "run", *batches(16, 1), *CONTRAST)
    assert main(command) == StopRequested.exit_code
    assert begun
    assert main(command) == 0
    # The logistic curve, which follows the adapter, learns ten times as fast.
    assert [logistic / adapter for adapter, logistic in rates] == pytest.approx([10.0] * 4)
    for file in ("phase2/adapter/adapter_model.safetensors", "phase2/calibration.safetensors", "ledger.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (one_process / file).read_bytes(), file


@pytest.mark.usefixtures("fresh_accelerate")
def test_validations_with_other_defects_are_not_compared_with(images, tmp_path, monkeypatch, capsys):
    """The run began with another version, whose defects were easier: its best epoch would never be reached again."""
    validate, losses = Examiner.validate, iter(range(-9, 0))

    def easier(self: Examiner, weights: dict[str, torch.Tensor]):
        return {**validate(self, weights), "loss": next(losses)}

    command = arguments("run", images, tmp_path / "run", *batches(16, 1), *CONTRAST, "validation.every_epochs=1")
    command += ["calibration.holdout_fraction=0.2", "data.num_workers=0"]
    with monkeypatch.context() as earlier:
        earlier.setattr(Examiner, "validate", easier)
        earlier.setattr(loop, "DRAWN", 1)
        assert main(command) == 0
    adapter = tmp_path / "run" / "phase2" / "adapter" / "adapter_model.safetensors"
    before = load_file(adapter)
    adapter.unlink()
    assert main(command) == 0, "made again from the best weights, those of epoch 1: nothing is compared any more"
    assert "draws other defects" not in capsys.readouterr().out
    assert all(torch.equal(weight, before[name]) for name, weight in load_file(adapter).items())
    assert main([*command, "data.domain.num_epochs=4"]) == 0
    assert "draws other defects than the one that the run began with" in " ".join(capsys.readouterr().out.split())
    after = load_file(adapter)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["phase2"]["validation"]["best"]
    assert best["epoch"] > 2
    assert best["loss"] > 0


def test_the_whitening_is_that_of_the_base(one_process):
    frozen, final = (load_file(one_process / "phase2" / f"{name}.safetensors") for name in ("contrast", "calibration"))
    assert torch.equal(final["residual.whitening_FF"], frozen["residual.whitening_FF"])
    assert not torch.equal(final["residual.energy_L"], frozen["residual.energy_L"])


def test_the_adapter_is_plain_peft(one_process):
    names = load_file(one_process / "phase2" / "adapter" / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.") and "lora_" in name for name in names)
    lines = [line for line in records(one_process, "step") if line["phase"] == 2]
    assert all(line["recon"] > 0 and line["loss"] != line["recon"] for line in lines)


def test_a_perfect_reconstruction_has_a_gradient():
    """A score is a root, whose slope at zero is infinite."""
    copier = nn.Linear(8, 8, bias=False)
    nn.init.eye_(copier.weight)

    def copied(trajectories_NLD: torch.Tensor) -> Reconstruction:
        return Reconstruction(copier(trajectories_NLD.flatten(1)).view_as(trajectories_NLD), torch.zeros(1, 1))

    model = ContrastModel(copied, ResidualModel([4, 4], resolution=4), torch.arange(8))
    coverage = (torch.arange(16) < 3).float()[None]
    batch = ImageBatch(torch.empty(0), torch.ones(1), torch.zeros(()), [], coverage=coverage)
    trajectories = torch.randn(2, 4, 4, 2, 4)
    DefectContrast(torch.ones(2, 4, dtype=torch.bool))(model, trajectories, batch, 0.0).loss.sum().backward()
    assert copier.weight.grad.isfinite().all()
    assert model.logistic.grad.any()


def test_it_learns_what_reconstruction_hides():
    """A base that reconstructs the defects' direction is blind to them; the adapter must stop reconstructing it."""
    torch.manual_seed(0)
    base = build_model(
        "autoencoder", length=2, width=4, hidden_dim=4, latent_dim=4, num_layers=0, num_heads=1, dropout=0
    )
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    with torch.no_grad():
        for layer, weight in ((base.encoder[0], basis[:, :4].T), (base.decoder[0], basis[:, :4])):
            layer.weight.copy_(weight)
            layer.bias.zero_()
    adapted = attach(base, Lora(rank=4, alpha=8), "")
    valid_LD = torch.ones(2, 4, dtype=torch.bool)
    model = ContrastModel(adapted, ResidualModel([4, 4], resolution=4), torch.arange(8))
    optimizer = make_optimizer(model, 0.01, 0.25, torch.device("cpu"))
    decay = {weight: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert decay.pop(model.logistic) == 0.0
    assert list(decay.values()) == [0.25] * 4, "A and B of both layers"

    def batch() -> tuple[torch.Tensor, ImageBatch]:
        clean = torch.randn(8, 16, 8)
        coverage = (torch.rand(8, 16) < 0.2).float()
        trajectories = torch.cat([clean, clean + 4.0 * coverage[..., None] * basis[:, 0]]).view(16, 4, 4, 2, 4)
        return trajectories, ImageBatch(torch.empty(0), torch.ones(8), torch.zeros(()), [], coverage=coverage)

    def found() -> float:
        trajectories, drawn = batch()
        logits = model(trajectories.flatten(0, 2))[1][8:].detach()
        return float(roc_auc_score(drawn.coverage.flatten(), logits.flatten()))

    assert found() < 0.65
    for _ in range(150):
        trajectories, drawn = batch()
        DefectContrast(valid_LD)(model, trajectories, drawn, 0.0).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found() > 0.9
