"""A model and its calibration: trajectories in, scores of places, blocks and images out.

Shape suffixes: B images, H W grid, P places, L steps, D channels, F valid entries of a trajectory, N rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trajdist.artifacts import load_state, read_document, read_tensors, write_tensors
from trajdist.errors import ArtifactError
from trajdist.scoring import residuals
from trajdist.scoring.calibration import QuantileSketch
from trajdist.scoring.histogram import ScoreHistogram


@dataclass(frozen=True)
class CellScores:
    """Scores of a batch: of each place, of each block at each place, and of each image."""

    cells_BHW: torch.Tensor
    energies_BHWL: torch.Tensor
    images_B: torch.Tensor


class Detector:
    """One model (the base, or the base with one adapter) and the statistics of its residuals on clean images.

    Attributes:
        residual: fitted by :meth:`load` or by a calibration.
        cells, images: scores of clean cells and images that were not trained on.
        held_out: False if no images were held out, so that training images had to serve.
        adapted: whether :func:`trajdist.scoring.scorer.load` gave the model an adapter.
    """

    def __init__(self, name: str, model: nn.Module, valid_LD: torch.Tensor, resolution: int) -> None:
        """``valid_LD`` marks the entries of a trajectory that are not padding; ``resolution``: places per side."""
        self.name, self.model, self.valid_LD = name, model.eval(), valid_LD
        self.residual = residuals.ResidualModel(valid_LD.sum(1).tolist(), resolution)
        self.cells, self.images = QuantileSketch(ScoreHistogram()), QuantileSketch(ScoreHistogram())
        self.held_out, self.adapted = True, False

    def to(self, device: torch.device) -> Detector:
        self.model.to(device)
        self.residual.to(device)
        self.valid_LD = self.valid_LD.to(device)
        return self

    def with_model(self, name: str, model: nn.Module) -> Detector:
        """The same calibration with another form of the same model."""
        other = copy.copy(self)
        other.name, other.model = name, model.eval()
        return other

    def residuals(self, trajectories_BHWLD: torch.Tensor) -> torch.Tensor:
        """Valid entries of trajectory minus reconstruction, ``[N, F]``."""
        target_NLD = trajectories_BHWLD.flatten(0, 2)
        error_NLD = target_NLD - self.model(target_NLD).output_NLD.float()
        # Without padding there is nothing to leave out, and indexing would only copy.
        padded = sum(self.residual.widths) < self.valid_LD.numel()
        return error_NLD[:, self.valid_LD] if padded else error_NLD.flatten(1)

    @torch.no_grad()
    def energies(self, trajectories_BHWLD: torch.Tensor) -> torch.Tensor:
        """Blocks' energies, ``[B, P, L]``, in float32."""
        return self.residual.energies(self.residuals(trajectories_BHWLD))

    @torch.no_grad()
    def score(self, trajectories_BHWLD: torch.Tensor) -> CellScores:
        """Score a batch of trajectories."""
        grid = trajectories_BHWLD.shape[1:3]
        energies_BPL = self.energies(trajectories_BHWLD)
        cells_BP = self.residual.cells(energies_BPL)
        image_scores_B = residuals.image_scores(cells_BP)
        return CellScores(cells_BP.unflatten(1, grid), energies_BPL.unflatten(1, grid), image_scores_B)

    def save(self, path: Path, base: str) -> None:
        """Write the calibration."""
        tensors = {f"residual.{name}": tensor for name, tensor in self.residual.state_dict().items()}
        tensors |= self.cells.histogram.to_tensors("cells") | self.images.histogram.to_tensors("images")
        write_tensors(path, tensors, {"format": 1, "kind": "calibration", "base": base, "held_out": self.held_out})

    def load(self, path: Path, base: str) -> None:
        """Read what :meth:`save` wrote; the detector stays on its device.

        Raises:
            ArtifactError: missing, damaged, or made for another model.
        """
        document = read_document(path)
        if not isinstance(document, dict) or document.get("kind") != "calibration":
            raise ArtifactError(f"{str(path)!r} is not a trajdist calibration: finish the phase to make one.")
        if document.get("base") != base:
            raise ArtifactError(f"{str(path)!r} was made for another model: use the one of the same run.")
        tensors = read_tensors(path)
        own = {name.removeprefix("residual."): t for name, t in tensors.items() if name.startswith("residual.")}
        device = self.residual.centre.device
        load_state(self.residual, own, path)
        self.residual.to(device)
        self.residual.lay_out()
        for name, tensor in own.items():
            if not bool(tensor.isfinite().all()):
                raise ArtifactError(f"{str(path)!r} has non-finite values in {name!r}: make the calibration again.")
        self.cells = QuantileSketch(ScoreHistogram.from_tensors(tensors, "cells", path))
        self.images = QuantileSketch(ScoreHistogram.from_tensors(tensors, "images", path))
        self.held_out = bool(document.get("held_out", False))
