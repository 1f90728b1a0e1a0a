"""What the training loop works with: one job, its recipe, its rhythm, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trajdist.runtime.clock import Clock
from trajdist.runtime.processes import Processes, StopFlag
from trajdist.runtime.progress import Progress
from trajdist.runtime.trackers import Picture, Trackers
from trajdist.runtime.watchdog import Watchdog
from trajdist.saved.checkpoint import CheckpointWriter, Tensors
from trajdist.saved.rundir import RunDir
from trajdist.sharding import Plan
from trajdist.training.feed import Pairs
from trajdist.training.journal import Journal
from trajdist.training.keeper import Keeper
from trajdist.training.objectives import Objective


@dataclass
class Position:
    """How far the run is, for status.json."""

    phase: int = 0
    step: int = 0


@dataclass(frozen=True)
class Recipe:
    """How to optimise."""

    learning_rate: float
    warmup_fraction: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True)
class Rhythm:
    """When to log, to save, to validate, and to empty the allocator's cache."""

    log_every_steps: int
    save_every_steps: int
    save_every_s: float
    empty_cache_every: int
    validate_every_epochs: int = 0


@dataclass
class Job:
    """Everything that :func:`trajdist.training.loop.walk` works with."""

    phase: int
    accelerator: Accelerator
    processes: Processes
    plan: Plan
    batches: Pairs
    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    rhythm: Rhythm
    journal: Journal
    rundir: RunDir
    writer: CheckpointWriter
    stop: StopFlag
    watchdog: Watchdog
    progress: Progress
    clock: Clock
    at: Position
    base: str
    first_checkpoint_number: int
    tick: Callable[[], None]
    keeper: Keeper
    trackers: Trackers
    validate: Callable[[Tensors], dict[str, Any]]
    draw: Callable[[Tensors], list[Picture]]
    say: Callable[[str], None]
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    last_saved: float = field(default_factory=time.monotonic)
    agreed: tuple[int, float] = (0, 0.0)
    agree_at: int = 0
