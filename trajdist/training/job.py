"""A task in training: what the training loop works with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trajdist.runtime.clock import Clock
from trajdist.runtime.profiling import nothing
from trajdist.runtime.progress import Progress
from trajdist.saved.checkpoint import CheckpointWriter, Tensors
from trajdist.sharding import Plan, Selection, Step
from trajdist.training.feed import Branch
from trajdist.training.journal import Journal
from trajdist.training.keeper import Keeper
from trajdist.training.objectives import Task
from trajdist.training.optimization import trainable_weights
from trajdist.training.session import Session
from trajdist.training.validation import Examiner


@dataclass
class Job:
    """Everything that :func:`trajdist.training.loop.walk` works with.

    Attributes:
        plan: which images each step takes.
        cursor: images consumed by earlier starts.
        batches: this process's batches with their trajectories, from the plan's cursor on.
        model: the task's, as prepared by Accelerate, possibly compiled.
        keeper: moving average, best weights and early stopping.
        examiner: measures and draws the weights between epochs.
        writer: saves checkpoints in the background.
        steps_before: number of steps in earlier phases, which checkpoint numbers continue.
        tick: called after each step; advances the profiler.
        seconds_before: training time in seconds of earlier starts.
        taken, stages: once the walk has ended, its training time in seconds, and the seconds of each stage up to then.
        started, last_saved: times of ``time.monotonic``, in seconds; the walk begins with both.
        agreed: steps done and time at the last agreement between processes on whether to stop or save.
        agree_at: number of steps done at which the next agreement is due.
    """

    session: Session
    selection: Selection
    task: Task
    plan: Plan
    cursor: int
    batches: Branch
    model: nn.Module
    optimizer: torch.optim.Optimizer
    journal: Journal
    keeper: Keeper
    examiner: Examiner
    writer: CheckpointWriter
    progress: Progress
    clock: Clock
    steps_before: int
    tick: Callable[[], None] = nothing
    seconds_before: float = 0.0
    taken: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    started: float = 0.0
    last_saved: float = 0.0
    agreed: tuple[int, float] = (0, 0.0)
    agree_at: int = 0

    @property
    def phase(self) -> int:
        """1 or 2."""
        return self.selection.phase

    def number_of(self, step: Step) -> int:
        """Steps done, counted across both phases."""
        return self.steps_before + step.index + 1

    def seconds(self) -> float:
        """Training time of this phase in seconds, over all restarts."""
        return self.seconds_before + time.monotonic() - self.started

    def trainable_weights(self) -> Tensors:
        """The weights that are trained, by name."""
        return trainable_weights(self.session.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def judged_weights(self) -> Tensors:
        """The weights that validation judges: the moving average, if there is one."""
        return self.keeper.judged(self.trainable_weights())

    def trained_model(self) -> Any:
        """The model in eval mode, without the wrappers that training put around it."""
        model = self.session.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        return model.eval()

    @torch.no_grad()
    def settle_weights(self) -> None:
        """After training, copy the weights that the phase ends with into the model."""
        weights = self.trainable_weights()
        for name, weight in self.keeper.final(weights).items():
            weights[name].copy_(weight)
