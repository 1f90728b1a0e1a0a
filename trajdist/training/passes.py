"""Passes over clean images without training: the projection before Phase 1, the calibration after each phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trajdist.artifacts import read_document
from trajdist.config import SETS
from trajdist.data.decode import Fit
from trajdist.data.drawing import DefectDraw
from trajdist.data.loader import ImageBatch, IndexAt
from trajdist.extraction.backbones import Backbone
from trajdist.extraction.projection import BlockMoments, fit_projection
from trajdist.extraction.trajectory import TrajectoryExtractor, update_moments
from trajdist.files import exists
from trajdist.runtime.allocator import trim
from trajdist.runtime.processes import to_device
from trajdist.runtime.progress import Progress
from trajdist.saved import bundle
from trajdist.scoring.detector import Detector
from trajdist.scoring.residuals import PlaceMoments, ResidualModel, roots
from trajdist.sharding import Plan, Selection
from trajdist.tables import counted
from trajdist.training.journal import BadImages, check_bad
from trajdist.training.selection import Phase1Images
from trajdist.training.session import Session


@dataclass(frozen=True)
class CleanImages:
    """A phase's clean images and what makes trajectories of them, for passes without training.

    A pass raises what :func:`clean_batches` raises.
    """

    session: Session
    selection: Selection
    extractor: TrajectoryExtractor

    @property
    def set_name(self) -> str:
        """Name of the image set that the phase trains on."""
        return SETS[self.selection.phase]

    @property
    def num_sampled(self) -> int:
        """Number of training images that a pass takes."""
        return min(self.selection.num_train, self.session.config.trajectory.statistics_images)

    def sampled(self, title: str, fit: Fit | None = None) -> Iterator[ImageBatch]:
        """A pass over a random sample of the training images, or over all of them."""
        index_at, scattered = self.selection.sample(self.num_sampled), self.num_sampled < self.selection.num_train
        return clean_batches(
            self.session, self.set_name, index_at, self.num_sampled, title, fit=fit, scattered=scattered
        )

    def held_out(self, title: str, fit: Fit | None = None, defects: DefectDraw | None = None) -> Iterator[ImageBatch]:
        """A pass over the images held out from training, or over the first of them."""
        # Runs of earlier versions hold out more.
        count = min(self.selection.num_holdout, self.session.config.trajectory.statistics_images)
        index_at = self.selection.held_out(count)
        return clean_batches(self.session, self.set_name, index_at, count, title, defects, fit)

    def detector(self, model: nn.Module) -> Detector:
        """A detector on the device, not yet fitted."""
        name = f"phase{self.selection.phase}"
        detector = Detector(name, model, self.extractor.projection.valid_LD, self.extractor.resolution)
        return detector.to(self.session.processes.device)


def prepare_extractor(session: Session, selection: Selection) -> TrajectoryExtractor:
    """The extractor of Phase 1. Measures the statistics of its projection, unless an earlier attempt saved them.

    Raises:
        StopRequested, DataError: see :func:`clean_batches`.
        ArtifactError, ConfigError: see :func:`shared_extractor`.
    """
    path, weights = session.rundir.trajectory, session.config.backbone.weights
    if not session.processes.main_knows(lambda: exists(path)):
        backbone = _make_projection(session, selection)
        # The last bits of eigenvectors differ between machines, so all processes read those of the main process.
        session.extractor = _ready(session, lambda: bundle.with_projection(path, backbone, weights))
    return shared_extractor(session)


def _make_projection(session: Session, selection: Selection) -> Backbone:
    """Measure the statistics, fit the projection to them and save it; returns the backbone."""
    extractor = session.processes.main_first(lambda: _moved(session, bundle.new_extractor(session.config)))
    clean = CleanImages(session, selection, extractor)
    moments = measure(clean)

    def save() -> None:
        trajectory = session.config.trajectory
        fit_projection(extractor.projection, moments, trajectory.projection, session.config.seed)
        document = bundle.trajectory_document(session.config, extractor, clean.num_sampled)
        bundle.save_trajectory(session.rundir.trajectory, extractor, document)

    session.processes.main_does(save)
    return extractor.backbone


def shared_extractor(session: Session) -> TrajectoryExtractor:
    """The run's extractor. Both phases share it: a backbone takes seconds to build, and longer to compile.

    Raises:
        ArtifactError: the saved projection is damaged or belongs to other backbone weights.
        ConfigError: ``backbone.compile`` is set and there is no compiler.
    """
    if session.extractor is None:
        path, weights = session.rundir.trajectory, session.config.backbone.weights
        session.extractor = _ready(session, lambda: bundle.load_extractor(path, weights))
    return session.extractor


def _ready(session: Session, make: Callable[[], TrajectoryExtractor]) -> TrajectoryExtractor:
    """Make the extractor on each process; one that fails, as on a full GPU, ends all."""
    extractor = session.processes.main_first(lambda: _moved(session, make()))
    return extractor.compile() if session.config.backbone.compile else extractor


def _moved(session: Session, extractor: TrajectoryExtractor) -> TrajectoryExtractor:
    return extractor.to(session.processes.device, session.config.memory.images_per_pass)


def measure(clean: CleanImages) -> list[BlockMoments]:
    """First pass: mean and covariance of every trajectory step over a sample of the images, from all processes.

    Raises:
        StopRequested: a stop was requested; the pass is short and starts over next time.
        DataError: too many images could not be read.
    """
    session, extractor = clean.session, clean.extractor
    moments = [BlockMoments(channels, session.processes.device) for channels in extractor.projection.channels]
    for batch in clean.sampled("statistics"):
        with session.accelerator.autocast():
            update_moments(moments, extractor, batch.images, batch.weights)
    for moment in moments:
        moment.all_reduce(session.processes.sum)
    return moments


def clean_batches(
    session: Session,
    set_name: str,
    index_at: IndexAt,
    num_images: int,
    title: str,
    defects: DefectDraw | None = None,
    fit: Fit | None = None,
    scattered: bool = False,
) -> Iterator[ImageBatch]:
    """One pass over ``num_images`` images without training: yields this process's batches, on the device.

    Args:
        index_at: which images, such as ``selection.train``.
        title: shown to the user.
        defects: draws a defect into a copy of each image, as in training; the copies follow the images.
        fit: how images are made square; None takes the set's config.
        scattered: whether the pass takes only a few images of each shard.

    Raises:
        StopRequested: a stop was requested.
        DataError: too many images could not be read.
    """
    processes, plan = session.processes, pass_plan(session, set_name, num_images)
    bad_images = BadImages(session.rundir, processes)
    session.say(f"{title}: {counted(num_images, 'image')}")
    trim()
    loader = session.loader(set_name, index_at, plan, defects=defects, fit=fit, scattered=scattered)
    with Progress(session.console, title, num_images) as progress:
        for step, batch in zip(plan.steps(), loader, strict=True):
            bad_images.note(batch.failures)
            session.watchdog.beat()
            yield to_device(batch, processes.device)
            progress.advance(step.stop)
            if processes.any(bool(session.stop)):
                raise session.stop.error()
    trim()
    bad = bad_images.write(set_name, session.sources[set_name].name)
    check_bad(session, set_name, num_images, len(bad))


def pass_plan(session: Session, set_name: str, num_images: int) -> Plan:
    """The plan by which :func:`clean_batches` walks through its images."""
    return Plan.once(num_images, session.settings(set_name).batch_size, session.processes.world)


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
