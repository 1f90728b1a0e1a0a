"""The clock's stages, with a time that the test makes go by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trajdist.runtime import clock as clocks
from trajdist.runtime.clock import ENOUGH_LOOKS, STAGES, Clock


class Hours:
    """Stands in for ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hours(monkeypatch) -> Hours:
    hours = Hours()
    monkeypatch.setattr(clocks, "time", hours)
    return hours


@pytest.fixture
def clock() -> Clock:
    return Clock(torch.device("cpu"))


def spent(clock: Clock) -> dict[str, float]:
    return {stage: seconds for stage, seconds in clock.seconds().items() if seconds}


def test_stages_add_up(clock, hours):
    for seconds in (1, 2):
        with clock("model"):
            hours.now += seconds
    assert spent(clock) == {"model": 3}
    assert tuple(clock.seconds()) == STAGES


def test_the_rest_of_a_stage_goes_to_another_from_the_last_turn_on(clock, hours):
    with clock("model"):
        for _ in range(2):
            hours.now += 5
            clock.turn("sync")
        hours.now += 3
    with clock("model"):
        hours.now += 1
    assert spent(clock) == {"model": 11, "sync": 3}


def test_a_watched_module_is_taken_out_of_the_stage_around_it(clock, hours):
    class Slow(nn.Module):
        def forward(self) -> None:
            hours.now += 4

    module = Slow()
    with clock.watching(module, "projection", within="backbone"):
        with clock("backbone"):
            hours.now += 6
            module()
            module()
        # As in a stage that is not watched.
        module()
    module()
    assert spent(clock) == {"backbone": 6, "projection": 8}


def test_figures_of_an_earlier_process_are_kept(clock, hours):
    clock.restore({"model": 2.0, "data": 1.0})
    with clock("data"):
        hours.now += 1
    assert spent(clock) == {"model": 2, "data": 2}


class Event:
    """Stands in for a CUDA event, done or not."""

    def __init__(self, enable_timing: bool) -> None:
        self.done = False

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, other: Event) -> float:
        return 1000.0


@pytest.fixture
def events(monkeypatch) -> list[Event]:
    """All events that a clock on a CUDA device has recorded."""
    made: list[Event] = []

    def make(enable_timing: bool) -> Event:
        made.append(Event(enable_timing))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", make)
    return made


def take_a_step(clock: Clock) -> None:
    clock.look()
    for stage in ("backbone", "optimizer"):
        with clock(stage):
            pass


@pytest.mark.parametrize(("done", "share"), [("all", 1.0), ("none", 0.0), ("all but the last", 0.0)])
def test_a_device_that_waits_for_the_host_is_noticed(events, done, share):
    clock = Clock(torch.device("cuda"))
    for _ in range(ENOUGH_LOOKS + 1):
        take_a_step(clock)
        for event in events[: -1 if done == "all but the last" else None]:
            event.done = done != "none"
    assert clock.idle_share == share


def test_few_looks_say_nothing(events):
    clock = Clock(torch.device("cuda"))
    for _ in range(ENOUGH_LOOKS):
        take_a_step(clock)
        for event in events:
            event.done = True
    assert clock.idle_share == 0
    clock.look()
    assert clock.idle_share == 1


@pytest.mark.parametrize("wait", [Clock.waited, Clock.seconds], ids=["told", "of its own"])
def test_a_look_after_a_wait_does_not_count(events, monkeypatch, wait):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = Clock(torch.device("cuda"))
    for _ in range(2 * ENOUGH_LOOKS):
        take_a_step(clock)
        wait(clock)
        # Work of another domain after the wait.
        with clock("optimizer"):
            pass
        for event in events:
            event.done = True
    assert clock.idle_share == 0
