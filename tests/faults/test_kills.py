"""Killed at any moment and started again by the same command, a run ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from harness import arguments, assert_identical, begin, ledger, metrics, run_with, status, weights
from jobs import Job
from outcome import assert_done

from trajdist.cli import main

STATISTICS = "trajdist.training.extractors:update_moments"
STEP = "trajdist.training.loop:update"
WRITING = "trajdist.saved.checkpoint:_manifest"
BETWEEN_PHASES = "trajdist.training.adaptation:shared_extractor"
SAVING_MODEL = "trajdist.saved.bundle:save_model"
CALIBRATION = "trajdist.training.phases:calibrate"
SAVING_ADAPTER = "trajdist.saved.lora:load_adapter"
SUMMARY = "trajdist.training.phases:finish"


def assert_killed(fault: str, run_dir: Path, world: int = 1) -> None:
    assert run_with(fault, run_dir, world).returncode not in (0, 75)


@pytest.mark.usefixtures("fresh_accelerate")
def test_three_kills(uninterrupted, tmp_path):
    """In the statistics pass, while a checkpoint is being written, while the adapter is being saved."""
    for fault in (f"{STATISTICS}:2:SIGKILL", f"{WRITING}:3:SIGKILL", f"{SAVING_ADAPTER}:1:SIGKILL"):
        assert_killed(fault, tmp_path / "run")
    assert main(arguments(tmp_path / "run")) == 0
    assert_identical(tmp_path / "run", uninterrupted)


def test_two_processes_killed_and_stopped(uninterrupted_by_two, tmp_path):
    """SIGKILL to the second process in a step, SIGUSR1 to it in a later one."""
    killed = run_with(f"{STEP}:3:SIGKILL:1", tmp_path / "run", 2)
    assert killed.returncode != 0
    assert "rank      : 1" in killed.stderr
    assert "process 1 gave no sign of life: run the same command again" in killed.stderr
    stopped = run_with(f"{STEP}:2:SIGUSR1:1", tmp_path / "run", 2)
    assert stopped.returncode == 0
    assert status(tmp_path / "run") == "stopped"
    assert run_with("", tmp_path / "run", 2).returncode == 0
    assert_identical(tmp_path / "run", uninterrupted_by_two)


def test_two_then_one_then_three_processes(uninterrupted_by_two, tmp_path):
    """The steps are those of the number of processes that the run began with."""
    run_dir = tmp_path / "run"
    assert run_with(f"{STEP}:1:SIGTERM:1", run_dir, 2).returncode == 0
    assert run_with(f"{STEP}:2:SIGTERM", run_dir, 1).returncode == 75
    assert run_with("", run_dir, 3).returncode == 0
    assert_done(run_dir)
    ours, theirs = weights(run_dir), weights(uninterrupted_by_two)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    expected = {key: [line[key] for line in metrics(uninterrupted_by_two)] for key in ("images", "loss", "lr")}
    for key, values in expected.items():
        assert [line[key] for line in metrics(run_dir)] == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert ledger(run_dir) == ledger(uninterrupted_by_two)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_process_that_hangs_is_named(tmp_path, capsys):
    """The job ends, resumable, although nobody died."""
    hung = run_with(f"{STEP}:3:hang:1", tmp_path / "run", 2, "runtime.timeout_s=20")
    assert hung.returncode != 0
    assert "process 1 made no progress for runtime.timeout_s=20 seconds" in hung.stderr
    assert status(tmp_path / "run") in ("failed", "running")
    assert main(arguments(tmp_path / "run", "runtime.timeout_s=600")) == 0
    assert "resuming after 32 images" in capsys.readouterr().out
    assert_done(tmp_path / "run")


def test_a_lost_process_is_named_by_one_that_cannot_be_interrupted(tmp_path):
    """NCCL waits in C code; the launcher's SIGTERM comes long before its SIGKILL."""
    lost = run_with(f"{STEP}:3:SIGKILL:1,{STEP}:3:stuck:0", tmp_path / "run", 2)
    assert lost.returncode != 0
    assert "process 1 gave no sign of life when this process was asked to stop: run the same command" in lost.stderr
    assert status(tmp_path / "run") == "failed"


MOMENTS = [
    f"{STATISTICS}:1",
    f"{STATISTICS}:4",
    f"{STEP}:1",
    f"{STEP}:4",
    f"{WRITING}:1",
    f"{WRITING}:2",
    f"{SAVING_MODEL}:1",
    f"{CALIBRATION}:1",
    f"{SUMMARY}:1",
    f"{BETWEEN_PHASES}:1",
    f"{STEP}:2",
    f"{SAVING_ADAPTER}:1",
]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("world", [1, 2])
def test_twenty_kills(world, uninterrupted, uninterrupted_by_two, tmp_path):
    """At every chosen moment, and at random ones, by SIGKILL, SIGTERM and SIGUSR1."""
    draw, run_dir = random.Random(world), tmp_path / "run"
    accidents = 0
    for number, moment in enumerate(MOMENTS):
        what = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1")[number % 4]
        done = run_with(f"{moment}:{what}:{number % world}", run_dir, world)
        accidents += what == "SIGKILL" or status(run_dir) != "done" or done.returncode != 0
    while accidents < 20:
        another = tmp_path / f"random-{accidents}"
        accidents += interrupt_at_random(draw, another, world)
        assert run_with("", another, world).returncode == 0
        assert_identical(another, uninterrupted_by_two if world == 2 else uninterrupted)
    assert run_with("", run_dir, world).returncode == 0
    assert_identical(run_dir, uninterrupted_by_two if world == 2 else uninterrupted)


def interrupt_at_random(draw: random.Random, run_dir: Path, world: int) -> int:
    """Start a run and interrupt it within some seconds; returns how often it happened."""
    job = begin(run_dir, world)
    time.sleep(draw.uniform(3.0, 8.0))
    if job.process.poll() is not None:
        job.end()
        return 0
    strike(job, draw)
    job.end()
    return 1


def strike(job: Job, draw: random.Random) -> None:
    """SIGKILL to all processes, or a signal to the one that was started."""
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    if number == signal.SIGKILL:
        job.kill()
    else:
        job.signal(number)
