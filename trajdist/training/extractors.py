"""The extractor of a run: its projection is fitted to statistics of the training images, once, before Phase 1."""

from __future__ import annotations

from collections.abc import Callable

from trajdist.extraction.backbones import Backbone
from trajdist.extraction.projection import BlockMoments, fit_projection
from trajdist.extraction.trajectory import TrajectoryExtractor, update_moments
from trajdist.files import exists
from trajdist.saved import bundle
from trajdist.sharding import Selection
from trajdist.training.passes import CleanImages
from trajdist.training.session import Session


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
