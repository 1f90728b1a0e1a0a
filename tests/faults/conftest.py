"""Runs that nothing interrupted, to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_with
from outcome import assert_done


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    return _reference(tmp_path_factory, 1)


@pytest.fixture(scope="session")
def uninterrupted_by_two(tmp_path_factory) -> Path:
    return _reference(tmp_path_factory, 2)


def _reference(tmp_path_factory, world: int) -> Path:
    run_dir = tmp_path_factory.mktemp(f"by_{world}") / "run"
    done = run_with("", run_dir, world)
    assert done.returncode == 0, done.stderr
    assert_done(run_dir)
    return run_dir
