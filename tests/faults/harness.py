"""Jobs that are to be interrupted, and the comparison with one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jobs import REPOSITORY, Finished, Job, launch, start
from outcome import assert_done, read_lines
from safetensors.torch import load_file

HERE = Path(__file__).parent
FIXED = ("runtime.mixed_precision=no", "checkpoint.every_steps=2", "logging.every_steps=1")
# What depends on the clock and on the allocator.
UNSTEADY = ("images_per_s", "memory_bytes", "peak_memory_bytes")
WEIGHTS = ("phase1/model.safetensors", "phase2/adapter/adapter_model.safetensors")


def arguments(run_dir: Path, *overrides: str, command: str = "run") -> list[str]:
    return [command, "debug", f"run_dir={run_dir}", *FIXED, *overrides]


def environment(fault: str = "") -> dict[str, str]:
    # As launch/multi_gpu.sh has it.
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    return {"PYTHONPATH": f"{REPOSITORY}:{HERE}", "FAULT": fault, "TORCHELASTIC_SIGNALS_TO_HANDLE": signals}


def run_with(fault: str, run_dir: Path, world: int = 1, *overrides: str) -> Finished:
    """One attempt, to its end."""
    return launch(arguments(run_dir, *overrides), world, env=environment(fault), module="faulty", timeout_s=150)


def begin(run_dir: Path, world: int = 1, *overrides: str) -> Job:
    """One attempt, left running."""
    return start(arguments(run_dir, *overrides), world, env=environment(), module="faulty")


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "status.json").read_text())["status"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_lines(run_dir, "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in UNSTEADY} for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return {f"{file}:{name}": value for file in WEIGHTS for name, value in load_file(run_dir / file).items()}


def assert_identical(run_dir: Path, reference: Path) -> None:
    """As if nothing had happened: the same bits."""
    assert_done(run_dir)
    assert metrics(run_dir) == metrics(reference)
    ours, theirs = weights(run_dir), weights(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def ledger(run_dir: Path) -> set[tuple[int, int, int, int, int]]:
    """The images of every step: phase, epoch, positions and their digest."""
    lines = read_lines(run_dir, "ledger.jsonl")
    return {(line["phase"], line["epoch"], line["start"], line["stop"], line["digest"]) for line in lines}
