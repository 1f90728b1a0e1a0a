"""What commands print: an error in writing it is one sentence, wherever in the program it is met."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from trajdist.errors import ArtifactError, one_line

# What a shell reports of a program that SIGPIPE ended, as it ends others whose reader has gone (``| head``).
READER_GONE = 141


class _Guarded:
    """A stream whose errors in writing are those of a user; all else is the stream's own."""

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
    """Make errors in writing to stdout one sentence in the block, at whose end all is written.

    Raises:
        ArtifactError: it cannot be written, as on a full disk.
        SystemExit: nobody reads it any more.
    """
    before = sys.stdout
    with open(os.devnull, "w") as nowhere:
        # There is none where the shell closed it (``>&-``).
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
        # What is left in the buffer would fail again as the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(READER_GONE) from None
        raise ArtifactError(
            f"what the command prints cannot be written ({one_line(error)}): free some space, or send it elsewhere."
        ) from None
