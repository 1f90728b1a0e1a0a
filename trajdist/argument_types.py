"""Arguments of the command line: what several commands take, and types of options.

The types raise ArgumentTypeError or ValueError on invalid text.
"""

from __future__ import annotations

import argparse
import re

LEAST_SPEED = 1e-9

CONFIG_HELP = "a path, or a shipped config: default, imagenet, low_memory, quality, quickstart or debug"
RUN_HELP = "the folder of a run"


def add_config(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add a config file and ``key=value`` overrides to what a command takes."""
    parser.add_argument("config", metavar="CONFIG.yaml", nargs=nargs, help=CONFIG_HELP)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as data.imagenet.batch_size=64")


def place(text: str) -> str:
    """An output path. An empty one, as from an unset shell variable, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def rate(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def speed(text: str) -> float:
    """A positive number, large enough that durations computed from it stay finite."""
    value = float(text)
    if not LEAST_SPEED <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above {LEAST_SPEED:g}")
    return value


def size(text: str) -> int:
    """A number of bytes: ``80GiB``, ``24 GB``, ``500MB``, or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GiB, 24GB or 500MB")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def quality(text: str) -> int:
    """A JPEG quality: an integer from 1 to 100."""
    value = positive(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text} is more than 100")
    return value
