"""What a stage shows while it runs, with a time that the test makes go by."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trajdist.runtime import progress
from trajdist.runtime.progress import Progress


class Minutes:
    """Stands in for ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("quiet", [False, True])
def test_a_stage_without_a_bar_says_once_a_minute_how_far_it_is(monkeypatch, quiet):
    minutes = Minutes()
    monkeypatch.setattr(progress, "time", minutes)
    told = io.StringIO()
    with Progress(Console(file=told, width=120, quiet=quiet), "scoring", 300_000, done_images=100_000) as stage:
        for second in range(1, 151):
            minutes.now += 1
            stage.advance(100_000 + 1000 * second)
    lines = [
        "scoring: 161,000/300,000 images  1000.0 images/s  2:19 left",
        "scoring: 222,000/300,000 images  1000.0 images/s  1:18 left",
    ]
    assert told.getvalue().splitlines() == ([] if quiet else lines)
