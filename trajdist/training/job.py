"""What the training loop works with: one job, its hyper-parameters, when it logs and saves, and its progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trajdist.runtime.clock import Clock
from trajdist.runtime.processes import Processes
from trajdist.runtime.progress import Progress
from trajdist.runtime.stopping import StopFlag
from trajdist.runtime.trackers import Picture, Trackers
from trajdist.runtime.watchdog import Watchdog
from trajdist.saved.checkpoint import CheckpointWriter, Tensors
from trajdist.saved.rundir import RunDir
from trajdist.sharding import Plan, Step
from trajdist.training.feed import Branch
from trajdist.training.journal import Journal
from trajdist.training.keeper import Keeper
from trajdist.training.objectives import Objective


@dataclass
class Position:
    """How far the run has got, for status.json.

    Attributes:
        phase: 1 or 2; 0 before the first.
        step: optimizer steps done in the phase.
    """

    phase: int = 0
    step: int = 0


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the optimisation.

    Attributes:
        learning_rate: at its peak.
        warmup_fraction: fraction of the training over which the learning rate rises.
        max_grad_norm: gradients are clipped to this norm.
        seed: of all random numbers drawn in training.
    """

    learning_rate: float
    warmup_fraction: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True)
class Rhythm:
    """When to log, save, validate, and empty the allocator's cache.

    Attributes:
        log_every_steps: optimizer steps between log lines.
        save_every_steps, save_every_s: optimizer steps and seconds between checkpoints, whichever comes first.
        empty_cache_every: optimizer steps between calls of ``empty_cache``; 0 never calls it.
        validate_every_epochs: epochs between validations; 0 never validates.
    """

    log_every_steps: int
    save_every_steps: int
    save_every_s: float
    empty_cache_every: int
    validate_every_epochs: int = 0


@dataclass
class Job:
    """Everything that :func:`trajdist.training.loop.walk` works with.

    Attributes:
        phase: 1 or 2.
        plan: which images each step takes.
        batches: this process's batches with their trajectories, from the plan's cursor on.
        model: as prepared by Accelerate, possibly compiled.
        writer: saves checkpoints in the background.
        at: the progress shown in status.json, kept up to date by the loop.
        base: fingerprint of what the model builds on; a checkpoint must match it.
        steps_before: number of steps in earlier phases, which checkpoint numbers continue.
        tick: called after each step; advances the profiler.
        keeper: moving average, best weights and early stopping.
        validate: measures the given weights; returns figures for metrics.jsonl.
        draw: heat maps of the given weights, for the trackers.
        say: shows the user a line.
        seconds_before: training time in seconds of earlier starts.
        started, last_saved: times of ``time.monotonic``, in seconds; the walk begins with both.
        agreed: steps done and time at the last agreement between processes on whether to stop or save.
        agree_at: number of steps done at which the next agreement is due.
    """

    phase: int
    accelerator: Accelerator
    processes: Processes
    plan: Plan
    batches: Branch
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
    steps_before: int
    tick: Callable[[], None]
    keeper: Keeper
    trackers: Trackers
    validate: Callable[[Tensors], dict[str, Any]]
    draw: Callable[[Tensors], list[Picture]]
    say: Callable[[str], None]
    seconds_before: float = 0.0
    started: float = 0.0
    last_saved: float = 0.0
    agreed: tuple[int, float] = (0, 0.0)
    agree_at: int = 0

    def number_of(self, step: Step) -> int:
        """Steps done, counted across both phases."""
        return self.steps_before + step.index + 1

    def seconds(self) -> float:
        """Training time of this phase in seconds, over all restarts."""
        return self.seconds_before + time.monotonic() - self.started

    def trainable_weights(self) -> Tensors:
        """The weights that are trained, by name."""
        return trainable_weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def judged_weights(self) -> Tensors:
        """The weights that validation judges: the moving average, if there is one."""
        return self.keeper.judged(self.trainable_weights())

    def trained_model(self) -> Any:
        """The model in eval mode, without the wrappers that training put around it."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        return model.eval()

    @torch.no_grad()
    def settle_weights(self) -> None:
        """After training, copy the weights that the phase ends with into the model."""
        weights = self.trainable_weights()
        for name, weight in self.keeper.final(weights).items():
            weights[name].copy_(weight)


def trainable_weights(model: nn.Module) -> Tensors:
    """The trainable weights of a model without wrappers, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
