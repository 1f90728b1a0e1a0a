"""Guards what commands print: an error in writing to stdout becomes one sentence, wherever it occurs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from trajdist.errors import ArtifactError, one_line

# The exit code that a shell reports for a program killed by SIGPIPE, as when its reader has gone (``| head``).
READER_GONE = 141


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
        SystemExit: its reader has gone.
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(READER_GONE) from None
        raise ArtifactError(
            f"stdout cannot be written ({one_line(error)}): free some space, or redirect it elsewhere."
        ) from None
