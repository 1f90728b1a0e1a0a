"""The jobs of a phase: built from the config, resumed from their checkpoints if there are any, run through the loop."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trajdist.allocator import trim
from trajdist.bundle import trajectory_fingerprint
from trajdist.checkpoint import Checkpoint, CheckpointWriter, Tensors
from trajdist.clock import Clock, sum_gradients
from trajdist.config import SETS, Config
from trajdist.data.cache import GIB, CacheWriter, TrajectoryCache
from trajdist.data.decode import TRANSFORM
from trajdist.data.drawing import DefectDraw
from trajdist.data.labelled import LabelledFolder
from trajdist.errors import ArtifactError, ConfigError, DataError
from trajdist.feed import Feed, Pairs, Stream, num_places
from trajdist.job import Job, Position, Recipe, Rhythm
from trajdist.journal import Journal
from trajdist.keeper import Keeper
from trajdist.loop import fit, restore, settle_weights, walk
from trajdist.objectives import Objective, ReconstructionError
from trajdist.optimizer import make_optimizer
from trajdist.profiling import nothing, profiling
from trajdist.progress import Progress
from trajdist.residuals import ResidualModel
from trajdist.runtime import reset_peak_memory
from trajdist.session import Session
from trajdist.sharding import PlaceDraw, Plan, Selection
from trajdist.trajectory import TrajectoryExtractor
from trajdist.validation import Examiner


@dataclass(frozen=True)
class Trainee:
    """A model to train, what it minimises, how fast, and the fingerprint of what it stands on.

    ``defects`` draws what the objective contrasts clean images with; it sees whole images, afresh in every epoch.
    ``whitened`` has the whitening that the model is trained under, if it is trained under one.
    """

    model: nn.Module
    objective: Objective
    learning_rate: float
    weight_decay: float
    base: str
    defects: DefectDraw | None = None
    whitened: ResidualModel | None = None


def reconstruction(config: Config, extractor: TrajectoryExtractor) -> ReconstructionError:
    """The objective of Phase 1, and by default of Phase 2."""
    return ReconstructionError(extractor.projection.valid_LD, config.train.kl_weight, config.train.kl_warmup_fraction)


@dataclass(frozen=True)
class Pupil:
    """One training of a phase: in which run, how far, on which images, and what is trained."""

    session: Session
    at: Position
    selection: Selection
    trainee: Trainee


@dataclass(frozen=True)
class Start:
    """A pupil made ready, before there are batches."""

    pupil: Pupil
    plan: Plan
    checkpoint: Checkpoint | None
    cursor: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    keeper: Keeper
    examiner: Examiner
    stream: Stream


def train(extractor: TrajectoryExtractor, pupils: Sequence[Pupil]) -> list[Job]:
    """Build the jobs of a phase, resume those that have a checkpoint, and run the loop to the end of them all.

    Several pupils are taught in turn, a micro-batch each, on images that went through the backbone together.
    """
    session, phase = pupils[0].session, pupils[0].at.phase
    clock = Clock(session.processes.device)
    starts = []
    for pupil in pupils:
        with pupil.session.naming():
            starts.append(_make_ready(pupil, extractor, clock, sharing=len(pupils)))
    feed = Feed(
        [start.stream for start in starts], extractor, session.processes.device, session.accelerator.autocast, clock
    )
    torch.autograd.set_detect_anomaly(session.config.runtime.detect_anomaly)
    trim()
    reset_peak_memory(session.processes.device)
    with ExitStack() as stack:
        stack.callback(_close_caches, starts)
        stack.callback(feed.close)
        tick = stack.enter_context(_profiled(session, phase))
        jobs = []
        for number, start in enumerate(starts):
            progress = stack.enter_context(_progress(start))
            jobs.append(_job(start, feed.of(number), clock, nothing if number else tick, progress))
        if starts[0].checkpoint:
            clock.restore(starts[0].checkpoint.state["stages"])
        with _projection_timed(session, extractor, clock):
            fit([_named(start, walk(job, start.cursor)) for job, start in zip(jobs, starts, strict=True)])
        for job in jobs:
            with clock("checkpoint"):
                job.writer.finish()
            settle_weights(job)
    return jobs


def _named(start: Start, walk: Iterator[None]) -> Iterator[None]:
    """A walk whose errors say whose it is, where there are several."""
    with start.pupil.session.naming():
        yield from walk


def _close_caches(starts: list[Start]) -> None:
    for start in starts:
        if start.stream.writer and (why := start.stream.writer.close()):
            start.pupil.session.say(why)


def _make_ready(pupil: Pupil, extractor: TrajectoryExtractor, clock: Clock, sharing: int) -> Start:
    """Model, optimizer, loader and cache of a pupil; ``sharing`` is how many read images at the same time."""
    session, phase, selection, trainee = pupil.session, pupil.at.phase, pupil.selection, pupil.trainee
    config, processes, set_name = session.config, session.processes, SETS[phase]
    plan = session.plan(set_name, selection.num_train, getattr(config.data, set_name).num_epochs)
    checkpoint = _checkpoint_of(session, phase, trainee.base)
    cursor = _cursor_of(checkpoint, plan, set_name) if checkpoint else 0
    model = trainee.model.to(processes.device)
    examiner = _examiner(session, phase, selection, extractor, trainee)
    optimizer = make_optimizer(model, trainee.learning_rate, trainee.weight_decay, processes.device)
    prepared_model, prepared_optimizer = session.accelerator.prepare(model, optimizer)
    if isinstance(prepared_model, DistributedDataParallel):
        prepared_model.register_comm_hook(clock, sum_gradients)
    if config.backbone.compile and processes.device.type == "cuda":
        prepared_model = torch.compile(prepared_model, dynamic=False)  # On CPUs it loses (docs/LOG.md).
    whole = trainee.defects is not None
    cache = _cache(session, set_name, extractor) if config.cache.dir and not whole else None
    draw = None if whole else _place_draw(session, phase, extractor)
    loader = session.loader(set_name, selection.train, plan, cursor, draw, cache, trainee.defects, sharing)
    writer = _cache_writer(session, cache) if cache is not None else None
    session.say(_announcement(phase, plan, cursor, model, processes.world))
    return Start(
        pupil=pupil,
        plan=plan,
        checkpoint=checkpoint,
        cursor=cursor,
        model=prepared_model,
        optimizer=prepared_optimizer,
        keeper=_keeper(config, model),
        examiner=examiner,
        stream=Stream(loader, writer),
    )


def _progress(start: Start) -> Progress:
    session = start.pupil.session
    title = session.titled(f"phase {start.pupil.at.phase}")
    return Progress(session.console, title, start.plan.total_images, start.cursor)


def _job(start: Start, batches: Pairs, clock: Clock, tick: Callable[[], None], progress: Progress) -> Job:
    """The job of a pupil, at the checkpoint if there is one."""
    pupil, plan = start.pupil, start.plan
    session, phase, trainee = pupil.session, pupil.at.phase, pupil.trainee
    config = session.config
    job = Job(
        phase=phase,
        accelerator=session.accelerator,
        processes=session.processes,
        plan=plan,
        batches=batches,
        model=start.model,
        objective=trainee.objective,
        optimizer=start.optimizer,
        recipe=_recipe(config, trainee.learning_rate),
        rhythm=_rhythm(config),
        journal=_journal(session, phase, plan, pupil.selection),
        rundir=session.rundir,
        writer=CheckpointWriter(session.rundir.checkpoints, config.checkpoint.keep),
        stop=session.stop,
        watchdog=session.watchdog,
        progress=progress,
        clock=clock,
        at=pupil.at,
        base=trainee.base,
        first_checkpoint_number=_steps_before(session, phase),
        tick=tick,
        keeper=start.keeper,
        trackers=session.trackers,
        validate=start.examiner.validate,
        draw=start.examiner.draw,
        say=session.say,
    )
    if start.checkpoint:
        restore(job, start.checkpoint)
    return job


def _keeper(config: Config, model: nn.Module) -> Keeper:
    weights: Tensors = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return Keeper(weights, config.ema.decay, config.early_stopping.patience, config.validation.keep == "best")


def _examiner(
    session: Session, phase: int, selection: Selection, extractor: TrajectoryExtractor, trainee: Trainee
) -> Examiner:
    """Made before Accelerate wraps the model, of which it takes a copy if it has anything to look at.

    Raises:
        DataError: there is nothing to validate on.
    """
    labelled = session.sources.get("validation")
    validates = session.config.validation.every_epochs > 0
    if validates and labelled is None and not selection.num_holdout:
        raise DataError(
            f"data.{SETS[phase]}.path has {selection.total} images, of which calibration.holdout_fraction="
            f"{session.config.calibration.holdout_fraction:g} holds none out to validate on: raise the fraction."
        )
    model = copy.deepcopy(trainee.model).eval() if validates or session.trackers else trainee.model
    return Examiner(
        session=session,
        set_name=SETS[phase],
        selection=selection,
        extractor=extractor,
        model=model,
        objective=trainee.objective,
        defects=trainee.defects,
        whitened=trainee.whitened,
        labelled=labelled if isinstance(labelled, LabelledFolder) else None,
    )


def _profiled(session: Session, phase: int) -> AbstractContextManager[Callable[[], None]]:
    """The main process's steps are those that are profiled."""
    if not session.profile or not session.processes.is_main:
        return nullcontext(nothing)
    return profiling(session.rundir.path / "profile" / f"phase{phase}.json", session.say)


def _projection_timed(session: Session, extractor: TrajectoryExtractor, clock: Clock) -> AbstractContextManager[None]:
    """In a compiled graph the projection is one with the backbone, and counts as that."""
    if session.config.backbone.compile:
        return nullcontext()
    return clock.watching(extractor.projection, "projection", within="backbone")


def _place_draw(session: Session, phase: int, extractor: TrajectoryExtractor) -> PlaceDraw | None:
    """None if every place is trained on."""
    total, count = extractor.resolution**2, num_places(session.config, extractor)
    return PlaceDraw(total, count, session.config.seed, phase) if count < total else None


def _cache(session: Session, set_name: str, extractor: TrajectoryExtractor) -> TrajectoryCache:
    """The cache of a set's trajectories, on a disk that all processes share or one of each machine.

    Raises:
        ConfigError: its folder cannot be written.
    """
    config, processes = session.config, session.processes
    key = {
        # Another folder may hold other images by the same names.
        "path": _absolute(str(getattr(config.data, set_name).path)),
        "images": session.sources[set_name].fingerprint,
        "fit": getattr(config.data, set_name).fit,
        "image_size": config.data.image_size,
        "transform": TRANSFORM,
        "trajectory": trajectory_fingerprint(extractor),
        "precision": session.accelerator.mixed_precision,
    }
    length, width = extractor.projection.valid_LD.shape
    shape = (extractor.resolution**2, length, width)
    cache = TrajectoryCache(Path(str(config.cache.dir)).expanduser(), key, len(session.sources[set_name]), shape)
    processes.all_do(cache.create)
    return cache


def _absolute(path: str) -> str:
    """A folder or pattern, whatever the working directory; prefixes and addresses as they are."""
    return path if ":" in path else os.path.realpath(os.path.expanduser(path))


def _cache_writer(session: Session, cache: TrajectoryCache) -> CacheWriter:
    """What is left of cache.max_gib is shared out among the processes."""
    kept, world = len(cache), session.processes.world
    holds = int(session.config.cache.max_gib * GIB / cache.stride)
    session.say(
        f"cache: {cache.folder} has the trajectories of {kept:,} of {cache.num_images:,} images "
        f"and may keep {min(holds, cache.num_images):,} ({cache.stride / GIB * min(holds, cache.num_images):.1f} GiB)"
    )
    room = holds - kept
    return CacheWriter(cache, max(0, -(-room // world)))


def _checkpoint_of(session: Session, phase: int, base: str) -> Checkpoint | None:
    """The checkpoint to resume this phase from, and the records cut back to it.

    Raises:
        ArtifactError: the checkpoint belongs to another model.
    """
    checkpoint = session.newest_checkpoint()
    if checkpoint and checkpoint.state["phase"] != phase:
        checkpoint = None
    if checkpoint and checkpoint.state["base"] != base:
        raise ArtifactError(
            f"the checkpoints in {str(session.rundir.checkpoints)!r} belong to other weights than this run's: "
            "restore the phase1 folder, or start over with --fresh."
        )
    if session.processes.is_main:
        before = session.rundir.recall("records_after_phase1") if phase == 2 else None
        session.rundir.rewind_records(checkpoint.state["file_sizes"] if checkpoint else before or {})
    session.processes.wait()
    return checkpoint


def _cursor_of(checkpoint: Checkpoint, plan: Plan, set_name: str) -> int:
    """Where to go on.

    Raises:
        ArtifactError: the checkpoint was made with other steps.
        ConfigError: fewer epochs are wanted than are done.
    """
    cursor = int(checkpoint.state["cursor"])
    if checkpoint.state["global_batch"] != plan.global_batch or not plan.is_between_steps(cursor):
        raise ArtifactError(
            f"the checkpoint at {cursor:,} images was made with steps of {checkpoint.state['global_batch']} images, "
            f"this run takes {plan.global_batch}: restore the checkpoints folder, or start over with --fresh."
        )
    if cursor > plan.total_images:
        raise ConfigError(
            f"data.{set_name}.num_epochs={plan.num_epochs}, but the run is in epoch {-(-cursor // plan.num_images)}: "
            "keep at least that many, or start over with --fresh."
        )
    return cursor


def _announcement(phase: int, plan: Plan, cursor: int, model: nn.Module, world: int) -> str:
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    text = (
        f"phase {phase}: {plan.num_images:,} images x {plan.num_epochs} epochs, {trained:,} weights, "
        f"{plan.global_batch} images per step ({world} processes x {plan.slots} x {plan.micro_batches} micro-batches)"
    )
    return text + (f"; going on after {cursor:,} images" if cursor else "")


def _journal(session: Session, phase: int, plan: Plan, selection: Selection) -> Journal:
    source = session.sources[SETS[phase]]

    def files_of(step_index: int) -> list[str]:
        step = plan.step(step_index)
        return [source.name(index) for index in selection.train(step.epoch, np.arange(step.start, step.stop)).tolist()]

    return Journal(
        phase,
        session.rundir,
        session.processes,
        source.name,
        files_of,
        SETS[phase],
        plan.num_images,
        session.config.data.max_bad_fraction,
    )


def _recipe(config: Config, learning_rate: float) -> Recipe:
    return Recipe(
        learning_rate=learning_rate,
        warmup_fraction=config.train.warmup_fraction,
        max_grad_norm=config.train.max_grad_norm,
        seed=config.seed,
    )


def _rhythm(config: Config) -> Rhythm:
    return Rhythm(
        log_every_steps=config.logging.every_steps,
        save_every_steps=config.checkpoint.every_steps,
        save_every_s=config.checkpoint.every_minutes * 60.0,
        empty_cache_every=config.memory.empty_cache_every,
        validate_every_epochs=config.validation.every_epochs,
    )


def _steps_before(session: Session, phase: int) -> int:
    """Checkpoints of Phase 2 are numbered after those of Phase 1."""
    return int(session.rundir.read_summary().get("phase1", {}).get("steps", 0)) if phase == 2 else 0
