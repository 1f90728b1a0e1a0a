"""One cluster for all tests, and a run on it that nothing interrupts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.missing()
    if reason:
        pytest.skip(reason)
    started = slurm.Cluster()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def uninterrupted(cluster, tmp_path_factory) -> tuple[slurm.Submitted, Path]:
    """A job of two nodes with a process each, finished, and its run directory."""
    folder = tmp_path_factory.mktemp("slurm")
    job = cluster.submit(folder / "log", *slurm.TWO_NODES, *slurm.training(folder / "run"))
    job.end()
    return job, folder / "run"
