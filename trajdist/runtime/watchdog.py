"""Ends a process that waits too long for another one, and names the other: a job must end, not hang."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

from trajdist import launcher
from trajdist.errors import StopRequested, TrainingError
from trajdist.runtime.memory import lacks_memory
from trajdist.runtime.processes import Answer, Processes, named, open_store, why_it_failed
from trajdist.runtime.stopping import StopFlag

INTERVAL_S = 1.0
# Two readings of the signs of life, this far apart, distinguish a slow process from a lost one.
LISTEN_S = 3.0
# Process 0 hosts the store; if the network is down, it never answers.
ANSWER_S = 10.0
# The ticks of a process that has ended properly: nobody waits for it.
LEFT = -1
# After a signal, this long without progress means that the main thread cannot act on it: NCCL waits for a lost process
# for ever, in code that no Python handler interrupts. Launchers kill after 30 s, which would leave no message.
STUCK_S = 10.0
GO_ON = "run the same command again to resume from the last checkpoint"


class Watchdog:
    """Publishes this process's signs of life, and ends the process if it makes no progress for ``timeout_s``.

    Publishing and watching have a thread each, because publishing may block on another machine. Training calls
    :meth:`beat` whenever it makes progress. All processes beat equally often, so the others are waiting for the one
    with the fewest beats.
    """

    def __init__(self, processes: Processes, stop: StopFlag, timeout_s: float) -> None:
        self._processes, self._stop, self._timeout_s = processes, stop, timeout_s
        self._beats, self._ticks = 0, 0
        self._done, self._left = threading.Event(), False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._live, self._watch)]
        self._store = open_store() if processes.world > 1 else None
        self._parent = os.getppid() if launcher.is_elastic() else None

    def beat(self) -> None:
        """Record that this process has made progress."""
        self._beats += 1

    @contextlib.contextmanager
    def watching(self, on_end: Callable[[str], None]) -> Iterator[None]:
        """Watch while the block runs; errors caused by a lost process name it.

        Args:
            on_end: called with the reason just before the process is ended.

        Raises:
            TrainingError: another process of the job, or a decoding worker, is gone.
        """
        self._on_end = on_end
        for thread in self._threads:
            thread.start()
        try:
            yield
            self._left = True
        except StopRequested:
            self._left = True
            raise
        except RuntimeError as error:
            sentence = self._explain(error)
            if sentence is None:
                raise
            raise TrainingError(sentence) from error
        finally:
            # A thread still in the store's C++ code at interpreter exit would abort the process.
            self._done.set()
            for thread in self._threads:
                thread.join(LISTEN_S)

    def _explain(self, error: RuntimeError) -> str | None:
        if "DataLoader worker" in str(error):
            return f"a decoding process was killed: lower data.num_workers or free some memory, then {GO_ON}."
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            return None
        if lacks_memory(error):  # NCCL's buffers are on the device too.
            return None
        who, silent = self._who_is_missing()
        # NCCL also fails for reasons of its own, while all processes are alive.
        reason = "" if silent else f" ({why_it_failed(error)})"
        return f"{who}{reason}: {GO_ON}."

    def _live(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._ticks += 1
            self._show(self._ticks)
        if self._left:
            self._show(LEFT)

    def _watch(self) -> None:
        seen, waited_s = 0, 0.0
        # Intervals are counted instead of reading a clock: a job suspended as a whole has not been waiting.
        while not self._done.wait(INTERVAL_S):
            if self._parent is not None and os.getppid() != self._parent:
                self._stop.ask("the launcher is gone")
            waited_s = waited_s + INTERVAL_S if seen == self._beats else 0.0
            seen = self._beats
            # A process at a debugger's prompt is not hanging.
            if waited_s > self._timeout_s and "pdb" not in sys.modules:
                self._end(f"{self._who_is_missing()[0]} for runtime.timeout_s={self._timeout_s:g} seconds")
            elif waited_s > 0 and waited_s % STUCK_S == 0 and self._stop.heard():
                who, silent = self._who_is_missing()
                waited_s += LISTEN_S
                if silent and seen == self._beats and not self._done.is_set():
                    self._end(f"{who} when this process was asked to stop")

    def _show(self, ticks: int) -> None:
        if self._store is not None:
            # The store may have died with its process; then the timeout ends the wait.
            with contextlib.suppress(RuntimeError):
                self._store.set(f"alive/{self._processes.rank}", f"{ticks} {self._beats}")

    def _end(self, reason: str) -> None:
        why = f"{reason}: {GO_ON}."
        end_at_once(self._processes.rank, why, lambda: self._on_end(why))

    def _who_is_missing(self) -> tuple[str, bool]:
        """Whom this process waits for, and whether there is no sign of life from there."""
        if self._store is None:
            return "the training made no progress", False
        return answer_within(ANSWER_S, self._compare) or ("the machine of process 0 did not answer", True)

    def _compare(self) -> tuple[str, bool]:
        before = self._signs()
        threading.Event().wait(LISTEN_S)
        after = {rank: sign for rank, sign in self._signs().items() if sign[0] != LEFT}
        silent = [rank for rank, sign in after.items() if sign == (0, 0) or sign[0] == before[rank][0]]
        if silent:
            return f"{named(silent)} gave no sign of life", True
        fewest = min(beats for _, beats in after.values())
        return f"{named([rank for rank, (_, beats) in after.items() if beats == fewest])} made no progress", False

    def _signs(self) -> dict[int, tuple[int, int]]:
        """Ticks (liveness) and beats (progress) of every process; zeros for one that never published any."""
        return {rank: self._sign(rank) for rank in range(self._processes.world)}

    def _sign(self, rank: int) -> tuple[int, int]:
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check([f"alive/{rank}"]):
                ticks, beats = self._store.get(f"alive/{rank}").split()
                return int(ticks), int(beats)
        return 0, 0


def answer_within(seconds: float, question: Callable[[], Answer]) -> Answer | None:
    """The answer from a thread of its own, as network code cannot be interrupted; None if it takes too long."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def end_at_once(rank: int, sentence: str, last: Callable[[], None] = lambda: None) -> NoReturn:
    """Print why, do what is left to do, and end the process, whatever its threads are doing."""
    try:
        with contextlib.suppress(OSError, ValueError):  # Nobody may be reading.
            print(f"trajdist: [process {rank}] {sentence}", file=sys.stderr, flush=True)
        last()
    finally:
        # A thread that is blocked in network or file system code cannot be ended in any other way.
        os._exit(TrainingError.exit_code)
