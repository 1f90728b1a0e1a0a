"""Disks that are full, folders that cannot be written, checkpoints that rot."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import arguments, assert_identical
from images import write_images
from safetensors.torch import save_file
from test_stops import at_call, send

from trajdist.cli import main
from trajdist.files import write_json
from trajdist.saved import bundle, checkpoint, lora
from trajdist.scoring import output
from trajdist.training import loop

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond ``limit`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_disk(monkeypatch, module, name: str, number: int, limit: int) -> None:
    """The disk is full while the given call of a function lasts."""
    function, calls = getattr(module, name), []

    def on_a_full_disk(*args, **kwargs):
        calls.append(1)
        with full_disk(limit) if len(calls) == number else contextlib.nullcontext():
            return function(*args, **kwargs)

    monkeypatch.setattr(module, name, on_a_full_disk)


@pytest.mark.parametrize(
    ("module", "name", "number", "limit", "named"),
    [
        (checkpoint.CheckpointWriter, "_write", 2, 20_000, "checkpoints/step-00000004' could not be written"),
        (checkpoint.CheckpointWriter, "_write", 6, 5_000, "checkpoints/step-00000012' could not be written"),
        (loop, "write_line", 5, 100, "metrics.jsonl' cannot be written"),
        (bundle, "save_model", 1, 20_000, "model.safetensors' cannot be written"),
        (lora, "save_adapter", 1, 5_000, "phase2/adapter' cannot be written"),
    ],
    ids=["checkpoint", "last checkpoint", "metrics", "model", "adapter"],
)
def test_a_full_disk(module, name, number, limit, named, uninterrupted, tmp_path, monkeypatch, capsys):
    """One sentence; what was good stays; with space again the run ends as if nothing had happened."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_disk(patch, module, name, number, limit)
        assert main(arguments(run_dir)) == 4
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert json.loads((run_dir / "status.json").read_text())["why"] in error
    kept = sorted((run_dir / "checkpoints").glob("step-*"))
    assert kept
    assert [checkpoint.verify(path) for path in kept] == [None] * len(kept)
    assert main(arguments(run_dir)) == 0
    assert_identical(run_dir, uninterrupted)
    assert not list(run_dir.rglob("*.tmp"))


def test_a_run_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(arguments(tmp_path / "file" / "run")) == 4
    assert "cannot be made (Not a directory): name a folder that can be written" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_directory(tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o500)
    assert main(arguments(tmp_path / "run")) == 4
    assert "Permission denied" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped at its fifth step: checkpoints of the fourth and the fifth."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, loop, "update", 5, send(signal.SIGTERM))
        assert main(arguments(run_dir)) == 75
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]
    return run_dir


def cut(folder: Path) -> None:
    os.truncate(folder / "optimizer.safetensors", 1000)


def flip(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def unlist(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def scribble(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": [1]}')


@pytest.mark.parametrize("damage", [cut, flip, unlist, scribble])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], stopped, uninterrupted, tmp_path, capsys):
    """The one before it is used, and it says so; the damaged one is kept under another name."""
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    damage(run_dir / "checkpoints" / "step-00000005")
    assert main(arguments(run_dir, "checkpoint.keep=1")) == 0
    printed = "".join(capsys.readouterr().out.split("\n"))
    assert "step-00000005' is damaged" in printed
    assert "using the one before it; this one is now 'damaged-step-00000005'" in printed
    assert "resuming after 32 images" in printed
    assert (run_dir / "checkpoints" / "damaged-step-00000005").is_dir()
    assert_identical(run_dir, uninterrupted)


def reseal(folder: Path) -> None:
    """A manifest whose hashes hold: nothing but the contents is wrong."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    write_json(folder / "manifest.json", checkpoint._manifest(folder, names))


HOSTILE = {
    "a list": [],
    "no cursor": {"cursor": None},
    "a cursor inside a step": {"cursor": 33},
    "a huge cursor": {"cursor": 10**30},
    "no books": {"journal": {}},
    "another step size": {"global_batch": 5},
    "another base": {"base": "x"},
    "sizes that are none": {"file_sizes": {"metrics.jsonl": "../x"}},
    "an unknown key": {"__class__": "os.system"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_state(change, stopped, tmp_path, capsys):
    """Hashes that hold make no contents true."""
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    folder = run_dir / "checkpoints" / "step-00000005"
    state = json.loads((folder / "state.json").read_text())
    write_json(folder / "state.json", {**state, **change} if isinstance(change, dict) else change)
    reseal(folder)
    assert main(arguments(run_dir)) == 4
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("tensors", [{"x": torch.ones(3)}, {"0.step": torch.ones(3)}, {"junk.exp_avg": torch.ones(1)}])
def test_hostile_tensors(file, tensors, stopped, tmp_path, capsys):
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    folder = run_dir / "checkpoints" / "step-00000005"
    save_file(tensors, folder / file)
    reseal(folder)
    assert main(arguments(run_dir)) == 4
    assert "does not match the model: it belongs to another run" in capsys.readouterr().err


def test_a_full_disk_while_scoring(uninterrupted, tmp_path, monkeypatch, capsys):
    """One sentence, and the same command goes on."""
    images = write_images(tmp_path / "images", 5)
    command = ["score", str(uninterrupted), str(images), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        fill_disk(patch, output.MapsFile, "write", 1, 300)
        assert main(command) == 4
    error = capsys.readouterr().err
    assert f"--out {str(tmp_path / 'out')!r} cannot be written" in error
    assert error.count("\n") == 1
    assert main(command) == 0
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 5
