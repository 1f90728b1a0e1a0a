"""Runs that nothing interrupted, to compare with; that of one process has other hashes than other jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import arguments, environment
from jobs import launch
from outcome import assert_done


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    return _reference(tmp_path_factory, 1)


@pytest.fixture(scope="session")
def uninterrupted_by_two(tmp_path_factory) -> Path:
    return _reference(tmp_path_factory, 2)


def _reference(tmp_path_factory, world: int) -> Path:
    run_dir = tmp_path_factory.mktemp(f"by_{world}") / "run"
    done = launch(arguments(run_dir), world, env=environment(), module="faulty", from_nothing=world == 1)
    assert done.returncode == 0, done.stderr
    assert_done(run_dir)
    return run_dir
