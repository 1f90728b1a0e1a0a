"""The jobs of a phase: built from the config, resumed from their checkpoints if there are any, and trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trajdist.config import SETS, Config
from trajdist.data.drawing import DRAWN
from trajdist.data.labelled import LabelledFolder
from trajdist.errors import ArtifactError, ConfigError, DataError
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.runtime.allocator import trim
from trajdist.runtime.clock import Clock, sum_gradients
from trajdist.runtime.memory import reset_peak_memory
from trajdist.runtime.profiling import nothing, profiling
from trajdist.runtime.progress import Progress
from trajdist.saved.checkpoint import Checkpoint, CheckpointWriter, check_fits, restore_optimizer, set_aside_above
from trajdist.sharding import PlaceDraw, Plan, Selection
from trajdist.tables import counted
from trajdist.training.caching import open_cache, open_writer
from trajdist.training.feed import Feed, Stream
from trajdist.training.job import Job
from trajdist.training.journal import Journal
from trajdist.training.keeper import Keeper
from trajdist.training.loop import fit, walk
from trajdist.training.objectives import ReconstructionError, Task
from trajdist.training.optimization import make_optimizer, trainable_weights
from trajdist.training.passes import CleanImages
from trajdist.training.selection import training_plan
from trajdist.training.session import Session
from trajdist.training.validation import Examiner


def reconstruction(config: Config, extractor: TrajectoryExtractor) -> ReconstructionError:
    """The objective of Phase 1, and by default of Phase 2."""
    return ReconstructionError(extractor.projection.valid_LD, config.train.kl_weight, config.train.kl_warmup_fraction)


@dataclass(frozen=True)
class Training:
    """One training run within a phase.

    Attributes:
        selection: the images to train on and those held out.
    """

    session: Session
    selection: Selection
    task: Task


def train(extractor: TrajectoryExtractor, trainings: Sequence[Training]) -> list[Job]:
    """Build the jobs of a phase, resume those that have a checkpoint, and run the loop until all of them are done.

    Several trainings alternate, one micro-batch each, on images that went through the backbone together.

    Raises:
        ArtifactError: a checkpoint belongs to another model or to other steps, or could not be written.
        ConfigError: fewer epochs are wanted than are done, or ``cache.dir`` cannot be written.
        DataError: there is nothing to validate on, or too many images could not be read.
        TrainingError: a loss or a gradient was not finite.
        StopRequested: a stop was requested; a checkpoint of each job is saved.
    """
    session = trainings[0].session
    device, clock = session.processes.device, Clock(session.processes.device)
    feed = Feed(extractor, device, session.accelerator.autocast, clock)
    jobs, walks = [], []
    with ExitStack() as stack:
        stack.callback(_close_caches, trainings, feed)
        stack.callback(feed.close)
        for training in trainings:
            with training.session.naming():
                job = _make_job(training, extractor, feed, clock, sharing=len(trainings))
                training.session.accept()
            jobs.append(job)
            walks.append(_named(training, walk(job)))
        torch.autograd.set_detect_anomaly(session.config.runtime.detect_anomaly)
        trim()
        reset_peak_memory(device)
        jobs[0].tick = stack.enter_context(_profiled(session, jobs[0].phase))
        with _projection_timed(session, extractor, clock):
            fit(walks)
        for job in jobs:
            job.settle_weights()
    return jobs


def _named(training: Training, walk: Iterator[None]) -> Iterator[None]:
    """A walk whose user errors name their domain, if there are several."""
    with training.session.naming():
        yield from walk


def _close_caches(trainings: Sequence[Training], feed: Feed) -> None:
    # Fewer streams than trainings, if one of them could not be set up.
    for training, stream in zip(trainings, feed.streams, strict=False):
        if stream.writer and (why := stream.writer.close()):
            training.session.say(why)


def _make_job(training: Training, extractor: TrajectoryExtractor, feed: Feed, clock: Clock, sharing: int) -> Job:
    """A training's job, restored from its checkpoint if there is one; its images become a stream of ``feed``.

    Args:
        sharing: number of trainings that read at the same time.
    """
    session, selection, task = training.session, training.selection, training.task
    config, phase, processes = session.config, selection.phase, session.processes
    plan = training_plan(config, selection, session.reference_world, processes.world)
    checkpoint = _checkpoint_of(session, phase, task.base)
    cursor = _cursor_of(checkpoint, plan, SETS[phase]) if checkpoint else 0
    task.model.to(processes.device)
    examiner = _examiner(training, extractor)
    model, optimizer = _wrapped(session, task, clock)
    stream = _open_stream(training, plan, cursor, extractor, sharing)
    session.say(_announcement(phase, plan, cursor, task.model, processes.world))
    patience, keeps_best = config.early_stopping.patience, config.validation.keep == "best"
    job = Job(
        session,
        selection,
        task,
        plan,
        cursor,
        batches=feed.add(stream),
        model=model,
        optimizer=optimizer,
        journal=Journal(session, plan, selection),
        keeper=Keeper(trainable_weights(task.model), config.ema.decay, patience, keeps_best),
        examiner=examiner,
        writer=CheckpointWriter(session.rundir.checkpoints, config.checkpoint.keep),
        progress=Progress(session.console, session.titled(f"phase {phase}"), plan.total_images, cursor),
        clock=clock,
        steps_before=session.rundir.phase1_steps() if phase == 2 else 0,
    )
    if checkpoint:
        _restore(job, checkpoint)
        if len(feed.streams) == 1:  # All jobs share one clock.
            clock.restore(checkpoint.state.stages)
    return job


def _wrapped(session: Session, task: Task, clock: Clock) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The task's model and its optimizer, as Accelerate prepares them."""
    device = session.processes.device
    optimizer = make_optimizer(task.model, task.learning_rate, task.weight_decay, device)
    model, prepared = session.accelerator.prepare(task.model, optimizer)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(clock, sum_gradients)
    if session.config.backbone.compile and device.type == "cuda":
        model = torch.compile(model, dynamic=False)  # Slower on CPUs (docs/LOG.md).
    return model, prepared


def _open_stream(training: Training, plan: Plan, cursor: int, extractor: TrajectoryExtractor, sharing: int) -> Stream:
    """The training images from ``cursor`` on, and their cache; ``sharing`` as in :func:`_make_job`."""
    session, selection, defects = training.session, training.selection, training.task.defects
    set_name, whole = SETS[selection.phase], defects is not None
    cache = open_cache(session, set_name, extractor) if session.config.cache.dir and not whole else None
    draw = None if whole else place_draw(session.config, selection.phase, extractor)
    loader = session.loader(set_name, selection.train, plan, cursor, draw, cache, defects, sharing)
    return Stream(loader, open_writer(session, cache) if cache is not None else None)


def _examiner(training: Training, extractor: TrajectoryExtractor) -> Examiner:
    """Create the examiner. Must precede Accelerate's wrapping of the model, which is copied if it will be examined.

    Raises:
        DataError: there is nothing to validate on.
    """
    session, selection, task = training.session, training.selection, training.task
    labelled = session.sources.get("validation")
    validates = session.config.validation.every_epochs > 0
    if validates and labelled is None and not selection.num_holdout:
        raise DataError(
            f"data.{SETS[selection.phase]}.path has {selection.total} images, of which calibration.holdout_fraction="
            f"{session.config.calibration.holdout_fraction:g} holds none out to validate on: raise the fraction."
        )
    model = copy.deepcopy(task.model).eval() if validates or session.trackers else task.model
    clean = CleanImages(session, selection, extractor)
    return Examiner(clean, task, model, labelled if isinstance(labelled, LabelledFolder) else None)


def _profiled(session: Session, phase: int) -> AbstractContextManager[Callable[[], None]]:
    """Profile the steps of the main process, if that was asked for."""
    if not session.profile or not session.processes.is_main:
        return nullcontext(nothing)
    return profiling(session.rundir.path / "profile" / f"phase{phase}.json", session.say)


def _projection_timed(session: Session, extractor: TrajectoryExtractor, clock: Clock) -> AbstractContextManager[None]:
    """Time the projection separately. A compiled graph fuses it with the backbone, so there it counts as backbone."""
    if session.config.backbone.compile:
        return nullcontext()
    return clock.watching(extractor.projection, "projection", within="backbone")


def place_draw(config: Config, phase: int, extractor: TrajectoryExtractor) -> PlaceDraw | None:
    """Chooses the places to train on; None if that is all of them."""
    total = extractor.resolution**2
    count = max(1, round(config.train.cell_fraction * total))
    return PlaceDraw(total, count, config.seed, phase) if count < total else None


def _checkpoint_of(session: Session, phase: int, base: str) -> Checkpoint | None:
    """The checkpoint to resume this phase from, if any; truncates the run's records to match it.

    Raises:
        ArtifactError: the checkpoint belongs to another model, or to Phase 2 while this is Phase 1.
    """
    checkpoint = session.newest_checkpoint()
    if checkpoint and checkpoint.state.phase > phase:
        raise ArtifactError(
            f"{str(session.rundir.path)!r} has a Phase 2, but its Phase 1 is not finished and would start over: "
            "name another run_dir, or start over with --fresh."
        )
    if checkpoint and checkpoint.state.phase < phase:
        checkpoint = None
    elif checkpoint and checkpoint.state.base != base:
        raise ArtifactError(
            f"the checkpoints in {str(session.rundir.checkpoints)!r} belong to other weights than this run's: "
            "restore the phase1 folder, or start over with --fresh."
        )
    if session.processes.is_main:
        if phase == 2 and checkpoint is None:
            _set_aside_unfinished(session)
        before = session.rundir.records_after_phase1() if phase == 2 else {}
        session.rundir.rewind_records(checkpoint.state.file_sizes if checkpoint else before)
    session.processes.wait()
    return checkpoint


def _set_aside_unfinished(session: Session) -> None:
    """Set aside the checkpoints of further, unfinished epochs of Phase 1: Phase 2 builds on its finished ones."""
    if left := set_aside_above(session.rundir.checkpoints, session.rundir.phase1_steps()):
        session.say(f"checkpoints of unfinished further epochs of phase 1 are set aside: {', '.join(left)}")


def _cursor_of(checkpoint: Checkpoint, plan: Plan, set_name: str) -> int:
    """Where to continue, in images consumed.

    Raises:
        ArtifactError: the checkpoint was made with another global batch.
        ConfigError: fewer epochs are wanted than are done.
    """
    cursor = checkpoint.state.cursor
    if checkpoint.state.global_batch != plan.global_batch or not plan.is_between_steps(cursor):
        raise ArtifactError(
            f"the checkpoint at {cursor:,} images was made with steps of {checkpoint.state.global_batch} images, "
            f"this run takes {plan.global_batch}: restore the checkpoints folder, or start over with --fresh."
        )
    if cursor > plan.total_images:
        raise ConfigError(
            f"data.{set_name}.num_epochs={plan.num_epochs}, but the run is in epoch {-(-cursor // plan.num_images)}: "
            "keep at least that many, or start over with --fresh."
        )
    return cursor


def _restore(job: Job, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into the job.

    Raises:
        ArtifactError: it does not fit the model or the optimizer.
    """
    weights, scaler = job.trainable_weights(), job.session.accelerator.scaler
    check_fits(checkpoint, weights, job.optimizer)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(checkpoint.model[name])
    restore_optimizer(job.optimizer, checkpoint.optimizer)
    if scaler is not None and checkpoint.state.scaler:
        scaler.load_state_dict(checkpoint.state.scaler)
    job.keeper.restore(checkpoint.state.validated, checkpoint.kept, weights)
    if checkpoint.state.drawn != DRAWN and _compares_defects(job):
        job.keeper.forget()
        job.session.say(
            "this version of trajdist draws other defects than the one that the run began with: validations from now "
            "on are not compared with those before"
        )
    job.journal.restore(checkpoint.state.journal)
    job.seconds_before = checkpoint.state.seconds


def _compares_defects(job: Job) -> bool:
    """Whether validations to come are compared with earlier ones, by what the model finds of drawn defects."""
    to_come = job.keeper.epoch < job.plan.num_epochs and not job.keeper.exhausted
    return job.task.defects is not None and job.examiner.labelled is None and job.keeper.best is not None and to_come


def _announcement(phase: int, plan: Plan, cursor: int, model: nn.Module, world: int) -> str:
    trained = sum(weight.numel() for weight in trainable_weights(model).values())
    text = (
        f"phase {phase}: {plan.num_images:,} images x {counted(plan.num_epochs, 'epoch')}, {trained:,} weights, "
        f"{plan.global_batch:,} images per step ({counted(world, 'process', 'processes')} x {plan.slots} images x "
        f"{counted(plan.micro_batches, 'micro-batch', 'micro-batches')})"
    )
    return text + (f"; resuming after {cursor:,} images" if cursor else "")
