"""The calibration after each phase: what residuals and scores of clean images are like."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from trajdist.artifacts import read_document
from trajdist.extraction.projection import BlockMoments
from trajdist.files import exists
from trajdist.scoring.detector import Detector
from trajdist.scoring.residuals import PlaceMoments, ResidualModel, roots
from trajdist.training.passes import CleanImages
from trajdist.training.selection import Phase1Images
from trajdist.training.session import Session


def contrast_residuals(clean: CleanImages, model: nn.Module, base: str) -> ResidualModel:
    """Statistics of the base model's residuals on the domain. Measured once: resumed runs read the same file.

    Raises:
        StopRequested: a stop was requested; the pass starts over next time.
        DataError: too many images could not be read.
        ArtifactError: the file is damaged or was made for another model.
    """
    session = clean.session
    path, begun = session.rundir.contrast, session.checkpoint_phase() == clean.selection.phase
    detector = clean.detector(model)
    # Before the first checkpoint, Phase 1 may have been trained further since these were measured.
    if not session.processes.main_knows(lambda: exists(path) and (begun or is_calibration_of(path, base))):
        detector.residual.fit(_residual_moments(clean, detector))

        def save() -> None:
            path.parent.mkdir(exist_ok=True)
            detector.save(path, base)

        session.processes.main_does(save)
    detector.load(path, base)
    return detector.residual


def is_calibration_of(path: Path, base: str) -> bool:
    """Whether a calibration was made for the model with this fingerprint."""
    document = read_document(path)
    return isinstance(document, dict) and document.get("base") == base


def calibrate(
    clean: CleanImages, model: nn.Module, path: Path, base: str, whitened: ResidualModel | None = None
) -> None:
    """Learn the distributions of residuals and scores of clean images, and save them to ``path``.

    Residuals are measured on (a bounded sample of) the images trained on; scores on images held out from training,
    so that the p-values derived from them are valid. Everything is computed in float32, as in scoring.

    Args:
        base: fingerprint of the model, which the calibration is valid for.
        whitened: supplies the whitening that the model was trained with; None estimates a new one.

    Raises:
        StopRequested: a stop was requested; the passes start over next time.
        DataError: too many images could not be read.
        ArtifactError: ``path`` cannot be written.
    """
    session = clean.session
    detector = clean.detector(model)
    fit_detector(clean, detector, whitened)
    detector.held_out = clean.selection.num_holdout > 0
    if not detector.held_out:
        session.say("no images are held out: p-values rest on training images, and are too small")
    elif session.processes.main_knows(lambda: _may_be_trained_on(clean)):
        session.say(
            "phase 1 may have been trained on images that are held out here, as its set and this one overlap: p-values "
            "may be too small; train both phases on the same set with the same seed, or on sets apart"
        )
    elif _chose_weights(session):
        session.say("the held-out images also chose the weights: p-values are slightly too small")
    cells, images = detector.cells.histogram, detector.images.histogram
    # Make images square as scoring will, however training did it: otherwise these scores and new ones do not compare.
    fit = session.config.data.domain.fit
    for batch in clean.held_out("calibration", fit) if detector.held_out else clean.sampled("calibration", fit):
        scores = detector.score(clean.extractor(batch.images))
        cells.update(scores.cells_BHW.cpu(), batch.weights.cpu()[:, None, None].expand_as(scores.cells_BHW))
        images.update(scores.images_B.cpu(), batch.weights.cpu())
    for histogram in (cells, images):
        histogram.all_reduce(session.processes.sum_from_host)
    session.processes.main_does(lambda: detector.save(path, base))


def _chose_weights(session: Session) -> bool:
    """Whether the weights were selected by validation on the held-out images rather than on labelled ones."""
    config = session.config
    chosen = config.validation.keep == "best" or config.early_stopping.patience > 0
    return config.validation.every_epochs > 0 and config.validation.path is None and chosen


def _may_be_trained_on(clean: CleanImages) -> bool:
    """Whether Phase 1 may have been trained on what Phase 2 holds out."""
    session, selection = clean.session, clean.selection
    if selection.phase == 1 or selection.split_of is not None:
        return False
    return Phase1Images.below(session.rundir, session.config).may_be_among(session.config.data.domain.path)


def fit_detector(clean: CleanImages, detector: Detector, whitened: ResidualModel | None) -> None:
    """Fit the detector's residual model to (a bounded sample of) the images trained on, in two passes.

    Args:
        whitened: see :func:`calibrate`.

    Raises:
        StopRequested, DataError: see :func:`clean_batches`.
    """
    if whitened is not None:
        detector.residual.load_state_dict(whitened.state_dict())
    moments = _residual_moments(clean, detector)
    detector.residual.fit(moments, whiten=whitened is None)
    _fit_places(clean, detector)


@torch.no_grad()
def _residual_moments(clean: CleanImages, detector: Detector) -> PlaceMoments:
    """Moments of the residuals of (a bounded sample of) the images trained on: the first pass."""
    processes, extractor = clean.session.processes, clean.extractor
    moments = PlaceMoments(extractor.resolution**2, sum(detector.residual.widths), processes.device)
    for batch in clean.sampled("residuals"):
        moments.update(detector.residuals(extractor(batch.images)), batch.weights)
    moments.all_reduce(processes.sum)
    return moments


@torch.no_grad()
def _fit_places(clean: CleanImages, detector: Detector) -> None:
    """Fit what clean images usually score at each place: the second pass."""
    processes, extractor = clean.session.processes, clean.extractor
    usual = BlockMoments(extractor.resolution**2, processes.device)
    for batch in clean.sampled("places"):
        usual.update(roots(detector.energies(extractor(batch.images))), batch.weights)
    usual.all_reduce(processes.sum)
    detector.residual.fit_places(usual)
