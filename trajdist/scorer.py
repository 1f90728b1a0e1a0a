"""A trained run as a function: images in, anomaly maps, scores and p-values out.

Shape suffixes: B images, H W grid, L blocks, D channels, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from trajdist import bundle, residuals
from trajdist.artifacts import load_state, read_document, read_tensors, write_tensors
from trajdist.calibration import QuantileSketch
from trajdist.data.decode import to_rgb, to_square
from trajdist.errors import ArtifactError
from trajdist.histogram import ScoreHistogram
from trajdist.rundir import RunDir
from trajdist.trajectory import TrajectoryExtractor


@dataclass(frozen=True)
class CellScores:
    """Scores of a batch on the grid: ``cells_BHW``, the blocks' part in it ``energies_BHWL``, ``images_B``."""

    cells_BHW: torch.Tensor
    energies_BHWL: torch.Tensor
    images_B: torch.Tensor


@dataclass(frozen=True)
class Scores:
    """What the Python API returns, on the CPU.

    Attributes:
        maps: float32 ``[B, S, S]``, anomaly maps at the resolution the backbone sees.
        scores: float32 ``[B]``, one per image.
        p_values: float64 ``[B]``, conformal: the share of clean images that score at least as much.
    """

    maps: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    p_values: npt.NDArray[np.float64]


class Detector:
    """One model (the base, or the base with one adapter) and what its residuals are like on clean images.

    Attributes:
        cells, images: scores of clean cells and images that were not trained on.
        held_out: False if there were none to spare and training images had to serve.
    """

    def __init__(self, name: str, model: nn.Module, residual: residuals.ResidualModel) -> None:
        self.name, self.model, self.residual = name, model.eval(), residual
        self.cells, self.images = QuantileSketch(ScoreHistogram()), QuantileSketch(ScoreHistogram())
        self.held_out = True

    def to(self, device: torch.device) -> Detector:
        self.model.to(device)
        self.residual.to(device)
        return self

    def residuals(self, trajectories_BHWLD: torch.Tensor, valid_LD: torch.Tensor) -> torch.Tensor:
        """Valid entries of trajectory minus reconstruction, ``[N, F]``."""
        target_NLD = trajectories_BHWLD.flatten(0, 2)
        return (target_NLD - self.model(target_NLD).output_NLD.float())[:, valid_LD]

    @torch.no_grad()
    def energies(self, trajectories_BHWLD: torch.Tensor, valid_LD: torch.Tensor) -> torch.Tensor:
        """Blocks' energies, ``[B, P, L]``, in float32."""
        return self.residual.energies(self.residuals(trajectories_BHWLD, valid_LD))

    @torch.no_grad()
    def score(self, trajectories_BHWLD: torch.Tensor, valid_LD: torch.Tensor) -> CellScores:
        """Score a batch of trajectories."""
        grid = trajectories_BHWLD.shape[1:3]
        energies_BPL = self.energies(trajectories_BHWLD, valid_LD)
        cells_BP = self.residual.cells(energies_BPL)
        image_scores_B = residuals.image_scores(cells_BP)
        return CellScores(cells_BP.unflatten(1, grid), energies_BPL.unflatten(1, grid), image_scores_B)

    def save(self, path: Path, base: str) -> None:
        """Write the calibration."""
        tensors = {f"residual.{name}": tensor for name, tensor in self.residual.state_dict().items()}
        tensors |= self.cells.histogram.to_tensors("cells") | self.images.histogram.to_tensors("images")
        write_tensors(path, tensors, {"format": 1, "kind": "calibration", "base": base, "held_out": self.held_out})

    def load(self, path: Path, base: str) -> None:
        """Read what :meth:`save` wrote.

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
        load_state(self.residual, own, path)
        self.cells = QuantileSketch(ScoreHistogram.from_tensors(tensors, "cells", path))
        self.images = QuantileSketch(ScoreHistogram.from_tensors(tensors, "images", path))
        self.held_out = bool(document.get("held_out", False))


class Scorer:
    """Scores images with one or several detectors; the backbone runs once."""

    def __init__(self, extractor: TrajectoryExtractor, detectors: Sequence[Detector], size: int, fit: Any) -> None:
        self.extractor, self.detectors = extractor, list(detectors)
        self.size, self.fit = size, fit
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Scorer:
        """Move to a device."""
        self.device = torch.device(device)
        self.extractor.to(self.device)
        for detector in self.detectors:
            detector.to(self.device)
        return self

    @torch.no_grad()
    def score_batch(self, images_BCSS: torch.Tensor) -> list[CellScores]:
        """uint8 ``[B, 3, S, S]`` on the device -> one :class:`CellScores` per detector."""
        trajectories = self.extractor(images_BCSS)
        valid_LD = self.extractor.projection.valid_LD
        return [detector.score(trajectories, valid_LD) for detector in self.detectors]

    def __call__(self, images: Sequence[Any]) -> Scores:
        """Score PIL images, arrays or tensors with the first detector.

        Args:
            images: PIL images, uint8 arrays ``[H, W, 3]`` or ``[H, W]``, or tensors ``[3, H, W]`` (uint8, or float in
                0..1), of any sizes; a tensor or an array with a leading batch dimension is such a sequence.
        """
        squares = np.stack([to_square(_to_pil(image), self.size, self.fit) for image in images])
        batch = torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device)
        result = self.score_batch(batch)[0]
        maps = residuals.upsample(result.cells_BHW, self.size)
        p_values = self.detectors[0].images.p_values(result.images_B)
        return Scores(maps.cpu().numpy(), result.images_B.cpu().numpy(), p_values.numpy())


def _to_pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        pixels = image.numpy() if image.ndim == 2 else image.permute(1, 2, 0).numpy()
    else:
        pixels = np.asarray(image)
    if pixels.dtype.kind == "f":
        pixels = np.rint(pixels.clip(0.0, 1.0) * 255.0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return to_rgb(Image.fromarray(pixels.astype(np.uint8)))


def load(
    run_dir: str | Path,
    adapter: str | Path | Sequence[str | Path] | None = None,
    phase: int | None = None,
    device: str = "auto",
) -> Scorer:
    """Load a run for scoring.

    Args:
        run_dir: a run directory.
        adapter: one or several adapter folders to use instead of the run's own.
        phase: 1 for the unadapted model; None for the latest phase there is.
        device: a torch device; ``auto`` takes an accelerator where there is one.

    Raises:
        ArtifactError: something is missing, damaged, or belongs to another run.
    """
    rundir = RunDir(run_dir)
    if not rundir.trajectory.is_file():
        raise ArtifactError(f"{str(run_dir)!r} has no phase1/trajectory.safetensors: name a run whose Phase 1 is done.")
    extractor = bundle.load_extractor(rundir.trajectory)
    document = bundle.read(rundir.trajectory, bundle.TrajectoryDocument)
    adapters = [Path(adapter)] if isinstance(adapter, (str, Path)) else [Path(each) for each in adapter or ()]
    if not adapters and phase != 1 and rundir.adapter.is_dir():
        adapters = [rundir.adapter]
    if phase == 2 and not adapters:
        raise ArtifactError(f"{str(run_dir)!r} has no phase2/adapter: run Phase 2 first, or use --phase 1.")
    chosen: list[Path | None] = [*adapters] or [None]
    detectors = [_load_detector(rundir, extractor, folder) for folder in chosen]
    scorer = Scorer(extractor, detectors, document.image_size, document.fit)
    return scorer.to(_device(device))


def _load_detector(rundir: RunDir, extractor: TrajectoryExtractor, adapter: Path | None) -> Detector:
    model, document = bundle.load_model(rundir.model)
    bundle.check_trajectories(rundir, document, extractor)
    base = bundle.base_fingerprint(model, document)
    residual = residuals.ResidualModel(extractor.projection.valid_LD, extractor.resolution)
    if adapter is None:
        detector = Detector("phase1", model, residual)
        detector.load(rundir.calibration(1), base)
        return detector
    # PEFT takes longer to import than torch; the base model does without.
    from trajdist import lora

    adapted = lora.load_adapter(model, adapter, base)
    detector = Detector(_adapter_name(adapter), adapted, residual)
    detector.load(adapter.parent / "calibration.safetensors", lora.adapter_fingerprint(adapted, base))
    return detector


def _adapter_name(folder: Path) -> str:
    """``runs/gravel/phase2/adapter`` is called ``gravel``."""
    parts = [part for part in folder.resolve().parts if part not in ("adapter", "phase2")]
    return parts[-1] if parts else str(folder)


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
