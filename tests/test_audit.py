"""The audit finds what a ledger gets wrong, by itself: nothing here asks the training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from images import write_images
from jobs import REPOSITORY
from safetensors.numpy import load_file

from trajdist.cli import main
from trajdist.config import Config
from trajdist.config_files import load_config
from trajdist.data.sources import open_source
from trajdist.data.storage import Access
from trajdist.errors import DataError
from trajdist.saved.rundir import FIGURES, RunDir
from trajdist.sharding import Plan, Selection, digest
from trajdist.tools.audit import audit
from trajdist.training.selection import recall_selection

CONFIG = """\
seed: 7
data: {imagenet: {path: x, num_samples: 50, num_epochs: 2}, domain: {path: y, num_epochs: 3}}
"""
TOTALS = {1: 100, 2: 23}
EPOCHS = {1: 2, 2: 3}


def selection(phase: int) -> Selection:
    return Selection.draw(TOTALS[phase], 50 if phase == 1 else -1, 0.1, 7, phase)


def records(phase: int, worlds: tuple[int, ...], missing: tuple[int, ...] = ()) -> list[dict]:
    """The ledger of a phase in which every epoch's step was taken by another number of processes."""
    chosen = selection(phase)
    plan = Plan(chosen.num_train, EPOCHS[phase], 16, 1, 16)
    lines = []
    for step in plan.steps():
        images = chosen.train(step.epoch, np.arange(step.start, step.stop))
        absent = [int(image) for image in images if image in missing]
        read = np.array([image for image in images if image not in missing], np.int64)
        line = {"phase": phase, "epoch": step.epoch, "start": step.start, "stop": step.stop, "images": len(read)}
        line |= {"digest": digest(read), "missing": absent, "num_processes": worlds[step.index % len(worlds)]}
        lines.append(line)
    return lines


def write_run(folder: Path, lines: list[dict], done: tuple[int, ...] = (1, 2), status: str = "done") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    facts = {"num_processes": 2, "imagenet": {"num_images": 100}, "domain": {"num_images": 23}}
    (folder / "run.json").write_text(json.dumps(facts))
    summary = {f"phase{phase}": {**dict.fromkeys(FIGURES, 1), "epochs": EPOCHS[phase]} for phase in done}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "status.json").write_text(json.dumps({"status": status}))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def lines() -> list[dict]:
    return records(1, (2,)) + records(2, (2, 1, 3))


def test_a_clean_run(tmp_path, lines, capsys):
    assert main(["audit", str(write_run(tmp_path, lines))]) == 0
    printed = capsys.readouterr().out
    assert "phase 1: 2 epochs of 50 images, 2 processes" in printed
    assert "phase 2: 3 epochs of 21 images, 2, then 1, then 3" in printed
    assert "clean" in printed


def drop(lines: list[dict]) -> None:
    del lines[1]


def repeat(lines: list[dict]) -> None:
    lines.insert(1, lines[1])


def swap(lines: list[dict]) -> None:
    lines[0]["digest"], lines[1]["digest"] = lines[1]["digest"], lines[0]["digest"]


def shorten(lines: list[dict]) -> None:
    lines[3]["stop"] -= 1


def hide(lines: list[dict]) -> None:
    """Nobody may call an image missing that was not in the range."""
    stranger = int(selection(1).train(0, np.arange(20, 21))[0])
    lines[0]["missing"], lines[0]["images"] = [stranger], 15
    lines[0]["digest"] -= digest(np.array([stranger]))


def miscount(lines: list[dict]) -> None:
    lines[2]["images"] += 1


def overrun(lines: list[dict]) -> None:
    lines[3]["stop"] = 51


def end_early(lines: list[dict]) -> None:
    del lines[-1]


def spoil(lines: list[dict]) -> None:
    lines[0] = {"phase": "one"}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop, "line 2: phase 1, epoch 1 leaves a gap: 16 images (epoch 1 position 16 to epoch 1 position 31) are"),
        (repeat, "line 3: phase 1, epoch 1 repeats images: 16 images (epoch 1 position 16 to epoch 1 position 31)"),
        (swap, "line 1: phase 1, epoch 1 did not train on the images that positions 0 to 16 stand for"),
        (shorten, "line 5: phase 1, epoch 2 leaves a gap: 1 images (epoch 1 position 49 to epoch 1 position 49)"),
        (hide, "line 1: phase 1, epoch 1 did not train on the images that positions 0 to 16 stand for"),
        (miscount, "line 3: phase 1, epoch 1 did not train on"),
        (overrun, "line 4: phase 1, epoch 1 has only positions 0 to 50, not 48 to 51"),
        (end_early, "phase 2 is incomplete: 5 images (epoch 3 position 16 to epoch 3 position 20) are missing"),
        (spoil, "ledger line 1 is not a record of this run"),
    ],
)
def test_what_is_wrong_is_said(damage: Callable[[list[dict]], None], sentence, tmp_path, lines, capsys):
    damage(lines)
    assert main(["audit", str(write_run(tmp_path, lines))]) == 1
    assert sentence in capsys.readouterr().out


def test_the_images_are_named_as_far_as_the_set_is_there(tmp_path, lines):
    """By number where the set is gone or another one now; the first few of them, in the order of the epoch."""
    drop(lines)
    numbers = selection(1).train(0, np.arange(16, 19))
    run_dir = write_run(tmp_path / "run", lines)
    by_number = "are missing: " + ", ".join(f"image number {number}" for number in numbers) + ", ..."
    assert audit(run_dir).problems[0].endswith(by_number)

    images = write_images(tmp_path / "images", 100)
    (run_dir / "config.yaml").write_text(CONFIG.replace("path: x", f"path: {images}"))
    assert audit(run_dir).problems[0].endswith(by_number)

    facts = json.loads((run_dir / "run.json").read_text())
    facts["imagenet"]["fingerprint"] = open_source(str(images), "key").fingerprint
    (run_dir / "run.json").write_text(json.dumps(facts))
    by_name = "are missing: " + ", ".join(f"{number:04d}.png" for number in numbers) + ", ..."
    assert audit(run_dir).problems[0].endswith(by_name)


def test_the_set_is_opened_as_training_opened_it(tmp_path, lines, monkeypatch):
    """With the indexes of remote shards in data.cache_dir, and as many retries."""
    opened = []

    def refuse(path: str, key: str, access: Access) -> None:
        opened.append((path, key, access))
        raise DataError("it is gone")

    drop(lines)
    run_dir = write_run(tmp_path, lines)
    (run_dir / "config.yaml").write_text(CONFIG.replace("data: {", "data: {cache_dir: near, read_retries: 5, "))
    monkeypatch.setattr("trajdist.tools.audit.open_source", refuse)
    assert audit(run_dir).problems
    assert opened == [("x", "data.imagenet.path", Access(5, "near"))]


def test_one_image_is_named_alone(tmp_path, lines):
    shorten(lines)
    number = int(selection(1).train(0, np.array([49]))[0])
    assert audit(write_run(tmp_path, lines)).problems[1].endswith(f"are missing: image number {number}")


def test_a_run_under_way(tmp_path, lines, capsys):
    """What is there is checked; a last line that a crash cut short belongs to no step that counts."""
    run_dir = write_run(tmp_path, lines[:10], done=(1,), status="stopped")
    with open(run_dir / "ledger.jsonl", "a") as handle:
        handle.write('{"phase": 2, "ep')
    assert main(["audit", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "status: stopped" in printed
    assert "phase 2: 1 epoch of 21 images, 2, then 1 process; not finished: 0 images of epoch 2 so far" in printed


def test_all_epochs_are_done_and_the_calibration_is_not(tmp_path, lines, capsys):
    assert main(["audit", str(write_run(tmp_path, lines, done=(1,), status="running"))]) == 0
    printed = capsys.readouterr().out
    assert "phase 2: 3 epochs of 21 images" in printed
    assert "not finished: all its epochs are done, but not the calibration" in printed
    assert "epoch 4" not in printed


HOLD = """
import sys
from trajdist.saved.rundir import RunDir
rundir = RunDir(sys.argv[1])
rundir.lock()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["audit", "inspect"])
def test_a_run_that_was_killed_does_not_run(tmp_path, lines, capsys, command):
    """Its status is what it was; the lock of its process is gone."""
    run_dir = write_run(tmp_path, lines[:5], done=(), status="running")

    def told() -> str:
        assert main([command, str(run_dir)]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "no process" in told(), "without a lock, as in a copy"
    run = [sys.executable, "-c", HOLD, str(run_dir)]
    with subprocess.Popen(run, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert "no process" not in told()
        assert "no process" not in told(), "looking does not take the lock"
        holder.kill()
    assert "running (by its status; no process" in told()
    (run_dir / "status.json").write_text('{"status": "failed"}')
    assert "no process" not in told()


def test_images_done_without_are_listed(tmp_path):
    absent = int(selection(2).train(1, np.arange(1))[0])
    run_dir = write_run(tmp_path, records(1, (1,)) + records(2, (1,), (absent,)))
    record = {"set": "domain", "index": absent, "image": "a/broken.jpg", "reason": "OSError: truncated"}
    (run_dir / "bad_images.jsonl").write_text(json.dumps(record) + '\n{"set": "dom')
    found = audit(run_dir)
    assert not found.problems
    wanted = [f"phase 2, epoch {epoch} did without a/broken.jpg (OSError: truncated)" for epoch in (1, 2, 3)]
    assert found.replaced == wanted


def test_of_many_images_done_without_only_the_first_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trajdist.tools.audit.SHOWN", 4)
    absent = tuple(selection(2).train(0, np.arange(5)).tolist())
    run_dir = write_run(tmp_path, records(1, (1,)) + records(2, (1,), absent))
    found = audit(run_dir)
    assert (len(found.replaced), found.num_replaced, found.problems) == (4, 15, [])
    assert main(["audit", str(run_dir)]) == 0
    assert "15 times an image could not be used" in (said := capsys.readouterr().out)
    assert "and 11 more such images, all in bad_images.jsonl" in said


def test_of_many_problems_only_those_that_are_shown_name_images(tmp_path, lines, monkeypatch, capsys):
    monkeypatch.setattr("trajdist.tools.audit.SHOWN", 2)
    for line in lines:
        line["digest"] += 1
    run_dir = write_run(tmp_path, lines)
    named = [problem.count("image number") for problem in audit(run_dir).problems]
    by_phase = [sum(line["phase"] == phase for line in lines) for phase in (1, 2)]
    assert named == [count for lines in by_phase for count in (3, 3, *[0] * (lines - 2))]
    assert main(["audit", str(run_dir)]) == 1
    assert capsys.readouterr().out.count("image number") == 6


@pytest.mark.parametrize(("block", "draws"), [(64, 5), (7, 2 * 8 + 3 * 3)])
def test_the_order_of_a_block_is_drawn_once_for_all_its_lines(tmp_path, lines, monkeypatch, block, draws):
    drawn, train = [], Selection.train

    def counted(self: Selection, epoch: int, positions: np.ndarray) -> np.ndarray:
        drawn.append((self.phase, epoch, *positions))
        return train(self, epoch, positions)

    monkeypatch.setattr("trajdist.tools.audit.CHUNK", block)
    run_dir = write_run(tmp_path, lines)
    monkeypatch.setattr(Selection, "train", counted)
    assert not audit(run_dir).problems
    assert len(drawn) == len(set(drawn)) == draws


def test_a_real_run_with_a_bad_image(tmp_path, fresh_accelerate):
    images = write_images(tmp_path / "images", 12)
    (images / "0003.png").write_bytes(b"spoilt")
    overrides = [f"data.imagenet.path={images}", "data.imagenet.num_samples=-1", "calibration.holdout_fraction=0"]
    overrides += ["data.max_bad_fraction=0.2", "runtime.mixed_precision=no"]
    assert main(["train", "debug", f"run_dir={tmp_path / 'run'}", *overrides]) == 0
    found = audit(tmp_path / "run")
    assert not found.problems
    assert [line.split(" (")[0] for line in found.replaced] == [
        f"phase 1, epoch {epoch} did without 0003.png" for epoch in (1, 2)
    ]


def test_a_real_run_holds_out_no_more_images_than_it_measures(tmp_path, fresh_accelerate):
    images = write_images(tmp_path / "images", 14)
    overrides = [f"run_dir={tmp_path}", f"data.imagenet.path={images}", "data.imagenet.num_samples=-1"]
    overrides += ["calibration.holdout_fraction=0.5", "trajectory.statistics_images=3"]
    assert main(["train", "debug", *overrides, "runtime.mixed_precision=no"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["phase1"]["images"] == 2 * (14 - 3)
    assert not audit(tmp_path).problems
    facts = json.loads((tmp_path / "run.json").read_text())
    for wrong in ("3", 0, True):
        facts["imagenet"]["max_holdout"] = wrong
        (tmp_path / "run.json").write_text(json.dumps(facts))
        assert main(["audit", str(tmp_path)]) == 4


def test_a_run_that_held_out_more_goes_on_with_its_images(tmp_path, monkeypatch, fresh_accelerate):
    """As versions did that had no limit."""
    images = write_images(tmp_path / "images", 14)
    command = ["train", "debug", f"run_dir={tmp_path}", f"data.imagenet.path={images}", "data.imagenet.num_samples=-1"]
    command += ["calibration.holdout_fraction=0.5", "trajectory.statistics_images=3", "runtime.mixed_precision=no"]
    draw = Selection.draw
    with monkeypatch.context() as patched:
        patched.setattr(Selection, "draw", lambda *arguments: draw(*arguments[:6]))
        assert main([*command, "data.imagenet.num_epochs=1"]) == 0
    assert main(command) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["phase1"]["images"] == 2 * 7
    assert not audit(tmp_path).problems
    calibration = load_file(tmp_path / "phase1" / "calibration.safetensors")
    assert calibration["images.counts"].sum() == 3


def trained_and_held_out(run_dir: Path, config: Config, phase: int) -> tuple[set[int], set[int]]:
    selection = recall_selection(RunDir(run_dir), config, phase)
    trained = selection.train(0, np.arange(selection.num_train))
    return set(trained.tolist()), set(selection.holdout(0, np.arange(selection.num_holdout)).tolist())


@pytest.mark.parametrize("earlier", [False, True])
def test_no_phase_trains_on_what_the_other_holds_out(tmp_path, monkeypatch, fresh_accelerate, earlier):
    """If both have the same set; but runs that began with an earlier version go on with their images."""
    images = write_images(tmp_path / "images", 14)
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", "calibration.holdout_fraction=0.5", "runtime.mixed_precision=no"]
    for name in ("imagenet", "domain"):
        overrides += [f"data.{name}.path={images}", f"data.{name}.num_samples=-1", f"data.{name}.batch_size=4"]
    with monkeypatch.context() as patched:
        if earlier:
            draw = Selection.draw
            patched.setattr(Selection, "draw", lambda *arguments: draw(*arguments[:7]))
        assert main(["run", "debug", *overrides, "data.domain.num_epochs=1"]) == 0
    assert main(["run", "debug", *overrides]) == 0
    assert json.loads((run_dir / "summary.json").read_text())["phase2"]["images"] == 2 * 7
    assert not audit(run_dir).problems
    config = load_config("debug", overrides)
    (trained, _), (_, held_out) = (trained_and_held_out(run_dir, config, phase) for phase in (1, 2))
    assert bool(trained & held_out) == earlier
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["domain"].get("split_of") == (None if earlier else 1)
    for wrong in (2, 1.0, True):
        facts["domain"]["split_of"] = wrong
        (run_dir / "run.json").write_text(json.dumps(facts))
        assert main(["audit", str(run_dir)]) == 4


def test_a_real_run_that_was_tampered_with(debug_run, tmp_path):
    run_dir = shutil.copytree(debug_run, tmp_path / "run")
    assert not audit(run_dir).problems
    lines = (run_dir / "ledger.jsonl").read_text().splitlines()
    (run_dir / "ledger.jsonl").write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    assert "leaves a gap" in audit(run_dir).problems[0]


def test_no_run(tmp_path, capsys):
    for missing in ("config.yaml", "ledger.jsonl"):
        assert main(["audit", str(tmp_path)]) == 4
        assert f"has no {missing}: name a run that has begun to train" in capsys.readouterr().err
        (tmp_path / missing).write_text("")


def test_no_torch_is_needed():
    code = "import sys, trajdist.tools.audit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("name", ["run.json", "status.json", "summary.json", "bad_images.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.timeout(60)
def test_no_file_of_a_run_is_waited_for(tmp_path, name, make, capsys):
    """A downloaded run may hold a pipe, which nobody writes to, or a link to a device without an end."""
    write_run(tmp_path, records(1, (2,), missing=(3,)), done=(1,))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    assert main(["audit", str(tmp_path)]) == 4
    assert f"{name}' cannot be read (it is not a regular file)" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_no_tensors_are_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 4
    assert "model.safetensors' is not a regular file" in capsys.readouterr().err
