"""What torchrun, ``accelerate launch`` and Slurm tell a process by its environment, before anything is connected."""

from __future__ import annotations

import os


def rank() -> int:
    """The process's number in the job; 0 without a launcher."""
    return _number("RANK", 0)


def world(default: int = 1) -> int:
    """How many processes the job has."""
    return _number("WORLD_SIZE", default)


def local_world(default: int = 1) -> int:
    """How many of them are on this machine."""
    return _number("LOCAL_WORLD_SIZE", default)


def mixed_precision() -> str | None:
    """What ``accelerate launch`` was told, or None: it goes before what a machine would choose."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or None


def is_elastic() -> bool:
    """Whether torchrun's agent, which ``accelerate launch`` uses as well, is the parent process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_launched() -> bool:
    """Whether any launcher started the process; it takes an exit code other than 0 for a crash."""
    return is_elastic() or "LOCAL_WORLD_SIZE" in os.environ


def has_restarted() -> bool:
    """Whether a launcher or Slurm has started the same command again after a failure."""
    return any(_number(name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
