"""Requests to stop: every signal and the STOP file, in every part of a run, and what may change before it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from harness import arguments, assert_identical, begin, metrics, status, weights

from trajdist import launcher
from trajdist.cli import main
from trajdist.training import adaptation, extractors, loop, phases
from trajdist.training.validation import Examiner

NOISY_STEPS = "gradient_accumulation_steps=2"

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def at_call(monkeypatch, module, name: str, number: int, accident) -> None:
    """Have ``accident()`` happen at the given call of a function."""
    function, calls = getattr(module, name), []

    def with_accident(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            accident()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, with_accident)


def send(number: signal.Signals):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [(extractors, "update_moments", 1), (loop, "update", 3), (phases, "calibrate", 1)],
    ids=["statistics", "step", "calibration"],
)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, "STOP"])
def test_stop_and_go_on(how, module, name, number, uninterrupted, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    accident = (run_dir / "STOP").touch if how == "STOP" else send(how)
    with monkeypatch.context() as patch:
        at_call(patch, module, name, number, accident)
        assert main(arguments(run_dir)) == 75
    assert status(run_dir) == "stopped"
    why = json.loads((run_dir / "status.json").read_text())["why"]
    assert why == ("the file STOP was created" if how == "STOP" else f"received {how.name}")
    assert not (run_dir / "STOP").exists()
    if how == "STOP":
        assert main(arguments(run_dir)) == 0
        assert_identical(run_dir, uninterrupted)


def test_a_validation_that_was_stopped_is_repeated_and_no_other(uninterrupted, tmp_path, monkeypatch):
    """The first one, its repetition, and the one at the end of the phase; nothing else of the run is different."""
    validate, calibrate = (Examiner, "validate"), (adaptation, "calibrate")
    run_dir, validated = tmp_path / "run", ("validation.every_epochs=1", "validation.keep=last")
    for (where, name), number in ((validate, 1), (validate, 1), (validate, 2), (calibrate, 1)):
        with monkeypatch.context() as patch:
            at_call(patch, where, name, number, send(signal.SIGTERM))
            assert main(arguments(run_dir, *validated)) == 75
        assert status(run_dir) == "stopped"
    assert main(arguments(run_dir, *validated)) == 0
    lines = metrics(run_dir)
    found = [(line["phase"], line["epoch"], line["step"]) for line in lines if line["event"] == "validation"]
    assert found == [(1, 1, 4), (1, 2, 8), (2, 1, 2), (2, 2, 4)]
    assert [line for line in lines if line["event"] != "validation"] == metrics(uninterrupted)
    ours, theirs = weights(run_dir), weights(uninterrupted)
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []


def test_noise_is_the_same_after_a_restart(tmp_path, monkeypatch):
    """A VAE's samples and dropout, in several micro-batches: nothing of a generator's state is saved."""
    noisy = ["model.type=vae", "model.dropout=0.1", "domain_adaptation.lora.dropout=0.1"]
    noisy += [f"data.{name}.{key}" for name in ("imagenet", "domain") for key in ("batch_size=4", NOISY_STEPS)]
    assert main(arguments(tmp_path / "whole", *noisy)) == 0
    for number in (3, 5):
        with monkeypatch.context() as patch:
            at_call(patch, loop, "update", number, send(signal.SIGTERM))
            assert main(arguments(tmp_path / "run", *noisy)) == 75
    assert main(arguments(tmp_path / "run", *noisy)) == 0
    assert_identical(tmp_path / "run", tmp_path / "whole")


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    at_call(monkeypatch, loop, "update", 2, send(signal.SIGINT))
    at_call(monkeypatch, loop, "agree", 2, send(signal.SIGINT))
    assert main(arguments(tmp_path / "run")) == 130
    record = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (record["status"], record["why"]) == ("stopped", "received SIGINT twice")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert main(arguments(tmp_path / "run")) == 0


def test_one_interrupt_is_no_second_one(tmp_path, monkeypatch):
    at_call(monkeypatch, loop, "update", 2, send(signal.SIGTERM))
    at_call(monkeypatch, loop, "agree", 2, send(signal.SIGINT))
    assert main(arguments(tmp_path / "run")) == 75


def wait_for(condition, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


MANY_STEPS = ("data.imagenet.num_epochs=500", "checkpoint.every_steps=100")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_processes_whose_launcher_ends_save_and_end(number, tmp_path):
    """Told by the launcher, or left alone by it: either way a checkpoint is saved."""
    job = begin(tmp_path / "run", 2, *MANY_STEPS)
    wait_for((tmp_path / "run" / "ledger.jsonl").exists)
    processes = job.descendants()
    job.signal(number)
    _, alive = psutil.wait_procs(processes, timeout=25)
    job.end()
    assert alive == []
    assert status(tmp_path / "run") == "stopped"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> Path:
    """A run that was stopped after three steps."""
    with monkeypatch.context() as patch:
        at_call(patch, loop, "update", 3, send(signal.SIGTERM))
        assert main(arguments(tmp_path / "run")) == 75
    return tmp_path / "run"


@pytest.mark.parametrize(
    "key",
    ["seed=1", "data.imagenet.batch_size=4", "model.hidden_dim=32", "train.learning_rate=0.1", "data.image_size=32"],
)
def test_a_changed_key_is_refused(key, stopped, capsys):
    before = sorted((stopped / "checkpoints").iterdir())
    assert main(arguments(stopped, key)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trajdist: {key.partition('=')[0]}=")
    assert error.count("\n") == 1
    assert sorted((stopped / "checkpoints").iterdir()) == before


def test_keys_that_change_nothing_are_accepted(stopped, uninterrupted):
    changed = ["data.num_workers=1", "checkpoint.keep=1", "checkpoint.every_steps=1", "runtime.timeout_s=100"]
    assert main(arguments(stopped, *changed)) == 0
    assert_identical(stopped, uninterrupted)


def test_epochs_may_be_added_before_and_after_the_end(stopped, capsys):
    assert main(arguments(stopped, "data.imagenet.num_epochs=3", "data.domain.num_epochs=1")) == 0
    assert main(arguments(stopped, "data.imagenet.num_epochs=3", "data.domain.num_epochs=2")) == 0
    assert "phase 2 has 1 epochs and continues to 2" in capsys.readouterr().out
    assert main(["audit", str(stopped)]) == 0
    printed = capsys.readouterr().out
    assert "phase 1: 3 epochs of 32 images" in printed
    assert "phase 2: 2 epochs of 16 images" in printed


def test_epochs_that_are_done_cannot_be_taken_back(tmp_path, capsys, monkeypatch):
    at_call(monkeypatch, loop, "update", 6, send(signal.SIGTERM))
    assert main(arguments(tmp_path / "run")) == 75
    assert main(arguments(tmp_path / "run", "data.imagenet.num_epochs=1")) == 2
    assert "data.imagenet.num_epochs=1, but the run is in epoch 2" in capsys.readouterr().err


def test_what_is_done_is_not_repeated(uninterrupted, tmp_path, capsys):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    assert main(arguments(run_dir)) == 0
    printed = capsys.readouterr().out
    assert "phase 1 is done (2 epochs): nothing to repeat" in printed
    assert "phase 2 is done (2 epochs): nothing to repeat" in printed
    assert_identical(run_dir, uninterrupted)


def test_fresh_moves_the_old_run_aside(stopped, uninterrupted, capsys):
    before = {file.name: file.read_bytes() for file in stopped.glob("*.jsonl")}
    assert main([*arguments(stopped), "--fresh"]) == 0
    aside = stopped.with_name("run.old-1")
    assert repr(str(aside)) in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in aside.glob("*.jsonl")} == before
    assert_identical(stopped, uninterrupted)


@pytest.mark.parametrize(
    "launched",
    [
        {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "none"},
        {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "7"},
    ],
)
def test_a_restart_by_the_launcher_is_not_fresh(launched, stopped, monkeypatch, capsys):
    """Unless the start before it ended too early to start over: what is there would be another command's."""
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    # A process of a launcher ends with its command; this one goes on.
    monkeypatch.setattr(launcher, "is_launched", lambda: False)
    with monkeypatch.context() as patch:
        at_call(patch, loop, "update", 4, send(signal.SIGTERM))
        assert main([*arguments(stopped), "--fresh"]) == 75
    assert f"the old run is now {str(stopped.with_name('run.old-1'))!r}" in capsys.readouterr().out
    assert main([*arguments(stopped), "--fresh"]) == 0
    assert "resuming after 32 images" in capsys.readouterr().out


def test_a_run_directory_has_one_run(tmp_path, capsys):
    """Neither a second run nor --fresh disturbs the first."""
    job = begin(tmp_path / "run", 1, *MANY_STEPS)
    wait_for((tmp_path / "run" / "ledger.jsonl").exists)
    for extra in ([], ["--fresh"]):
        assert main([*arguments(tmp_path / "run", *MANY_STEPS), *extra]) == 4
        assert "is in use by another run" in capsys.readouterr().err
    job.signal(signal.SIGTERM)
    assert job.end().returncode == 75
