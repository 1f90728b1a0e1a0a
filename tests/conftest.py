"""Fixtures. Jobs in processes of their own are started with ``from jobs import launch, start``;
small images are made with ``from images import write_images``."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.strategies import none

# Before torch is imported.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ["HF_HUB_OFFLINE"] = "1"
# Jobs have one thread each: a run continued here sums in their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("trajdist", deadline=None, derandomize=True)
settings.load_profile("trajdist")


@given(none())
def make_random_numbers(nothing: None) -> None:
    """Hypothesis makes its random numbers with its first test, and warns where it finds nothing that refers to them.

    Since Python 3.14 it would find nothing after ``gc.freeze``.
    """


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage() -> None:
    """Later collections of garbage skip what is alive now, mostly half a million objects of the libraries.

    Accelerate collects garbage at the end of every phase, which took a quarter of a small run's time.
    """
    make_random_numbers()
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in singletons: forget it before and after."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of ``trajdist run debug``, both phases. Tests that write copy it first."""
    from trajdist.cli import main

    run_dir = tmp_path_factory.mktemp("debug") / "run"
    assert main(["run", "debug", f"run_dir={run_dir}", "runtime.mixed_precision=no"]) == 0
    return run_dir
