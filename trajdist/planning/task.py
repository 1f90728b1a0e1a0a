"""What a phase trains and minimises, as training sets it up but without Accelerate: for the plan to count and time.

Shape suffixes: N rows (places of all images), L steps, D channels of a trajectory, F its valid entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from trajdist.config import Config
from trajdist.data.loader import ImageBatch
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.scoring.residuals import ResidualModel
from trajdist.training.objectives import ContrastModel, DefectContrast, Objective
from trajdist.training.train import reconstruction


@dataclass(frozen=True)
class PlannedTask:
    """What a step trains, and its objective.

    Attributes:
        module: the phase's model, or the contrast model around it.
    """

    module: nn.Module
    objective: Objective

    def loss(self, trajectories: torch.Tensor, batch: ImageBatch, precision: str) -> torch.Tensor:
        """Loss of a batch half-way through the training, a scalar; ``trajectories`` as a feed yields them."""

        def call(target_NLD: torch.Tensor) -> Any:
            """Call the module as Accelerate does: under autocast, with outputs converted to float32."""
            with autocast(target_NLD.device.type, precision):
                answer = self.module(target_NLD)
            return tree_map(lambda part: part.float() if isinstance(part, torch.Tensor) else part, answer)

        return self.objective(call, trajectories, batch, 0.5).loss @ batch.weights


def plan_task(config: Config, phase: int, extractor: TrajectoryExtractor, model: nn.Module) -> PlannedTask:
    """The task of a phase, on the extractor's device."""
    if not config.contrasts(phase):
        return PlannedTask(model, reconstruction(config, extractor))
    valid_LD, widths = extractor.projection.valid_LD, extractor.projection.widths
    with valid_LD.device:
        # Fake tensors cannot tell which entries are valid, and only their number matters for the cost.
        valid_F = torch.arange(sum(widths))
        contrast = ContrastModel(model, ResidualModel(widths, extractor.resolution), valid_F)
    return PlannedTask(contrast, DefectContrast(valid_LD))


def autocast(device_type: str, precision: str) -> torch.autocast:
    """The context of a forward pass; ``precision`` is ``no``, ``bf16`` or ``fp16``."""
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type, kind, enabled=precision != "no")
