"""``--profile`` writes a trace of a few steps and says what is costly; without it nothing is written."""

from __future__ import annotations

import json

import pytest

from trajdist.cli import main
from trajdist.runtime.profiling import TRACED, profiling

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def train(run_dir, *extra: str) -> None:
    overrides = [f"run_dir={run_dir}", "runtime.mixed_precision=no", "calibration.holdout_fraction=0"]
    assert main(["train", "debug", *overrides, *extra]) == 0


def test_a_trace_of_some_steps(tmp_path, capsys):
    train(tmp_path / "run", "--profile")
    trace = json.loads((tmp_path / "run" / "profile" / "phase1.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep")}) == TRACED
    assert "aten::conv2d" in names
    said = capsys.readouterr().out
    assert "profile of 3 steps" in said.replace("\n", " ")
    assert "aten::" in said


def test_no_trace_unasked(debug_run):
    assert not (debug_run / "profile").exists()


def test_too_few_steps_for_a_trace(tmp_path):
    said: list[str] = []
    with profiling(tmp_path / "trace.json", said.append) as tick:
        for _ in range(5):
            tick()
    assert said == ["no profile: it needs 6 steps, but there were 5"]
    assert not (tmp_path / "trace.json").exists()


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").touch()
    said: list[str] = []
    with profiling(tmp_path / "file" / "trace.json", said.append) as tick:
        for _ in range(8):
            tick()
    assert len(said) == 1
    assert "could not be written" in said[0]
