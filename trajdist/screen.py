"""What commands print: an error in writing to stdout becomes one sentence, and no stage is silent for long."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from trajdist.errors import ArtifactError, one_line

# Where there is no bar, a stage without lines of its own prints one after this many seconds.
LINE_EVERY_S = 60.0
# Spaces and joiners of many scripts, unprintable to Python: paths are to be copied as they are.
HARMLESS = "\u00a0\u202f\u3000\u200c\u200d"


def on_screen(name: str) -> str:
    r"""A name that is safe to print on a terminal: unprintable characters are escaped as in Python.

    >>> print(on_screen("a \x1b[31mred\nname.png"))
    a \x1b[31mred\nname.png
    """
    return "".join(each if each.isprintable() or each in HARMLESS else repr(each)[1:-1] for each in name)


def lines_on_screen(text: str) -> str:
    """Text that is safe to print, whatever names and messages of others are in it; its line breaks are kept."""
    return "\n".join(map(on_screen, text.split("\n")))


class ReaderGone(SystemExit):
    """Ends the command as if SIGPIPE had killed it: nobody reads what it prints any more (``| head``)."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGPIPE)

    def __str__(self) -> str:
        return "what read the output has ended"


class _Guarded:
    """A stream whose write errors become user errors; everything else is passed through."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _naming(self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        with _naming(self._stream):
            self._stream.flush()


@contextmanager
def guarded_stdout() -> Iterator[None]:
    """Turn errors in writing to stdout into one sentence while the block runs, and flush at its end.

    Raises:
        ArtifactError: it cannot be written, as on a full disk.
        ReaderGone: nobody reads it any more.
    """
    before = sys.stdout
    with open(os.devnull, "w") as nowhere:
        # It is None if the shell closed it (``>&-``).
        sys.stdout = guarded = _Guarded(before or nowhere)
        try:
            yield
            guarded.flush()
        finally:
            sys.stdout = before


@contextmanager
def _naming(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Otherwise flushing the buffer would fail again when the interpreter ends.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from None
        raise ArtifactError(
            f"stdout cannot be written ({one_line(error)}): free some space, or redirect it elsewhere."
        ) from None
