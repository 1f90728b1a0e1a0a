"""Requests to stop a run: signals, and the STOP file."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from trajdist.errors import StopRequested

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


class StopFlag:
    """Records a request to stop the run: SIGTERM, SIGINT, SIGUSR1, or the STOP file.

    Handlers only set a flag, which the loop checks between steps. A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self, stop_file: Path, watches_file: bool) -> None:
        self._file, self._watches_file = stop_file, watches_file
        self.why = ""
        self._interrupted = self._heard = False
        self._heard_from: int | None = None

    def __bool__(self) -> bool:
        if not self.why and self._watches_file and os.path.exists(self._file):
            self.why = f"the file {self._file.name} was created"
        return bool(self.why)

    def ask(self, why: str) -> None:
        """Request a stop; the first reason is kept."""
        self.why = self.why or why

    def error(self) -> StopRequested:
        """What ends a run that was asked to stop, on this process or on another one."""
        return StopRequested(self.why or "another process was asked to stop")

    def heard(self) -> bool:
        """Whether a signal has arrived, even if the main thread is in code that keeps it from running handlers."""
        if self._heard_from is not None:
            # Python writes the number of every handled signal there, such as SIGCHLD when a worker ends.
            with contextlib.suppress(OSError):
                self._heard |= not STOP_SIGNALS.isdisjoint(os.read(self._heard_from, 2**16))
        return self._heard

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle signals while the block runs, then restore the previous handlers."""
        self._heard_from, write = os.pipe()
        for end in (self._heard_from, write):
            os.set_blocking(end, False)
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            for end in (self._heard_from, write):
                os.close(end)
            self._heard_from = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self._interrupted:
            raise KeyboardInterrupt("received SIGINT twice")
        self._interrupted = self._interrupted or name == "SIGINT"
        self.ask(f"received {name}")
