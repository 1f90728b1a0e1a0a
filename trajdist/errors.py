"""The errors that a user can cause, each with its exit code on the command line.

Every message is one sentence that names the field or the file, its value, and how to fix it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def one_line(error: BaseException | str, most: int = 200) -> str:
    """The message of a third-party error, for the middle of a sentence: at most ``most`` characters on one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:most].rstrip(". ")


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The dotted field of the first problem that pydantic found, empty for the whole document, and what it says."""
    problem = error.errors(include_url=False)[0]
    return ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")


class UserError(ValueError):
    """Base of all errors that are shown as one sentence, without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(UserError):
    """Images that are missing, unreadable or not the ones the run began with."""

    exit_code = 3


class ArtifactError(UserError):
    """A model, adapter, projection or checkpoint that is damaged or belongs to another run."""

    exit_code = 4


class TrainingError(UserError):
    """Training that cannot continue, for example because a loss is no longer finite."""

    exit_code = 1


class StopRequested(Exception):
    """A signal or the STOP file asked the run to stop. Training so far is in a checkpoint; other passes start over."""

    exit_code = 75


@contextmanager
def os_errors(problem: str, fix: str, kind: type[UserError] = ArtifactError) -> Iterator[None]:
    """Turn an ``OSError`` into a sentence: what cannot be done, the system's reason, and how to fix it.

    >>> with os_errors("'/a' cannot be written", fix="free some space"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    trajdist.errors.ArtifactError: '/a' cannot be written (No space left on device): free some space.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{problem} ({one_line(error)}): {fix}.") from None
