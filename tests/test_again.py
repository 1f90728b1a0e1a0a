"""A run directory met again: by another command, with another Phase 1 or other images, or after a start in vain."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from images import write_images
from jobs import launch
from outcome import flip_a_weight
from PIL import Image
from torchvision.models import resnet18

from trajdist import load
from trajdist.cli import main
from trajdist.config_files import load_config
from trajdist.errors import ArtifactError, StopRequested
from trajdist.runtime.processes import start_accelerator
from trajdist.saved import bundle
from trajdist.saved.rundir import RunDir
from trajdist.sharding import Order, Selection, Step
from trajdist.tools.audit import audit
from trajdist.training import adaptation, adoption, extractors, loop, phases, session
from trajdist.training.job import Job

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
PLAIN = "runtime.mixed_precision=no"
ADAPTER = Path("phase2", "adapter", "adapter_model.safetensors")


def made(run_dir: Path) -> dict[str, bytes]:
    """What the phases have made, and the record of the images."""
    files = [*run_dir.glob("phase*/**/*.safetensors"), run_dir / "ledger.jsonl", run_dir / "summary.json"]
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


@pytest.fixture
def first(debug_run, tmp_path) -> Path:
    return shutil.copytree(debug_run, tmp_path / "first")


@pytest.fixture
def adapted(first, tmp_path) -> Path:
    """A run on the Phase 1 of another."""
    assert main(["adapt", "debug", PLAIN, f"phase1={first}", f"run_dir={tmp_path / 'adapted'}"]) == 0
    return tmp_path / "adapted"


def test_run_where_adapt_was_meant_leaves_the_adapter(adapted, first, capsys):
    before = made(adapted)
    assert main(["run", "debug", PLAIN, f"phase1={first}", f"run_dir={adapted}"]) == 2
    assert "is another run's Phase 1, but this command trains its own" in capsys.readouterr().err
    for command in ("run", "train"):
        assert main([command, "debug", PLAIN, f"run_dir={adapted}", "data.imagenet.num_epochs=3"]) == 0
        assert "phase 1 was adopted from another run" in capsys.readouterr().out
    assert made(adapted) == before
    assert not audit(adapted).problems


def test_its_own_phase1_may_be_named(first):
    assert main(["adapt", "debug", PLAIN, f"phase1={first}", f"run_dir={first}"]) == 0
    assert main(["run", "debug", PLAIN, f"phase1={first / 'phase1'}", f"run_dir={first}"]) == 0


def test_another_phase1_than_the_run_has_is_refused(adapted, first, tmp_path, capsys):
    """Even for more epochs; that it is gone is no reason."""
    other = tmp_path / "other"
    assert main(["train", "debug", PLAIN, "seed=1", f"run_dir={other}"]) == 0
    more = [f"run_dir={adapted}", "data.domain.num_epochs=3"]
    assert main(["adapt", "debug", PLAIN, f"phase1={other}", *more]) == 4
    assert "has another Phase 1 than phase1=" in capsys.readouterr().err
    shutil.rmtree(first)
    assert main(["adapt", "debug", PLAIN, f"phase1={first}", *more]) == 0


def test_a_phase1_of_its_own_that_has_begun_is_not_replaced(first, tmp_path, capsys):
    """Its checkpoints would count as newer than those of Phase 2."""
    begun = tmp_path / "begun"
    shutil.copytree(first, begun)
    for name in ("phase1", "phase2"):
        shutil.rmtree(begun / name)
    (begun / "summary.json").unlink()
    assert main(["adapt", "debug", PLAIN, f"phase1={first}", f"run_dir={begun}"]) == 4
    assert "has begun a Phase 1 of its own" in capsys.readouterr().err


def test_phase2_waits_for_the_calibration_of_phase1(first, capsys):
    (first / "phase1" / "calibration.safetensors").unlink()
    assert main(["adapt", "debug", PLAIN, f"run_dir={first}", "data.domain.num_epochs=3"]) == 4
    assert "Phase 1 is not finished in" in capsys.readouterr().err


def test_phase1_does_not_start_over_below_a_phase2(first, capsys):
    """Its summary is gone, the checkpoints of Phase 2 are there."""
    (first / "summary.json").write_text("{}")
    before = (first / "ledger.jsonl").read_bytes()
    assert main(["train", "debug", PLAIN, f"run_dir={first}"]) == 4
    assert "has a Phase 2, but its Phase 1 is not finished" in capsys.readouterr().err
    assert (first / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("changed", ["data.imagenet.path=skimage:gravel", "data.domain.path=skimage:brick"])
def test_a_finished_phase_refuses_other_images(changed, first, capsys):
    before = made(first), (first / "config.yaml").read_bytes()
    assert main(["run", "debug", PLAIN, f"run_dir={first}", changed]) == 3
    assert changed.split("=")[0] in capsys.readouterr().err
    assert (made(first), (first / "config.yaml").read_bytes()) == before


@pytest.mark.parametrize(
    ("command", "changed", "code"),
    [
        ("adapt", ["data.domain.num_epochs=3", "data.domain.path=skimage:brick"], 3),
        ("adapt", ["data.domain.num_epochs=3", "phase1={other}"], 4),
        ("run", ["data.domain.num_epochs=3", "model.hidden_dim=8"], 2),
    ],
)
def test_a_refused_command_leaves_the_config_that_the_run_has(command, changed, code, first, tmp_path, capsys):
    other = shutil.copytree(first, tmp_path / "other")
    (other / "phase1" / "model.safetensors").write_bytes(b"another one")
    before = (first / "config.yaml").read_bytes()
    wanted = [change.format(other=other) for change in changed]
    assert main([command, "debug", PLAIN, f"run_dir={first}", *wanted]) == code
    assert (first / "config.yaml").read_bytes() == before
    assert main([command, "debug", PLAIN, f"run_dir={first}", "data.domain.num_epochs=3"]) == 0
    assert load_config(str(first / "config.yaml"), []).data.domain.num_epochs == 3


@pytest.mark.parametrize(
    "changed",
    [
        "model.dropout=0.1",
        "trajectory.projection=random",
        "backbone.blocks=[layer1.0]",
    ],
)
def test_a_config_that_describes_another_model_than_phase1_is_refused(changed, first, tmp_path, capsys):
    """It would have no effect, and stand in the new run's config all the same."""
    run_dir = tmp_path / "run"
    assert main(["adapt", "debug", PLAIN, f"phase1={first}", f"run_dir={run_dir}", changed]) == 2
    assert re.search(rf"{changed.split('=')[0]}=.*, but the Phase 1 in .* has .*: use that", capsys.readouterr().err)
    assert not (run_dir / "phase1" / "model.safetensors").exists()


def test_heads_count_where_a_model_has_them(first, tmp_path, monkeypatch, capsys):
    """And blocks may be named by other patterns, if these match all that Phase 1 has. Once adopted, it is so."""
    same = ["backbone.blocks=['layer?.*']", "data.domain.num_epochs=1"]
    command = ["adapt", "debug", PLAIN, f"phase1={first}", f"run_dir={tmp_path / 'run'}", "model.num_heads=8", *same]
    monkeypatch.setattr(adoption, "WITHOUT_HEADS", ())
    assert main(command) == 2
    assert "model.num_heads=8, but the Phase 1 in" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
    monkeypatch.setattr(adoption, "WITHOUT_HEADS", ())
    assert main([*command, "data.domain.num_epochs=2"]) == 0


def test_a_domain_beside_several_is_trained(first, tmp_path):
    several = ["data.domain.path=null", *(f"data.domains.{name}.path=skimage:{name}" for name in ("gravel", "brick"))]
    run_dir = tmp_path / "run"
    common = ["adapt", "debug", PLAIN, f"phase1={first}", f"run_dir={run_dir}", "data.domain.num_epochs=1"]
    assert main([*common, *several]) == 0
    assert not (run_dir / "phase2").exists()
    assert main([*common, "data.domain.path=skimage:grass"]) == 0
    assert (run_dir / "phase2" / "adapter").is_dir()


def test_domains_take_the_steps_that_the_run_began_with(first, tmp_path):
    """Begun with two processes, and gone on with one before Phase 2."""
    RunDir(first).remember("num_processes", 2, replace=True)
    names = ("gravel", "brick")
    several = ["data.domain.path=null", *(f"data.domains.{name}.path=skimage:{name}" for name in names)]
    assert main(["adapt", "debug", PLAIN, f"run_dir={first}", "data.domain.num_epochs=1", *several]) == 0
    for name in names:
        domain = first / "domains" / name
        assert json.loads((domain / "run.json").read_text())["num_processes"] == 2
        lines = [json.loads(line) for line in (domain / "ledger.jsonl").read_text().splitlines()]
        assert lines[0]["stop"] - lines[0]["start"] == 2 * 8


def stop(*_: object) -> None:
    raise StopRequested("test")


@contextmanager
def stopped_at(phase: int, step: int) -> Iterator[None]:
    """A stop is asked for once this step is done."""
    finish_step = loop.finish_step

    def finish(job: Job, done: Step) -> None:
        if (job.phase, done.index + 1) == (phase, step):
            job.session.stop.ask("test")
        finish_step(job, done)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "finish_step", finish)
        yield


@pytest.mark.parametrize("subset", [[], ["data.imagenet.num_samples=20"]])
def test_a_start_that_came_to_nothing_fixes_nothing(subset, tmp_path, monkeypatch):
    """Neither the number of processes, by which the images of a step are counted, nor the choice of images."""
    for name in ("cat", "dog"):
        write_images(tmp_path / "images" / name, 20, side=64)
    path = f"data.imagenet.path={tmp_path / 'images'}"
    command = ["train", "debug", PLAIN, f"run_dir={tmp_path / 'run'}", path, *subset]
    with monkeypatch.context() as patched:
        patched.setattr(extractors, "measure", stop)
        assert main(command) == StopRequested.exit_code
    RunDir(tmp_path / "run").remember("num_processes", 5, replace=True)
    assert main([*command, "data.imagenet.num_samples=16"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_processes"] == 1
    assert not audit(tmp_path / "run").problems


def test_the_scale_of_gradients_is_the_same_after_a_restart_between_the_phases(tmp_path, monkeypatch):
    """fp16's, on a CPU: it has grown in Phase 1, and gradients are clipped as scaled by it."""

    def start(*arguments: object) -> Accelerator:
        accelerator = start_accelerator(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
        return accelerator

    monkeypatch.setattr(session, "start_accelerator", start)
    for name, commands in (("whole", ["run"]), ("parts", ["train", "run"])):
        for command in commands:
            assert main([command, "debug", PLAIN, f"run_dir={tmp_path / name}"]) == 0
    weights = [(tmp_path / name / ADAPTER).read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


NEARLY_BLACK = "the first images are nearly black"


@pytest.mark.parametrize(("largest", "told"), [(4095, 1), (65535, 0)])
def test_images_of_a_12_bit_camera_are_told_of_once(tmp_path, capsys, largest, told):
    (tmp_path / "images").mkdir()
    for number in range(8):
        grey = np.random.default_rng(number).integers(0, largest + 1, (48, 48)).astype(np.uint16)
        Image.fromarray(grey).save(tmp_path / "images" / f"{number}.png")
    path = f"data.imagenet.path={tmp_path / 'images'}"
    command = ["train", "debug", PLAIN, f"run_dir={tmp_path / 'run'}", path, "data.imagenet.num_samples=-1"]
    for epochs in (1, 2):
        assert main([*command, f"data.imagenet.num_epochs={epochs}"]) == 0
    assert capsys.readouterr().out.count(NEARLY_BLACK) == told
    assert main(["score", str(tmp_path / "run"), str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(NEARLY_BLACK) == told


def test_a_file_of_weights_that_was_moved(tmp_path, capsys):
    """The same weights under another path go on and score; others are refused."""
    files = [tmp_path / name for name in ("old.pt", "new.pt", "other.pt")]
    for seed, file in zip((1, 1, 2), files, strict=True):
        torch.manual_seed(seed)
        torch.save(resnet18().state_dict(), file)
    command = ["debug", PLAIN, f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *command, f"backbone.weights={files[0]}"]) == 0
    files[0].unlink()
    capsys.readouterr()
    assert main(["train", *command, f"backbone.weights={files[2]}"]) == 2
    assert f"backbone.weights={str(files[2])!r}, but the run in " in capsys.readouterr().err
    assert main(["run", *command, f"backbone.weights={files[1]}", "data.domain.num_epochs=1"]) == 0
    assert load_config(str(tmp_path / "run" / "config.yaml")).backbone.weights == str(files[1])
    assert len(load(tmp_path / "run").detectors) == 1


def test_a_file_of_weights_that_was_moved_is_found_by_finished_domains(tmp_path):
    files = [tmp_path / name for name in ("old.pt", "new.pt")]
    torch.save(resnet18().state_dict(), files[0])
    command = ["run", "debug", PLAIN, f"run_dir={tmp_path / 'run'}", "data.domain.num_epochs=1"]
    domain = "data.domains={brick: {path: skimage:brick}}"
    assert main([*command, "data.domain.path=null", domain, f"backbone.weights={files[0]}"]) == 0
    files[0].rename(files[1])
    assert main([*command, "data.domain.path=null", domain, f"backbone.weights={files[1]}"]) == 0
    assert len(load(tmp_path / "run" / "domains" / "brick").detectors) == 1


def test_weights_that_cannot_be_saved_cost_nothing(tmp_path, monkeypatch, capsys):
    """A finished phase that went on to more epochs: the old model and its calibration are still there, and score."""
    command = ["train", "debug", PLAIN, f"run_dir={tmp_path}"]
    assert main(command) == 0
    before = [(tmp_path / "phase1" / name).read_bytes() for name in ("model.safetensors", "calibration.safetensors")]

    def full(*_):
        raise ArtifactError("no room.")

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "save_model", full)
        assert main([*command, "data.imagenet.num_epochs=3"]) == 4
    after = [(tmp_path / "phase1" / name).read_bytes() for name in ("model.safetensors", "calibration.safetensors")]
    assert after == before
    assert len(load(tmp_path).detectors) == 1


def test_phase2_goes_on_above_a_phase1_that_was_going_on_to_more_epochs(tmp_path, capsys):
    """Its checkpoints have higher numbers than those of Phase 2."""
    run_dir = tmp_path / "run"
    command = ["debug", PLAIN, f"run_dir={run_dir}"]
    assert main(["train", *command]) == 0
    with stopped_at(1, 20):
        more = ["data.imagenet.num_epochs=6", "checkpoint.every_steps=5"]
        assert main(["train", *command, *more]) == StopRequested.exit_code
    with stopped_at(2, 3):
        assert main(["adapt", *command]) == StopRequested.exit_code
    capsys.readouterr()
    assert main(["adapt", *command]) == 0
    assert "resuming after 24 images" in capsys.readouterr().out
    assert not audit(run_dir).problems
    before = made(run_dir)
    assert main(["train", *command, *more]) == 0
    assert "Phase 2 is built on these" in capsys.readouterr().out
    assert made(run_dir) == before


def test_more_epochs_below_a_phase2_whose_checkpoints_are_damaged(first, capsys):
    before = made(first)
    for path in first.glob("checkpoints/*/model.safetensors"):
        if json.loads((path.parent / "state.json").read_text())["phase"] == 2:
            path.write_bytes(b"spoilt")
    assert main(["train", "debug", PLAIN, f"run_dir={first}", "data.imagenet.num_epochs=3"]) == 0
    assert "Phase 2 is built on these" in capsys.readouterr().out
    assert made(first) == before


def test_what_a_finished_phase_has_lost_is_made_again(first, capsys):
    """From its checkpoint, unless a later phase is built on it."""
    command = ["run", "debug", PLAIN, f"run_dir={first}"]
    before = made(first)
    shutil.rmtree(first / "phase2" / "adapter")
    assert main(command) == 0
    assert "phase 1 is done (2 epochs): nothing to repeat" in capsys.readouterr().out
    assert made(first).keys() == before.keys()
    assert (first / ADAPTER).read_bytes() == before[str(ADAPTER)]
    lost = first / "phase1" / "model.safetensors"
    lost.unlink()
    assert main(command) == 4
    assert f"{str(lost)!r} is gone or damaged, and Phase 2 is built on it" in capsys.readouterr().err


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (ADAPTER, halve),
        (ADAPTER, flip_a_weight),
        ("phase2/adapter/adapter_config.json", halve),
        ("phase2/calibration.safetensors", halve),
        ("phase2/calibration.safetensors", flip_a_weight),
    ],
)
def test_what_is_damaged_of_a_finished_phase_is_made_again(first, name, damage, capsys):
    before = (first / name).read_bytes()
    damage(first / name)
    assert main(["run", "debug", PLAIN, f"run_dir={first}"]) == 0
    assert f"{str(first / name)!r} is gone or damaged, and made again" in capsys.readouterr().out
    assert (first / name).read_bytes() == before


def test_a_phase1_that_is_damaged_while_phase2_is_under_way(tmp_path, capsys):
    command = ["run", "debug", PLAIN, f"run_dir={tmp_path}"]
    with stopped_at(2, 3):
        assert main(command) == StopRequested.exit_code
    damaged = tmp_path / "phase1" / "calibration.safetensors"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-1])
    assert main(command) == 4
    assert f"{str(damaged)!r} is gone or damaged, and Phase 2 is built on it" in capsys.readouterr().err
    damaged.write_bytes(before)
    assert main(command) == 0


def test_a_stop_of_an_earlier_run_is_told_of(first, capsys):
    (first / "STOP").touch()
    for told in (True, False):
        assert main(["run", "debug", PLAIN, f"run_dir={first}"]) == 0
        assert ("a STOP file from before this start is removed" in capsys.readouterr().out) == told
        assert not (first / "STOP").exists()


@pytest.mark.parametrize(("phase", "command", "of_set"), [(1, "train", "imagenet"), (2, "adapt", "domain")])
def test_a_calibration_of_fewer_epochs_does_not_count(phase, command, of_set, tmp_path, monkeypatch, capsys):
    """A phase that goes on to more epochs and is stopped in its calibration, with its new weights saved."""
    run_dir = tmp_path / "run"
    more = ["debug", PLAIN, f"run_dir={run_dir}", f"data.{of_set}.num_epochs=3"]
    assert main(["run" if phase == 2 else "train", *more[:-1]]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(phases if phase == 1 else adaptation, "calibrate", stop)
        assert main([command, *more]) == StopRequested.exit_code
    with pytest.raises(ArtifactError, match=r"calibration.safetensors' does not exist: the run is not finished"):
        load(run_dir)
    if phase == 1:
        assert main(["adapt", "debug", PLAIN, f"run_dir={run_dir}"]) == 4
        assert "Phase 1 is not finished in" in capsys.readouterr().err
    assert main([command, *more]) == 0
    load(run_dir)


def test_fresh_leaves_the_phase1_that_is_to_be_adapted(first, capsys):
    for named in ([], [f"phase1={first}"]):
        assert main(["adapt", "debug", PLAIN, f"run_dir={first}", *named, "--fresh"]) == 2
        assert f"name another run_dir, with phase1={str(first)!r}" in capsys.readouterr().err
    assert (first / "phase1" / "model.safetensors").is_file()


def test_the_config_of_a_run_that_was_moved(first, tmp_path, capsys):
    old = load_config(str(first / "config.yaml")).run_dir
    assert main(["run", str(first / "config.yaml"), "data.imagenet.num_epochs=3"]) == 2
    assert f"run_dir={old!r} is not where" in (told := capsys.readouterr().err)
    assert f"add run_dir={first} to resume" in told
    assert main(["run", str(first / "config.yaml"), f"run_dir={first}"]) == 0


def test_a_changed_key_of_phase2_does_not_cost_phase1(first, capsys):
    assert main(["adapt", "debug", PLAIN, f"run_dir={first}", "domain_adaptation.lora.rank=3"]) == 2
    assert f"or adapt again with phase1={str(first)!r} in another run_dir" in capsys.readouterr().err


def test_bad_domain_images_may_be_taken_away_before_phase2_has_made_anything(first, tmp_path, capsys):
    images = write_images(tmp_path / "images", 40, side=64)
    for number in range(4):
        (images / f"{number:04d}.png").write_bytes(b"spoilt")
    run_dir = tmp_path / "run"
    command = ["adapt", "debug", PLAIN, f"phase1={first}", f"run_dir={run_dir}", f"data.domain.path={images}"]
    command += ["domain_adaptation.objective=contrast", "data.domain.num_epochs=1", "data.domain.num_samples=-1"]
    assert main(command) == 3
    assert "could not be used" in capsys.readouterr().err
    for line in (run_dir / "bad_images.jsonl").read_text().splitlines():
        (images / json.loads(line)["image"]).unlink()
    assert main(command) == 0
    (images / "0010.png").unlink()
    assert main([*command, "data.domain.num_epochs=2"]) == 3
    assert f"restore them, or adapt again with phase1={str(run_dir)!r} in another run_dir" in capsys.readouterr().err


def test_what_contrast_measured_before_phase1_went_on_is_measured_anew(tmp_path, monkeypatch):
    command = ["run", "debug", PLAIN, f"run_dir={tmp_path / 'run'}", "domain_adaptation.objective=contrast"]
    with monkeypatch.context() as patched:
        patched.setattr(adaptation, "train", stop)
        assert main([*command, "data.imagenet.num_epochs=1"]) == StopRequested.exit_code
    assert (tmp_path / "run" / "phase2" / "contrast.safetensors").is_file()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["phase"], status["step"]) == (2, 0)
    assert main(command) == 0


def test_the_status_names_the_phase_from_its_first_step(tmp_path, monkeypatch):
    told, begin_step = [], loop.begin_step

    def begin(job, step):
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        told.append((status["status"], status["phase"], status["step"]))
        begin_step(job, step)

    monkeypatch.setattr(loop, "begin_step", begin)
    command = ["debug", PLAIN, f"run_dir={tmp_path / 'run'}"]
    assert main(["run", *command, "data.imagenet.num_epochs=1", "data.domain.num_epochs=1"]) == 0
    assert set(told) == {("running", 1, 0), ("running", 2, 0)}
    told.clear()
    assert main(["adapt", *command, "data.imagenet.num_epochs=1"]) == 0
    assert set(told) == {("running", 2, 2)}


def test_a_stop_file_that_cannot_be_removed(tmp_path, capsys):
    (tmp_path / "STOP" / "inside").mkdir(parents=True)
    assert main(["train", "debug", PLAIN, f"run_dir={tmp_path}"]) == 4
    assert f"{str(tmp_path / 'STOP')!r} cannot be removed" in capsys.readouterr().err


def test_one_bad_image_among_few_that_are_held_out(tmp_path, capsys):
    images = write_images(tmp_path / "images", 60)
    held_out = Selection.draw(60, -1, 0.1, 0, 1).holdout(0, np.arange(6))
    common = [PLAIN, f"data.imagenet.path={images}", "data.imagenet.num_samples=-1", "validation.every_epochs=1"]
    (images / f"{held_out[0]:04d}.png").write_bytes(b"spoilt")
    assert main(["train", "debug", *common, f"run_dir={tmp_path / 'one'}"]) == 0
    for number in held_out:
        (images / f"{number:04d}.png").write_bytes(b"spoilt")
    assert main(["train", "debug", *common, f"run_dir={tmp_path / 'all'}"]) == 3
    assert "none of 6 images could be used" in capsys.readouterr().err


def test_held_out_images_of_shards_are_visited_shard_by_shard():
    plain = Selection.draw(100, -1, 0.3, 0, 1, max_holdout=12)
    by_shards = Selection.draw(100, -1, 0.3, 0, 1, Order([20] * 5, 2), max_holdout=12)
    positions = np.arange(12)
    chosen = plain.holdout(0, positions)
    assert not np.array_equal(np.sort(chosen), chosen)
    assert np.array_equal(plain.held_out(12)(0, positions), chosen)
    walk = pickle.loads(pickle.dumps(by_shards.held_out(12)))
    assert np.array_equal(walk(0, positions), np.sort(chosen))
    assert np.array_equal(walk(0, positions[3:5]), np.sort(chosen)[3:5])


def test_the_current_folder_cannot_start_over(first, monkeypatch, capsys):
    monkeypatch.chdir(first)
    assert main(["run", "debug", PLAIN, "run_dir=.", "--fresh"]) == 4
    assert "as it is the current folder" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_take_a_phase1_over(first, tmp_path):
    """What the main process finds out, all of them do."""
    adapted = tmp_path / "adapted"
    common = ["debug", PLAIN, f"run_dir={adapted}"]
    assert launch(["adapt", *common, f"phase1={first}"], num_processes=2).returncode == 0
    before = made(adapted)
    done = launch(["run", *common], num_processes=2)
    assert done.returncode == 0, done.stderr
    assert made(adapted) == before
