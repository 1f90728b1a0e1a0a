"""Validation during training: the loss on held-out clean images, and AUROCs on labelled images.

The weights are copied into a separate model outside Accelerate, so the model in training is not touched. Computed in
float32, as in scoring. All processes take part; all sums are exact, so all of them get the same results.

Shape suffixes: B images, H W grid, N rows (places of all images), L steps, D channels, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from trajdist.data.decode import to_square
from trajdist.data.labelled import GOOD, LabelledFolder
from trajdist.data.loader import ImageBatch
from trajdist.errors import TrainingError
from trajdist.runtime.trackers import Picture
from trajdist.saved.checkpoint import Tensors
from trajdist.scoring import pictures, residuals
from trajdist.scoring.detector import CellScores
from trajdist.scoring.histogram import ScoreHistogram
from trajdist.scoring.metrics import PixelScores, curve
from trajdist.sharding import VALIDATION, picked
from trajdist.training.calibrating import fit_detector
from trajdist.training.journal import FIXED_POINT, fixed_point
from trajdist.training.objectives import Task, reconstructing
from trajdist.training.passes import CleanImages, clean_batches, pass_plan
from trajdist.training.session import Session

NUM_PICTURES = 4


@dataclass(frozen=True)
class Examiner:
    """Examines a phase's weights between its epochs.

    Attributes:
        clean: the images of the phase.
        model: of the same architecture as the one in training; weights are copied into it.
        labelled: the labelled images, or None.
    """

    clean: CleanImages
    task: Task
    model: nn.Module
    labelled: LabelledFolder | None

    @torch.no_grad()
    def validate(self, weights: Tensors) -> dict[str, Any]:
        """Loss, recon and kl of the held-out images, and the AUROCs on the labelled ones. All processes must call it.

        Raises:
            StopRequested: a stop was requested.
            TrainingError: the loss is not finite.
            DataError: too many images, or a mask, could not be read.
            SystemExit: a mask could not be read on another process.
        """
        self._load(weights)
        found = self._held_out() if self.clean.selection.num_holdout else {}
        return found | (self._labelled_aurocs(self.labelled) if self.labelled else {})

    @torch.no_grad()
    def draw(self, weights: Tensors) -> list[Picture]:
        """A few held-out images, each next to its map of squared errors: uint8 ``[S, width, 3]`` each.

        Runs on one process alone. All maps of a call share one colour scale.
        """
        self._load(weights)
        pixels_BSS3 = self._few_images()
        if not len(pixels_BSS3):
            return []
        extractor = self.clean.extractor
        images = torch.from_numpy(pixels_BSS3).permute(0, 3, 1, 2).to(self.clean.session.processes.device)
        trajectories = extractor(images)
        target_NLD = trajectories.flatten(0, 2)
        error_NLD = target_NLD - reconstructing(self.model)(target_NLD).output_NLD.float()
        cells_BHW = error_NLD[:, extractor.projection.valid_LD].square().mean(-1).view(trajectories.shape[:3])
        maps_BSS = residuals.upsample(cells_BHW, pixels_BSS3.shape[1]).cpu().numpy()
        low, high = float(maps_BSS.min()), float(maps_BSS.max())
        panels = zip(pixels_BSS3, maps_BSS, strict=True)
        return [np.asarray(pictures.panel(image, map_SS, low, high)) for image, map_SS in panels]

    def _load(self, weights: Tensors) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights.items():
            own[name].copy_(weight)

    def _silently(self) -> CleanImages:
        return replace(self.clean, session=self.clean.session.silent())

    def _held_out(self) -> dict[str, Any]:
        clean, processes = self._silently(), self.clean.session.processes
        sums = torch.zeros(5, dtype=torch.int64, device=processes.device)
        # Not those that the first epoch was trained on.
        defects = self.task.defects and replace(self.task.defects, purpose=VALIDATION)
        for batch in clean.held_out("validation", defects=defects):
            sums += self._loss_sums(batch)
        images, bad, *parts = processes.sum(sums).tolist()
        if bad:
            raise TrainingError(
                f"the loss of {bad} held-out images of data.{clean.set_name}.path is not finite: lower the learning "
                "rate and start over with --fresh."
            )
        means = [part / FIXED_POINT / max(1, images) for part in parts]
        return {"images": images, **dict(zip(("loss", "recon", "kl"), means, strict=True))}

    def _loss_sums(self, batch: ImageBatch) -> torch.Tensor:
        losses = self.task.objective(self.model, self.clean.extractor(batch.images), batch, 1.0)
        counted = batch.weights > 0
        bad = counted & ~losses.loss.isfinite()
        return torch.stack([counted.sum(), bad.sum(), *(fixed_point(part, batch.weights) for part in losses)])

    def _labelled_aurocs(self, labelled: LabelledFolder) -> dict[str, Any]:
        """AUROCs after a calibration like that at the end of the phase: the figures that ``evaluate`` would report."""
        clean = self._silently()
        session = clean.session
        detector = clean.detector(reconstructing(self.model))
        fit_detector(clean, detector, self.task.whitened)
        counts = _Counts(labelled, session)
        plan, order = pass_plan(session, "validation", len(labelled)), partial(picked, np.arange(len(labelled)))
        batches: Iterable[ImageBatch] = clean_batches(session, "validation", order, len(labelled), "validation")
        for step, batch in zip(plan.steps(), batches, strict=True):
            start = plan.micro_batch(step, 0, session.processes.rank).start
            counts.add(start, detector.score(clean.extractor(batch.images)), batch.weights)
        return counts.conclude()

    def _few_images(self) -> pictures.Pixels:
        """The first readable held-out images (training images if none are held out), uint8 ``[B, S, S, 3]``."""
        session, selection, set_name = self.clean.session, self.clean.selection, self.clean.set_name
        source = session.sources[set_name]
        index_at = selection.holdout if selection.num_holdout else selection.train
        most = selection.num_holdout or selection.num_train
        size, fit = session.config.data.image_size, session.settings(set_name).fit
        found: list[pictures.Pixels] = []
        for index in index_at(0, np.arange(min(most, 4 * NUM_PICTURES))).tolist():
            try:
                found.append(to_square(source.load(index, size), size, fit))
            except Exception:  # Corrupt data makes decoders raise anything; the loader reports the image.
                continue
            if len(found) == NUM_PICTURES:
                break
        return np.stack(found) if found else np.zeros((0, size, size, 3), np.uint8)


class _Counts:
    """Histograms of the scores of labelled images and of their pixels."""

    def __init__(self, labelled: LabelledFolder, session: Session) -> None:
        self._labelled, self._processes = labelled, session.processes
        self._size, self._fit = session.config.data.image_size, session.config.data.domain.fit
        self._images = {True: ScoreHistogram(), False: ScoreHistogram()}
        self._pixels = PixelScores()

    def add(self, start: int, found: CellScores, weights_B: torch.Tensor) -> None:
        """Add a batch whose first image has index ``start``; a mask that cannot be read ends all processes."""
        maps_BSS, scores_B = residuals.upsample(found.cells_BHW, self._size).cpu(), found.images_B.cpu()
        slots = weights_B.nonzero().flatten().tolist()

        def count() -> None:
            for slot in slots:
                self._pixels.update(maps_BSS[slot], self._labelled.mask(start + slot, self._size, self._fit))
                self._images[self._labelled.kind(start + slot) == GOOD].update(scores_B[slot])

        self._processes.all_do(count)

    def conclude(self) -> dict[str, Any]:
        """The number of labelled images and the AUROCs, over all processes. All of them must call it."""
        for histogram in self._images.values():
            histogram.all_reduce(self._processes.sum_from_host)
        self._pixels.all_reduce(self._processes.sum_from_host)
        images = sum(int(histogram.counts_K.sum()) for histogram in self._images.values())
        return {
            "labelled_images": images,
            "image_auroc": curve(self._images[False], self._images[True]).area(),
            "pixel_auroc": self._pixels.curve().area(),
        }
