"""What the user sees while the job runs: a progress bar on a terminal, plain lines elsewhere. Main process only."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from trajdist.files import GIB
from trajdist.screen import LINE_EVERY_S, lines_on_screen
from trajdist.tables import format_seconds


class _Console(Console):
    """A console on which no text, of a message or in a table, can do more than be read: rich lets some codes pass."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(lines_on_screen(text), **options)


def make_console(is_main: bool, bars: bool = True) -> Console:
    """The console of the main process; the others are silent. Text is shown without markup: names may be anything.

    Args:
        bars: False shows progress as lines even on a terminal.
    """
    width = None if sys.stdout.isatty() else 120
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        # A name that the terminal cannot encode must not end the job.
        reconfigure(errors="replace")
    terminal = None if bars else False
    return _Console(
        quiet=not is_main,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        width=width,
        force_terminal=terminal,
    )


class Progress:
    """One stage of the job: a bar or lines, and its rate in images per second.

    Args:
        console: where to write.
        title: what the stage is called.
        total_images: images to process.
        done_images: images that an earlier process has already processed.
    """

    def __init__(self, console: Console, title: str, total_images: int, done_images: int = 0) -> None:
        self._console, self._title, self._total = console, title, total_images
        self._first = self._last = self._lap = (time.monotonic(), done_images)
        self._bar: Bar | None = None
        if console.is_terminal and not console.quiet:
            # In a narrow terminal the bar gives way first, then the note is folded; counts and times stay whole.
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(min(40, max(6, console.width - 76))),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[note]}", table_column=Column()),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total_images, completed=done_images, note="")

    def __enter__(self) -> Progress:
        self._first = self._last = self._lap = (time.monotonic(), self._first[1])
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def rate(self, images: int) -> float:
        """Images per second since the last call."""
        now, (then, before) = time.monotonic(), self._last
        self._last = (now, images)
        return (images - before) / max(now - then, 1e-9)

    def lap_rate(self) -> float:
        """Images per second since the last call, as of the last call of :meth:`rate`."""
        before, self._lap = self._lap, self._last
        return (self._last[1] - before[1]) / max(self._last[0] - before[0], 1e-9)

    def go_on(self) -> None:
        """After something else, such as a validation, whose time is not to count in the next rates."""
        self._last = self._lap = (time.monotonic(), self._last[1])

    def mean_rate(self) -> float:
        """Images per second since the stage began, as of the last call of :meth:`rate`."""
        return (self._last[1] - self._first[1]) / max(self._last[0] - self._first[0], 1e-9)

    def advance(self, images: int) -> None:
        """Move the bar of a stage that writes no records; without one, print a line if the last is a minute old."""
        if self._bar:
            self._bar.update(self._task, completed=images)
        elif time.monotonic() - self._last[0] > LINE_EVERY_S:
            rate = f"{self.rate(images):.1f} images/s"
            self._console.print(f"{self._title}: {images:,}/{self._total:,} images  {rate}  {self._left(images)} left")

    def show(self, record: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        images, rate = record["images"], record["images_per_s"]
        note = f"loss {record['loss']:.4f}  {rate:.1f} images/s  {record['memory_bytes'] / GIB:.2f} GiB"
        if self._bar:
            self._bar.update(self._task, completed=images, note=note)
        else:
            step = f"epoch {record['epoch']} step {record['step']} images {images}/{self._total}"
            self._console.print(f"{self._title}: {step}  {note}  {self._left(images)} left")

    def _left(self, images: int) -> str:
        """The time that the rest takes at the mean rate."""
        return format_seconds((self._total - images) / max(self.mean_rate(), 1e-9))
