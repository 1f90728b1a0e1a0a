"""The loop: the same on any number of processes, in constant memory, with the losses it has always had."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from images import write_images
from jobs import launch
from outcome import read_lines
from safetensors.torch import load_file

from trajdist.cli import main
from trajdist.extraction.backbones import build_backbone
from trajdist.models.losses import trajectory_losses
from trajdist.runtime.clock import Clock
from trajdist.saved import bundle
from trajdist.saved.checkpoint import newest_checkpoint
from trajdist.saved.rundir import RunDir
from trajdist.training import job as training_job
from trajdist.training import journal, loop, objectives, session
from trajdist.training.journal import BadImages

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
KINDS = ("autoencoder", "vae", "transformer")


def records(run_dir: Path, event: str) -> list[dict]:
    lines = read_lines(run_dir, "metrics.jsonl")
    return [line for line in lines if line["event"] == event]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in records(run_dir, "step")]


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    adapter = run_dir / "phase2" / "adapter" / "adapter_model.safetensors"
    return load_file(run_dir / "phase1" / "model.safetensors") | (load_file(adapter) if adapter.exists() else {})


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """21 images: with global batches of 16 the second step has five, and some processes none."""
    return write_images(tmp_path_factory.mktemp("images"), 21)


def arguments(command: str, images: Path, run_dir: Path, *overrides: str) -> list[str]:
    sets = [f"data.{name}.{key}" for name in ("imagenet", "domain") for key in (f"path={images}", "num_epochs=2")]
    # PCA of few images has directions of nearly equal variance, which rounding turns about.
    fixed = ["calibration.holdout_fraction=0", "trajectory.projection=random", "runtime.mixed_precision=no"]
    return [command, "debug", f"run_dir={run_dir}", *sets, "data.imagenet.num_samples=-1", *fixed, *overrides]


def batches(batch_size: int, accumulation: int) -> list[str]:
    keys = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "num_samples": -1}
    return [f"data.{name}.{key}={value}" for name in ("imagenet", "domain") for key, value in keys.items()]


@pytest.fixture(scope="module")
def one_process(images, tmp_path_factory) -> Path:
    """Global batches of 16 in one go."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert main(arguments("run", images, run_dir, *batches(16, 1))) == 0
    return run_dir


def assert_same_training(run_dir: Path, other: Path) -> None:
    torch.testing.assert_close(losses(run_dir), losses(other), rtol=1e-5, atol=1e-6)
    ours, theirs = final_weights(run_dir), final_weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_two_processes_and_accumulation_are_one_process(images, one_process, tmp_path):
    """Through the launcher: 2 processes x 4 images x 2 micro-batches = 1 process x 16 images."""
    done = launch(arguments("run", images, tmp_path / "run", *batches(4, 2)), num_processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "run", one_process)
    steps = records(tmp_path / "run", "step")
    assert [line["images"] for line in steps] == [16, 21, 37, 42] * 2
    assert [line["images"] for line in records(tmp_path / "run", "epoch")] == [21, 21] * 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["phase1"]["num_processes"] == 2
    ledgers = [
        [{**json.loads(line), "num_processes": 0} for line in (path / "ledger.jsonl").read_text().splitlines()]
        for path in (tmp_path / "run", one_process)
    ]
    assert ledgers[0] == ledgers[1]


def test_accumulation_in_one_process(images, one_process, tmp_path, fresh_accelerate):
    """Four micro-batches of four: the last step's third and fourth are empty."""
    assert main(arguments("train", images, tmp_path / "run", *batches(4, 4))) == 0
    phase1 = [line["loss"] for line in records(one_process, "step") if line["phase"] == 1]
    torch.testing.assert_close(losses(tmp_path / "run"), phase1, rtol=1e-5, atol=1e-6)


def test_random_numbers_differ_by_step_process_and_micro_batch(images, tmp_path, monkeypatch, fresh_accelerate):
    """Otherwise all would draw the same dropout and the same samples of a VAE."""
    add_gradients, seeds = loop.add_gradients, []

    def noted(*arguments):
        seeds.append(torch.initial_seed())
        return trajectory_losses(*arguments)

    def of_two_processes(job, *rest):
        for rank in (1, 0):
            job.session.processes.rank = rank
            add_gradients(job, *rest)

    monkeypatch.setattr(objectives, "trajectory_losses", noted)
    monkeypatch.setattr(loop, "add_gradients", of_two_processes)
    assert main(arguments("train", images, tmp_path / "run", *batches(4, 2), "data.imagenet.num_epochs=1")) == 0
    assert len(seeds) == 3 * 2 * 2
    assert len(set(seeds)) == len(seeds)


def test_checkpoints_are_saved_by_the_clock_too(images, tmp_path, monkeypatch, fresh_accelerate):
    """Each of the twelve steps takes 25 seconds: more than a minute has passed after every third."""
    update, steps = loop.update, []
    monkeypatch.setattr(loop, "update", lambda *given: (steps.append(given), update(*given)))
    clock = SimpleNamespace(monotonic=lambda: 1000.0 + 25.0 * len(steps))
    for module in (loop, training_job):
        monkeypatch.setattr(module, "time", clock)
    own = ["checkpoint.every_steps=1000", "checkpoint.every_minutes=1", "checkpoint.keep=20"]
    assert main(arguments("train", images, tmp_path / "run", *batches(4, 1), *own)) == 0
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [f"step-{number:08d}" for number in (3, 6, 9, 12)]


def test_chosen_places_depend_on_no_batch(images, tmp_path, fresh_accelerate):
    """A share of the places of each image: the same ones however the step is cut into micro-batches."""
    share = "train.cell_fraction=0.5"
    assert main(arguments("train", images, tmp_path / "one", *batches(16, 1), share)) == 0
    assert main(arguments("train", images, tmp_path / "four", *batches(4, 4), share)) == 0
    assert main(arguments("train", images, tmp_path / "all", *batches(16, 1))) == 0
    torch.testing.assert_close(losses(tmp_path / "four"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-6)
    assert losses(tmp_path / "one") != losses(tmp_path / "all")
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "all"), rtol=0.2, atol=0.1)


def test_unreadable_images_leave_the_mean_of_the_others(images, tmp_path, fresh_accelerate):
    """A first step with three bad images of eight has the loss of the five good ones."""
    write_images(tmp_path / "images", 8)
    for number in (1, 4, 6):
        (tmp_path / "images" / f"{number:04d}.png").write_bytes(b"spoilt")
    overrides = [*batches(8, 1), "data.max_bad_fraction=1", "data.imagenet.num_epochs=1"]
    assert main(arguments("train", tmp_path / "images", tmp_path / "bad", *overrides)) == 0
    for number in (1, 4, 6):
        (tmp_path / "images" / f"{number:04d}.png").unlink()
    assert main(arguments("train", tmp_path / "images", tmp_path / "good", *overrides)) == 0
    torch.testing.assert_close(losses(tmp_path / "bad"), losses(tmp_path / "good"), rtol=1e-5, atol=1e-6)
    for name, weight in final_weights(tmp_path / "bad").items():
        torch.testing.assert_close(weight, final_weights(tmp_path / "good")[name], rtol=1e-3, atol=1e-5)
    named = [json.loads(line)["image"] for line in (tmp_path / "bad" / "bad_images.jsonl").read_text().splitlines()]
    assert named == ["0001.png", "0004.png", "0006.png"]


def test_many_bad_images_are_listed_in_one_write(tmp_path, monkeypatch):
    """On a network file system each write of a file that is opened for it takes milliseconds."""
    writes, append = [], RunDir.append
    monkeypatch.setattr(RunDir, "append", lambda self, file, *lines: (writes.append(lines), append(self, file, *lines)))
    processes = SimpleNamespace(is_main=True, gather=list)
    (tmp_path / "bad_images.jsonl").write_text('{"set": "imagenet", "image": "7.png"}\n{"torn')
    rundir = RunDir(tmp_path)
    rundir.sweep()
    bad_images, other = BadImages(rundir, processes), BadImages(rundir, processes)
    bad_images.note([(number, "spoilt") for number in range(99, -1, -1)])
    assert bad_images.write("imagenet", lambda number: f"{number}.png") == list(range(100))
    named = [json.loads(line)["image"] for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert named == ["7.png", *(f"{number}.png" for number in range(100) if number != 7)]
    assert [len(lines) for lines in writes] == [99]
    other.note([(7, "spoilt"), (100, "spoilt"), (3, "spoilt")])
    assert other.write("imagenet", lambda number: f"{number}.png") == [3, 7, 100]
    bad_images.note([(100, "spoilt")])
    bad_images.write("imagenet", lambda number: f"{number}.png")
    last = (tmp_path / "bad_images.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["image"] == "100.png"
    assert [len(lines) for lines in writes] == [99, 1, 0]


def test_a_gradient_that_is_not_finite_is_in_no_checkpoint(images, tmp_path, monkeypatch, capsys, fresh_accelerate):
    """The loss of its step is finite, and a checkpoint is due after it."""
    add_gradients = loop.add_gradients

    def spoilt(job, step, *rest):
        add_gradients(job, step, *rest)
        if step.index == 2:
            next(job.model.parameters()).grad[0] = float("inf")

    monkeypatch.setattr(loop, "add_gradients", spoilt)
    overrides = [*batches(16, 1), "checkpoint.every_steps=1"]
    assert main(arguments("train", images, tmp_path / "run", *overrides)) == 1
    told = capsys.readouterr().err
    assert told.startswith("trajdist: the gradient of phase 1 was no longer finite at step 3, on the images ")
    path, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert path.name == "step-00000002"
    assert all(weight.isfinite().all() for weight in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize(
    ("sound", "most", "stop", "ends_at"), [(1, 30, 4, None), (None, 30, 4, 4), (None, 3, 4, 3), (None, 30, 1, 4)]
)
def test_steps_that_fp16_skips(images, tmp_path, monkeypatch, capsys, fresh_accelerate, sound, most, stop, ends_at):
    """In a run of four: all but one; all of them, which would leave the model untrained, also over a restart; more in a
    row than may be.
    """
    add_gradients, start = loop.add_gradients, session.start_accelerator

    def with_scale(*rest):
        accelerator = start(*rest)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    def spoilt(job, step, *rest):
        add_gradients(job, step, *rest)
        if step.index != sound:
            next(job.model.parameters()).grad[0] = float("nan")
        if step.index == stop:
            job.session.stop.ask("it is tested")

    monkeypatch.setattr(session, "start_accelerator", with_scale)
    monkeypatch.setattr(loop, "add_gradients", spoilt)
    monkeypatch.setattr(journal, "MOST_SKIPPED", most)
    command = arguments("train", images, tmp_path / "run", *batches(16, 1), "checkpoint.every_steps=1")
    if stop < 4:
        assert main(command) == 75
    assert main(command) == (0 if ends_at is None else 1)
    if ends_at is not None:
        said = f"was no longer finite at step {ends_at} (fp16 has skipped {ends_at - 1} before it), on the images "
        assert capsys.readouterr().err.startswith(f"trajdist: the gradient of phase 1 {said}")


def live_tensors() -> tuple[int, int]:
    """How many tensors are alive, and the bytes of their memory."""
    gc.collect()
    # Of what compilers leave behind, some has no contents and some is packed: neither can be measured.
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    alive = [one for one in alive if one.layout == torch.strided]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in alive}
    return len(alive), sum(storages.values())


def test_memory_does_not_grow_with_the_images(images, tmp_path, monkeypatch, fresh_accelerate):
    readings: list[tuple[int, int]] = []
    finish_step = loop.finish_step

    def measured(job, step):
        finish_step(job, step)
        if step.index % 4 == 1:
            readings.append(live_tensors())

    monkeypatch.setattr(loop, "finish_step", measured)
    overrides = [*batches(4, 1), "data.imagenet.num_epochs=4", "checkpoint.every_steps=1000", "logging.every_steps=3"]
    assert main(arguments("train", images, tmp_path / "run", *overrides)) == 0
    # After 8, 24, ... 88 images; by the second reading all that is made once has been made.
    assert len(readings) == 6
    assert set(readings[1:]) == {readings[1]}


def test_the_clock_looks_once_a_round_and_is_told_of_waits(images, tmp_path, monkeypatch, fresh_accelerate):
    """From them it knows whether a GPU waits for the host; on a CPU the calls are the same."""
    seen: list[str] = []
    for name in ("look", "waited"):
        monkeypatch.setattr(Clock, name, lambda self, name=name: seen.append(name))
    own = [*batches(4, 1), "logging.every_steps=4", "checkpoint.every_steps=100", "memory.empty_cache_every=6"]
    assert main(arguments("train", images, tmp_path / "run", *own)) == 0
    # Two epochs of six steps.
    assert seen.count("look") == 12
    # On a CPU all steps agree. Lines are due after steps 1, 4, 6, 8 and 12, memory is freed after 6 and 12.
    assert seen.count("waited") == 12 + 5 + 2
    assert seen[:5] == ["look", "waited", "waited", "look", "waited"]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_losses(kind, tmp_path, fresh_accelerate):
    """Refactoring changes no loss. ``TRAJDIST_WRITE_GOLDEN=1`` writes new figures: do it for a reason."""
    path = "skimage:grass"  # Lossless, so that every Pillow decodes it to the same numbers.
    overrides = [f"data.imagenet.path={path}", f"data.domain.path={path}", f"model.type={kind}", "model.num_heads=4"]
    assert main(["run", "debug", f"run_dir={tmp_path}", *overrides, "runtime.mixed_precision=no"]) == 0
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("TRAJDIST_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, kind: losses(tmp_path)}, indent=2) + "\n")
    else:
        assert losses(tmp_path) == pytest.approx(golden[kind], rel=1e-4)


def test_anomaly_detection_names_the_operation(images, tmp_path, monkeypatch, fresh_accelerate):
    def broken(*arguments):
        found = trajectory_losses(*arguments)
        return found._replace(loss=(found.loss * 0.0).sqrt())  # Infinite slope times zero.

    monkeypatch.setattr(objectives, "trajectory_losses", broken)
    try:
        with (
            pytest.raises(RuntimeError, match=r"MulBackward0. returned nan"),
            pytest.warns(UserWarning, match="Error detected"),
        ):
            main(arguments("train", images, tmp_path / "run", "runtime.detect_anomaly=true"))
    finally:
        torch.autograd.set_detect_anomaly(False)


def test_both_phases_share_the_backbone_and_nothing_else(tmp_path, monkeypatch):
    """Phase 2 has the memory that the model and the optimizer of Phase 1 took."""
    built, of_phase1, update = [], [], loop.update

    def build(*args):
        built.append(args)
        return build_backbone(*args)

    def looking(job, step, num_used):
        if step.index == 0 and job.phase == 1:
            of_phase1.extend(map(weakref.ref, (job.task.model, job.optimizer)))
        elif step.index == 0:
            gc.collect()
            assert [reference() for reference in of_phase1] == [None, None]
        update(job, step, num_used)

    monkeypatch.setattr(bundle, "build_backbone", build)
    monkeypatch.setattr(loop, "update", looking)
    assert main(["run", "debug", f"run_dir={tmp_path / 'run'}", "runtime.mixed_precision=no"]) == 0
    assert len(built) == 1
    assert of_phase1
