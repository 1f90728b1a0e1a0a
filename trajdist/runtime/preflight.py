"""Checks before anything is written: do all processes run the same thing, and does a first all-reduce work?

The comparison precedes the process group and uses the rendezvous key-value store. Unlike a collective, the store can
tell who is missing, and it works even if one process has a GPU and another has none.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib import metadata
from typing import Any, NoReturn

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from trajdist import __version__, launcher
from trajdist.config import Config
from trajdist.config_schema import flat
from trajdist.data.base import ImageSource
from trajdist.errors import ConfigError, TrainingError, one_line
from trajdist.runtime.memory import lacks_memory
from trajdist.runtime.processes import ONE_EACH, Processes, crowd, device_type, named, precision, why_it_failed
from trajdist.runtime.watchdog import answer_within, end_at_once

# Listing a large folder takes seconds if it is cached, and minutes if it is not.
ARRIVAL_S = 600.0
SUM_S = 120.0
# How long the main process, which may host the store, stays after a failure so that the others can read about it.
FAREWELL_S = 5.0
GO_ON = "check that machine, then run the same command again"
SAME_FILES = "let all machines see the same files"
SAME_COMMAND = "start all processes with the same command"
SAME_VERSION = "install the same version on all machines"
NETWORK = "check the network between the machines (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
NO_GPU = "torch finds no GPU (nvidia-smi shows what this machine has); set ACCELERATE_USE_CPU=true to use its CPUs"
FIXES = {
    "trajdist": SAME_VERSION,
    "torch": SAME_VERSION,
    "accelerate": SAME_VERSION,
    "python": SAME_VERSION,
    "device": "give all processes the same kind of device (nvidia-smi shows what that machine has)",
    "number of images": SAME_FILES,
    "list of images": SAME_FILES,
}
CALL = "preflight/call"
# Where NCCL asks all processes to end, outside any prefix: whoever finds it, although a dead attempt left it, ends.
NCCL_END = "exception_dump"
POLL_S = 0.1


def check_processes_agree(config: Config, sources: Mapping[str, ImageSource]) -> str | None:
    """Compare all processes with the main one; every process calls it before it starts Accelerate.

    Returns:
        The ``init_method`` for torch's process group; None leaves it to Accelerate.

    Raises:
        ConfigError: on the main process if any differ; it names the rank, the field and both values.
        TrainingError: processes that do not show up in time.
        SystemExit: on the other processes, with the exit code of the main one.
    """
    rank, world = launcher.rank_and_world()
    sentence, init_method = launcher.unsupported() or launcher.slurm_problem(world), None
    if not sentence and world > 1:
        meeting = Meeting(rank, world, min(config.runtime.timeout_s, ARRIVAL_S))
        meeting.show("facts", _facts(config, sources, world))
        meeting.gather("facts")
        sentence = meeting.verdict(next(_differences(meeting), "") if rank == 0 else "")
        init_method = meeting.init_method()
    if sentence and rank == 0:
        raise ConfigError(sentence)
    if sentence:
        raise SystemExit(ConfigError.exit_code)
    return init_method


class Meeting:
    """Values that the processes publish to each other through the store, until a deadline in seconds."""

    def __init__(self, rank: int, world: int, deadline_s: float) -> None:
        self.ranks = range(world)
        self._rank, self._deadline_s = rank, deadline_s
        self._store = self._connect()
        self.name = self._call() if rank == 0 else self._answer()

    def _connect(self) -> Any:
        try:
            return next(rendezvous("env://", timeout=timedelta(seconds=self._deadline_s)))[0]
        except RuntimeError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise TrainingError(
                f"the {len(self.ranks)} processes did not find each other at {address} within {self._deadline_s:g} "
                f"seconds ({one_line(error)}): {NETWORK}."
            ) from error

    # A launcher that restarts its processes gives them the old store, with everything that the dead ones wrote. So the
    # main process announces a fresh namespace, in which only live processes answer. Each of these sends a random token
    # and waits until it is echoed: an announcement left over from a dead main process never is.

    def _call(self) -> str:
        self.name = uuid.uuid4().hex
        self.show("here", "")
        _without_prefix(self._store).delete_key(NCCL_END)
        self._store.set(CALL, self.name)
        self.gather("here")
        self.show("tokens", [self.see("here", rank) for rank in self.ranks])
        return self.name

    def _answer(self) -> str:
        token, self.name = uuid.uuid4().hex, ""
        end = time.monotonic() + self._deadline_s + FAREWELL_S
        while time.monotonic() < end:
            if self._has([CALL]):
                heard = self._store.get(CALL).decode()
                if heard != self.name:
                    self.name = heard
                    self.show("here", token)
                if self._has([self._key("tokens", 0)]) and self.see("tokens", 0)[self._rank] == token:
                    return self.name
            time.sleep(POLL_S)
        return self._complain("here", self.ranks if self.name else range(1))

    def init_method(self) -> str:
        """A URL for the process group: the same store, under a prefix free of what earlier attempts left in it."""
        store, rank, world = PrefixStore(self.name, self._store), self._rank, len(self.ranks)
        scheme = f"trajdist{self.name}"
        register_rendezvous_handler(scheme, lambda url, **options: iter([(store, rank, world)]))
        return f"{scheme}://"

    def show(self, what: str, value: Any) -> None:
        """Publish this process's value, which must be JSON-serialisable."""
        self._store.set(self._key(what, self._rank), json.dumps(value))

    def see(self, what: str, rank: int) -> Any:
        """The value of a process that has published one."""
        return json.loads(self._store.get(self._key(what, rank)))

    def gather(self, what: str, ranks: range | None = None) -> None:
        """Wait until these processes have published a value; None for all of them.

        Raises:
            TrainingError: the deadline has passed; it names the missing processes.
        """
        ranks = ranks or self.ranks
        # The main process, which may host the store, reports first; the others report only if it does not.
        patience_s = 0.0 if self._rank == 0 else FAREWELL_S
        if not self._come(what, ranks, self._deadline_s + patience_s):
            self._complain(what, ranks)

    def verdict(self, sentence: str) -> str:
        """The main process's sentence, on every process; empty if nothing is wrong.

        Otherwise the main process waits, for at most :data:`FAREWELL_S` seconds, until all have read it.

        Raises:
            TrainingError: on the other processes if the main one publishes none before the deadline.
        """
        if self._rank == 0:
            self.show("verdict", sentence)
        else:
            self.gather("verdict", range(1))
            sentence = self.see("verdict", 0)
            self.show("heard", True)
        if sentence and self._rank == 0:
            self._come("heard", self.ranks[1:], FAREWELL_S)
        return sentence

    def _key(self, what: str, rank: int) -> str:
        return f"{self.name}/{what}/{rank}"

    def _has(self, keys: list[str]) -> bool:
        try:
            return self._store.check(keys)
        except RuntimeError:
            raise TrainingError("process 0 ended before the processes were compared: see its output.") from None

    def _come(self, what: str, ranks: range, seconds: float) -> bool:
        """Whether these processes publish a value in time."""
        try:
            self._store.wait([self._key(what, rank) for rank in ranks], timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True

    def _complain(self, what: str, ranks: range) -> NoReturn:
        missing = [rank for rank in ranks if not self._has([self._key(what, rank)])]
        raise TrainingError(
            f"{named(missing or [0])} did not answer within {self._deadline_s:g} seconds of the start: {GO_ON}."
        )


def _without_prefix(store: Any) -> Any:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _facts(config: Config, sources: Mapping[str, ImageSource], world: int) -> dict[str, Any]:
    """What must be the same everywhere, and the host. The first difference in this order is the one reported."""
    keys = {name: "validation.path" if name == "validation" else f"data.{name}.path" for name in sources}
    return {
        "host": socket.gethostname(),
        "crowd": crowd(),
        "trajdist": __version__,
        "torch": str(torch.__version__),
        "accelerate": metadata.version("accelerate"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "WORLD_SIZE": world,
        "device": device_type(),
        "config": flat(config),
        # Processes that adapt to domains in another order would sum other things.
        "order of data.domains": list(config.data.domains),
        "mixed precision": precision(config.runtime.mixed_precision),
        **{f"number of images in {keys[name]}": len(source) for name, source in sources.items()},
        **{f"list of images in {keys[name]}": source.fingerprint[:12] for name, source in sources.items()},
    }


def _differences(meeting: Meeting) -> Iterator[str]:
    """Sentences about each process without a GPU of its own, or that differs from the main one."""
    expected = meeting.see("facts", 0)
    for rank in meeting.ranks:
        facts = meeting.see("facts", rank)
        if facts.get("crowd"):
            yield facts["crowd"]
        for field, mine, theirs in _differing(facts, expected):
            fix = FIXES.get(field.partition(" in ")[0], SAME_COMMAND)
            yield f"process {rank} on {facts['host']}: {field} is {mine!r}, process 0 has {theirs!r}: {fix}."


def _differing(values: dict[str, Any], expected: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The fields that differ, those of ``expected`` first, and both values; what is about a machine may differ."""
    for key in expected | values:
        mine, theirs = values.get(key), expected.get(key)
        if key in ("host", "crowd") or mine == theirs:
            continue
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from ((f"{key} {name}", *pair) for name, *pair in _differing(mine, theirs))
        else:
            yield key, mine, theirs


def check_all_reduce(processes: Processes) -> None:
    """Try one all-reduce over the backend that gradients will use; every process calls it.

    If it takes longer than :data:`SUM_S` seconds, the process exits.

    Raises:
        ConfigError: Accelerate did not see all processes.
        TrainingError: a wrong sum, or the backend's own error.
    """
    expected = launcher.rank_and_world()[1]
    if processes.world < expected:
        # Without a GPU, Accelerate treats each process as a job of its own, unless it is told to use the CPU.
        fix = NO_GPU if "LOCAL_RANK" in os.environ else "set LOCAL_RANK as well, or start them by accelerate launch"
        raise ConfigError(f"Accelerate sees {processes.world} processes where WORLD_SIZE is {expected}: {fix}.")
    if processes.world > 1:
        _check_sum(processes, _sum_in_time(processes))


def _check_sum(processes: Processes, found: float | RuntimeError) -> None:
    backend, expected = torch.distributed.get_backend(), processes.world * (processes.world + 1) / 2
    if isinstance(found, RuntimeError):
        why = why_it_failed(found)
        mend = ONE_EACH if "Duplicate GPU" in why else "end other programs" if lacks_memory(found) else NETWORK
        raise TrainingError(f"the first sum over {backend} failed ({why}): {mend}.") from found
    if found != expected:
        raise TrainingError(f"the first sum over {backend} is {found:g} instead of {expected:g}: {NETWORK}.")


def _sum_in_time(processes: Processes) -> float | RuntimeError:
    """The sum, or its error; ends the process after :data:`SUM_S` seconds."""

    def attempt() -> float | RuntimeError:
        try:
            return _sum(processes)
        except RuntimeError as error:
            return error

    found = answer_within(SUM_S, attempt)
    if found is None:
        backend = torch.distributed.get_backend()
        sentence = f"the first sum over {backend} did not end within {SUM_S:g} seconds: {NETWORK}."
        end_at_once(processes.rank, sentence)
    return found


def _sum(processes: Processes) -> float:
    """The sum of rank + 1 over the processes, on their devices."""
    mine = torch.full((), processes.rank + 1, dtype=torch.float64, device=processes.device)
    return processes.sum(mine).item()
