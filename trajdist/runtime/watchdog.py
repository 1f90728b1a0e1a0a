"""Ends a process that waits too long for another one, and says which: a job must end, not hang."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

import torch

from trajdist import launcher
from trajdist.errors import TrainingError
from trajdist.runtime.processes import Processes, StopFlag, named, open_store

INTERVAL_S = 1.0
# Signs of life this far apart tell a slow process from a lost one.
LISTEN_S = 3.0
# The store lies with process 0; where the network is cut it never answers.
ANSWER_S = 10.0
GO_ON = "run the same command again to go on from the last checkpoint"


class Watchdog:
    """Shows this process's signs of life to the others, and ends the process when it stands still.

    Each has a thread of its own: one that talks to another machine may be kept waiting.
    The training calls :meth:`beat` wherever it gets on. All processes beat equally often, so the one with the fewest
    beats is the one that the others wait for.
    """

    def __init__(self, processes: Processes, stop: StopFlag, timeout_s: float) -> None:
        self._processes, self._stop, self._timeout_s = processes, stop, timeout_s
        self._beats, self._ticks = 0, 0
        self._done = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._live, self._watch)]
        self._store = open_store() if processes.world > 1 else None
        self._parent = os.getppid() if launcher.is_elastic() else None

    def beat(self) -> None:
        """This process has got on."""
        self._beats += 1

    @contextlib.contextmanager
    def watching(self, on_end: Callable[[str], None]) -> Iterator[None]:
        """Watch while the block runs; errors that mean a lost process name it.

        Args:
            on_end: told why, just before the process is ended.

        Raises:
            TrainingError: another process, or a decoding process, is gone.
        """
        self._on_end = on_end
        for thread in self._threads:
            thread.start()
        try:
            yield
        except RuntimeError as error:
            sentence = self._explain(error)
            if sentence is None:
                raise
            raise TrainingError(sentence) from error
        finally:
            # A thread inside the store's C++ when the interpreter ends would abort the process.
            self._done.set()
            for thread in self._threads:
                thread.join(LISTEN_S)

    def _explain(self, error: RuntimeError) -> str | None:
        if "DataLoader worker" in str(error):
            return f"a decoding process was killed: lower data.num_workers or free some memory, then {GO_ON}."
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            return f"{self._who_is_missing()}: {GO_ON}."
        return None

    def _live(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._show()

    def _watch(self) -> None:
        seen, waited_s = 0, 0.0
        # Waits are counted, not read off a clock: a job that was suspended as a whole has not waited.
        while not self._done.wait(INTERVAL_S):
            if self._parent is not None and os.getppid() != self._parent:
                self._stop.ask("the launcher is gone")
            waited_s = waited_s + INTERVAL_S if seen == self._beats else 0.0
            seen = self._beats
            # At the prompt of a debugger nobody hangs.
            if waited_s > self._timeout_s and "pdb" not in sys.modules:
                self._end()

    def _show(self) -> None:
        self._ticks += 1
        if self._store is not None:
            # The store may be gone with its process; then the waiting ends by the timeout.
            with contextlib.suppress(RuntimeError):
                self._store.set(f"alive/{self._processes.rank}", f"{self._ticks} {self._beats}")

    def _end(self) -> None:
        why = f"{self._who_is_missing()} for runtime.timeout_s={self._timeout_s:g} seconds: {GO_ON}."
        print(f"trajdist: [process {self._processes.rank}] {why}", file=sys.stderr, flush=True)
        # Nothing else ends a thread that waits inside the network or the file system.
        try:
            self._on_end(why)
        finally:
            os._exit(TrainingError.exit_code)

    def _who_is_missing(self) -> str:
        if self._store is None:
            return "the training stands still"
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(self._compare()), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return answers[0] if answers else "the machine of process 0 did not answer"

    def _compare(self) -> str:
        before = self._signs()
        threading.Event().wait(LISTEN_S)
        after = self._signs()
        silent = [rank for rank, sign in after.items() if sign == (0, 0) or sign[0] == before[rank][0]]
        if silent:
            return f"{named(silent)} gave no sign of life"
        fewest = min(beats for _, beats in after.values())
        return f"{named([rank for rank, (_, beats) in after.items() if beats == fewest])} stood still"

    def _signs(self) -> dict[int, tuple[int, int]]:
        """Ticks and beats of every process; zeros for one that never showed any."""
        return {rank: self._sign(rank) for rank in range(self._processes.world)}

    def _sign(self, rank: int) -> tuple[int, int]:
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check([f"alive/{rank}"]):
                ticks, beats = self._store.get(f"alive/{rank}").split()
                return int(ticks), int(beats)
        return 0, 0
