"""What a phase trains, and minimises: the reconstruction error, or a contrast of drawn defects with clean places.

Shape suffixes: B images, P places, N rows (places of all images), L steps, D channels of a trajectory, F its valid
entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from trajdist.data.drawing import DefectDraw
from trajdist.data.loader import ImageBatch
from trajdist.models.losses import Losses, trajectory_losses
from trajdist.models.reconstruction import Reconstruction
from trajdist.scoring.residuals import ResidualModel
from trajdist.training.optimization import linear_warmup

# A place counts as defective if more than the first fraction of it is covered, or more than half as much as of the most
# covered place, if that is less; as clean if less than the second fraction is. Places in between are ignored.
COVERED, CLEAN = 0.1, 0.005
# Initial slope and offset of the logistic curve, for scores of about 1.
FIRST_SLOPE, FIRST_OFFSET = 4.0, -6.0


# A module, or a function that calls one.
Model = Callable[[torch.Tensor], Any]


class Objective(Protocol):
    """Per-image losses of a model on a batch; ``progress`` is the fraction of the training completed."""

    def __call__(self, model: Model, trajectories: torch.Tensor, batch: ImageBatch, progress: float) -> Losses: ...


@dataclass(frozen=True)
class Task:
    """A model to train, and how.

    Attributes:
        learning_rate: at its peak.
        base: fingerprint of what the model builds on: the trajectories in Phase 1, the base model in Phase 2.
        defects: draws the defects that the objective contrasts clean images with, new ones every epoch; training is
            then on whole images.
        whitened: the residual model whose whitening the model is trained with, if any.
    """

    model: nn.Module
    objective: Objective
    learning_rate: float
    weight_decay: float
    base: str
    defects: DefectDraw | None = None
    whitened: ResidualModel | None = None


@dataclass(frozen=True)
class ReconstructionError:
    """The mean squared error, plus the weighted KL divergence of the code for a VAE.

    Attributes:
        valid_LD: bool; False marks the padding of blocks that have fewer channels.
        kl_weight: after its warm-up.
        kl_warmup_fraction: fraction of the training over which the weight rises from 0.
    """

    valid_LD: torch.Tensor
    kl_weight: float
    kl_warmup_fraction: float

    def __call__(self, model: Model, trajectories: torch.Tensor, batch: ImageBatch, progress: float) -> Losses:
        target_NLD = trajectories.flatten(0, -3)
        kl_weight = self.kl_weight * linear_warmup(progress, self.kl_warmup_fraction)
        return trajectory_losses(model(target_NLD), target_NLD, self.valid_LD, len(batch.weights), kl_weight)


class ContrastModel(nn.Module):
    """An adapted model, the calibrated score of its residuals, and a logistic curve over that score.

    The residual model is that of the base model on the domain's clean images and stays fixed: if it were whitened again
    after every step, a low-rank update would cancel out (docs/LOG.md).
    """

    def __init__(self, model: nn.Module, residual: ResidualModel, valid_F: torch.Tensor) -> None:
        """``valid_F`` holds the indices of the valid entries of a flattened trajectory."""
        super().__init__()
        self.model = model
        self.logistic = nn.Parameter(torch.tensor([FIRST_SLOPE, FIRST_OFFSET]))
        # Not registered as submodules: DistributedDataParallel would broadcast their buffers in every step.
        self._frozen = (residual, valid_F)

    def forward(self, trajectories_NLD: torch.Tensor) -> tuple[Reconstruction, torch.Tensor]:
        """The reconstruction, and the logit of each place being defective, ``[B, P]``."""
        residual, valid_F = self._frozen
        reconstruction: Reconstruction = self.model(trajectories_NLD)
        with torch.autocast(trajectories_NLD.device.type, enabled=False):
            error_NF = (trajectories_NLD - reconstruction.output_NLD.float()).flatten(1)[:, valid_F]
            scores_BP = residual.energies(error_NF).clamp(min=1e-8).sqrt().mean(-1)
            slope, offset = self.logistic
            return reconstruction, slope * scores_BP + offset


def reconstructing(model: nn.Module) -> nn.Module:
    """The model of trajectories itself, whatever it is trained in."""
    return model.model if isinstance(model, ContrastModel) else model


@dataclass(frozen=True)
class DefectContrast:
    """Logistic loss over the places of clean images and of copies with a defect drawn in.

    Half of an image's weight is on the defective places, the other half on the clean places of both copies.
    """

    valid_LD: torch.Tensor

    def __call__(self, model: Model, trajectories: torch.Tensor, batch: ImageBatch, progress: float) -> Losses:
        """``trajectories`` are ``[2 B, H, W, L, D]``: those of the clean images, then those of the drawn copies."""
        assert batch.coverage is not None
        count = len(batch.weights)
        target_NLD = trajectories.flatten(0, 2)
        reconstruction, logits_BP = model(target_NLD)
        clean_N = len(target_NLD) // 2
        of_clean = Reconstruction(reconstruction.output_NLD[:clean_N].detach(), reconstruction.latent_NZ[:clean_N])
        recon_B = trajectory_losses(of_clean, target_NLD[:clean_N], self.valid_LD, count, 0.0).recon
        loss_B = contrast_losses(logits_BP[:count], logits_BP[count:], batch.coverage)
        return Losses(loss_B, recon_B, torch.zeros_like(loss_B))


def contrast_losses(
    clean_logits_BP: torch.Tensor, drawn_logits_BP: torch.Tensor, coverage_BP: torch.Tensor
) -> torch.Tensor:
    """Logistic loss of each image, ``[B]``; ``coverage_BP`` is the fraction of each place that the defect covers."""
    least_B1 = (0.5 * coverage_BP.amax(1, keepdim=True)).clamp(CLEAN, COVERED)
    defect_BP, clean_BP = (coverage_BP > least_B1).float(), (coverage_BP < CLEAN).float()
    missed_B = (F.softplus(-drawn_logits_BP) * defect_BP).sum(1) / defect_BP.sum(1).clamp(min=1)
    alarms_B = F.softplus(clean_logits_BP).sum(1) + (F.softplus(drawn_logits_BP) * clean_BP).sum(1)
    return 0.5 * missed_B + 0.5 * alarms_B / (clean_BP.shape[1] + clean_BP.sum(1))
