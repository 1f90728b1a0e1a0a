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


def test_an_epoch_is_as_fast_as_its_own_steps(monkeypatch):
    """From a cache the second epoch is many times faster than the first."""
    minutes = Minutes()
    monkeypatch.setattr(progress, "time", minutes)
    with Progress(Console(quiet=True), "phase 1", 300, done_images=50) as stage:
        rates = []
        for images, seconds in ((100, 10), (150, 10), (200, 1), (250, 1)):
            minutes.now += seconds
            stage.rate(images)
            if images in (150, 250):
                rates.append(stage.lap_rate())
                minutes.now += 60  # A validation.
                stage.go_on()
        assert rates == pytest.approx([5.0, 50.0])
        assert stage.mean_rate() == pytest.approx(200 / 142)
