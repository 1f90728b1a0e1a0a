"""The first pass of Phase 1: means and covariances of all blocks, and the projection made from them."""

from __future__ import annotations

import torch

from trajdist import bundle
from trajdist.errors import StopRequested
from trajdist.journal import BadImages
from trajdist.loop import move
from trajdist.progress import Progress
from trajdist.runtime import Clock
from trajdist.session import Session
from trajdist.sharding import Plan, Selection
from trajdist.trajectory import BlockMoments, TrajectoryExtractor, fit_projection


def prepare_extractor(session: Session, selection: Selection) -> TrajectoryExtractor:
    """The extractor of Phase 1: statistics first, unless an earlier attempt has saved them."""
    if session.rundir.trajectory.exists():
        return load_extractor(session)
    with session.processes.main_first():
        extractor = bundle.new_extractor(session.config)
    extractor.to(session.processes.device)
    moments, num_images = measure(session, selection, extractor)
    if session.processes.is_main:
        trajectory = session.config.trajectory
        fit_projection(extractor.projection, moments, trajectory.projection, session.config.seed)
        document = bundle.trajectory_document(session.config, extractor, num_images)
        bundle.save_trajectory(session.rundir.trajectory, extractor, document)
    session.processes.wait()
    # Eigenvectors differ in their last bits from machine to machine: all processes read the main one's.
    return load_extractor(session)


def load_extractor(session: Session) -> TrajectoryExtractor:
    with session.processes.main_first():
        extractor = bundle.load_extractor(session.rundir.trajectory, session.config.backbone.weights)
    extractor.to(session.processes.device)
    return extractor


def measure(session: Session, selection: Selection, extractor: TrajectoryExtractor) -> tuple[list[BlockMoments], int]:
    """First pass: mean and covariance of every block over a bounded random sample of the images.

    Raises:
        StopRequested: the pass is short and bounded; it starts over next time.
        DataError: none of the images could be read.
    """
    processes, config = session.processes, session.config
    num_images = min(selection.num_train, config.trajectory.statistics_images)
    batch_size = config.data.imagenet.batch_size
    plan = Plan(num_images, 1, processes.world * batch_size, processes.world, batch_size)
    moments = [BlockMoments(block.channels, processes.device) for block in extractor.backbone.blocks]
    bad_images = BadImages(session.rundir, processes)
    title = f"statistics of {num_images} images"
    clock = Clock(processes.device)
    with Progress(session.console, title, num_images) as progress:
        session.say(title)
        for step, batch in zip(plan.steps(), session.loader("imagenet", selection, plan), strict=True):
            batch = move(batch, processes.device, clock)
            bad_images.note(batch.failures)
            with session.accelerator.autocast():
                update_moments(moments, extractor, batch.images, batch.weights)
            progress.advance(step.stop)
            if processes.any(bool(session.stop)):
                raise StopRequested(session.stop.why or "another process was asked to stop")
    bad_images.write("imagenet", session.sources["imagenet"].name)
    for moment in moments:
        moment.all_reduce(processes.sum)
    return moments, num_images


def update_moments(
    moments: list[BlockMoments], extractor: TrajectoryExtractor, images: torch.Tensor, weights: torch.Tensor
) -> None:
    """Add a batch of images to the statistics; those of weight 0 do not count."""
    cells = weights.repeat_interleave(extractor.resolution**2)
    extractor.observe(images, lambda block, pooled_BPC: moments[block].update(pooled_BPC.flatten(0, 1), cells))
