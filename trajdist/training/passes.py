"""Passes over clean images without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from trajdist.config import SETS
from trajdist.data.decode import Fit
from trajdist.data.drawing import DefectDraw
from trajdist.data.loader import ImageBatch, IndexAt
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.runtime.allocator import trim
from trajdist.runtime.processes import to_device
from trajdist.runtime.progress import Progress
from trajdist.scoring.detector import Detector
from trajdist.sharding import Plan, Selection
from trajdist.tables import counted
from trajdist.training.journal import BadImages, check_bad
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
