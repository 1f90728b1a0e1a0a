"""Two machines with a network between them that fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import network
import pytest
from jobs import Finished, Job, free_port
from outcome import assert_same_bits, read

pytestmark = [pytest.mark.netns, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def two_machines() -> Iterator[network.Network]:
    reason = network.missing()
    if reason:
        pytest.skip(reason)
    made = network.Network()
    yield made
    made.remove()


def begin(machines: network.Network, run_dir: Path, *overrides: str) -> list[Job]:
    """One launcher on each machine."""
    steps = ("data.imagenet.num_epochs=12", "data.domain.num_epochs=1", "checkpoint.every_steps=4")
    arguments = ["run", "debug", f"run_dir={run_dir}", *steps, *overrides]
    port = free_port()
    return [machines.start(number, port, arguments) for number in range(2)]


def end(machines: list[Job], timeout_s: float = 120) -> list[Finished]:
    """Wait for both; whatever happens to one, none is left behind."""
    try:
        return [job.end(timeout_s) for job in machines]
    finally:
        for job in machines:
            job.kill()


def test_the_cable_is_pulled(two_machines, tmp_path):
    """Both machines end by themselves and say why; when the cable is back, the run goes on as if nothing had been."""
    reference, run_dir = tmp_path / "reference", tmp_path / "run"
    uninterrupted = end(begin(two_machines, reference))
    assert [done.returncode for done in uninterrupted] == [0, 0], uninterrupted
    assert {phase["num_processes"] for phase in read(reference, "summary.json").values()} == {2}

    machines = begin(two_machines, run_dir, "runtime.timeout_s=20")
    limit = time.monotonic() + 200
    while not list((run_dir / "checkpoints").glob("step-*")):
        assert all(machine.process.poll() is None for machine in machines), end(machines, 0)
        assert time.monotonic() < limit, end(machines, 0)
        time.sleep(0.05)
    two_machines.cut()
    try:
        first, second = end(machines, 90)
    finally:
        two_machines.mend()
    assert first.returncode != 0
    assert second.returncode != 0
    assert "process 1 gave no sign of life for runtime.timeout_s=20 seconds: run the same command" in first.stderr
    # The second machine can ask nobody.
    assert "the machine of process 0 did not answer for runtime.timeout_s=20 seconds: run the" in second.stderr
    assert read(run_dir, "status.json")["status"] == "failed"

    again = end(begin(two_machines, run_dir))
    assert [done.returncode for done in again] == [0, 0], again
    assert "resuming after" in again[0].stdout
    assert_same_bits(run_dir, reference)
