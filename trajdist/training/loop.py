"""The training loop, shared by both phases and by several domains at once.

The gradient of a step is that of one process over the whole global batch: every process sums its losses, and the summed
gradient is divided by the number of images actually used across all processes. Nothing in a step waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from trajdist.data.drawing import DRAWN
from trajdist.data.loader import ImageBatch
from trajdist.errors import ArtifactError, ConfigError, StopRequested
from trajdist.runtime.memory import empty_cache, memory_bytes, peak_memory_bytes
from trajdist.saved.checkpoint import Checkpoint, State, optimizer_tensors
from trajdist.sharding import Step, seed_of
from trajdist.training.job import Job
from trajdist.training.journal import means
from trajdist.training.optimization import warmup_cosine

# On CUDA, reading a flag waits for the device, so processes agree only every few steps. But launchers kill a job
# soon after asking it to stop, so processes with slow steps agree more often.
AGREE_EVERY_ON_CUDA = 10
AGREE_WITHIN_S = 2.0
# The figures of a validation that are shown to the user.
VALIDATED = ("loss", "image_auroc", "pixel_auroc")


def fit(walks: Sequence[Iterator[None]]) -> None:
    """Run jobs to completion, one micro-batch of each in turn: one for a phase, or one for each of several domains.

    Args:
        walks: see :func:`walk`.

    Raises:
        StopRequested: a stop was requested; a checkpoint of each job is saved.
        TrainingError, DataError: see :meth:`Journal.flush` and :meth:`Examiner.validate`.
        ArtifactError: a checkpoint could not be written; on the main process.
        SystemExit: the same, on the other processes.
    """
    under_way, stopped = list(walks), None
    while under_way:
        for walk in tuple(under_way):
            try:
                next(walk)
            except StopIteration:
                under_way.remove(walk)
            except StopRequested as stop:
                # The other jobs see the same request: let each save its own checkpoint.
                under_way.remove(walk)
                stopped = stop
    if stopped:
        raise stopped


def walk(job: Job) -> Iterator[None]:
    """Train from the job's cursor to the end of the last epoch or an early stop; yields before each micro-batch."""
    with closing(job.batches), job.progress:
        resume(job)
        job.model.train()
        for step in job.plan.steps(job.cursor):
            if job.keeper.exhausted:
                break
            begin_step(job, step)
            num_used = torch.zeros((), device=job.session.processes.device)
            for micro_batch in range(job.plan.micro_batches):
                yield
                batch, trajectories = next(job.batches)
                job.session.watchdog.beat()
                add_gradients(job, step, micro_batch, batch, trajectories)
                num_used += batch.weights.sum()
                # Otherwise these names would keep the batch alive while the next one is made.
                del batch, trajectories
            with job.clock("sync"):
                job.session.processes.sum(num_used)
            with job.clock("optimizer"):
                update(job, step, num_used)
            finish_step(job, step)
            job.tick()
    conclude(job)


def conclude(job: Job) -> None:
    """Wait for the last checkpoint, and stop the job's time: other domains may go on.

    Raises:
        ArtifactError: a checkpoint could not be written; on the main process.
        SystemExit: the same, on the other processes.
    """
    with job.clock("checkpoint"):
        job.session.processes.main_does(job.writer.finish)
    job.taken, job.stages = job.seconds(), job.clock.seconds()


def resume(job: Job) -> None:
    """Resume at the cursor. If the checkpoint is from between an epoch and its validation, validate first."""
    session = job.session
    job.started = job.last_saved = time.monotonic()
    session.at.step = job.plan.step_index_at(job.cursor)
    session.write_status()
    epochs, position = divmod(job.cursor, job.plan.num_images)
    if epochs > job.keeper.epoch and position == 0:
        validate_epoch(job, job.plan.step(session.at.step - 1))
        job.progress.go_on()


def begin_step(job: Job, step: Step) -> None:
    """Set the learning rate: a pure function of the step, so there is no scheduler state to save."""
    factor = warmup_cosine(progress_at(job, step), job.session.config.train.warmup_fraction)
    for group in job.optimizer.param_groups:
        group["lr"] = job.task.learning_rate * factor * group.get("rate", 1.0)
    job.journal.begin(step)
    job.session.watchdog.beat()


def progress_at(job: Job, step: Step) -> float:
    """Fraction of the training completed at the midpoint of ``step``."""
    return (job.plan.cursor_after(step) - 0.5 * step.num_images) / job.plan.total_images


def add_gradients(job: Job, step: Step, micro_batch: int, batch: ImageBatch, trajectories: torch.Tensor) -> None:
    """Forward and backward pass of one micro-batch; in the last one of a step, gradients are all-reduced.

    The seed is a pure function of step, rank and micro-batch, so there is no random state to save.

    Args:
        trajectories: as :class:`trajdist.training.feed.Feed` gives them.
    """
    session, accelerator = job.session, job.session.accelerator
    torch.manual_seed(seed_of(session.config.seed, job.phase, step.index, session.processes.rank) + micro_batch)
    # Accelerate counts the micro-batches of one model, but here those of several models may alternate.
    accelerator.gradient_accumulation_steps, accelerator.step = job.plan.micro_batches, micro_batch
    # Undoes two means: Accelerate's over micro-batches and DistributedDataParallel's over processes.
    share = job.plan.micro_batches * session.processes.world
    with accelerator.accumulate(job.model), job.clock("model"):
        losses = job.task.objective(job.model, trajectories, batch, progress_at(job, step))
        session.watchdog.beat()
        accelerator.backward(losses.loss @ batch.weights / step.num_images * share)
    job.journal.add(step, batch, losses)


def update(job: Job, step: Step, num_used: torch.Tensor) -> None:
    """Take one optimizer step.

    Args:
        num_used: scalar, images used on all processes. Unreadable images make it smaller than the size of the step,
            by which the losses were divided: the gradients are rescaled to the mean over the images used.
    """
    correction = step.num_images / num_used.clamp(min=1)
    if step.index == 0:
        check_all_trained(job)
    for parameter in job.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(correction)
    norm = job.session.accelerator.clip_grad_norm_(job.model.parameters(), job.session.config.train.max_grad_norm)
    job.journal.check_gradient(step, norm)
    job.optimizer.step()
    job.optimizer.zero_grad()
    if job.keeper.averages:
        job.keeper.follow(job.trainable_weights(), step.index)


def check_all_trained(job: Job) -> None:
    """Refuse weights without a gradient: they would have no moments to resume with, and DistributedDataParallel fails.

    Raises:
        ConfigError: names the first one.
    """
    idle = next((name for name, weight in job.trainable_weights().items() if weight.grad is None), None)
    if idle is not None:
        raise ConfigError(
            f"the weight {idle!r} takes no part in the loss of phase {job.phase}, so it cannot be trained: use its "
            "layer in the model, remove it, or (in phase 2) leave it out of domain_adaptation.lora.target_modules."
        )


def finish_step(job: Job, step: Step) -> None:
    """Log, validate and save as due between two steps. All processes make the same decisions.

    Raises:
        StopRequested: a stop was requested; a checkpoint is saved.
    """
    session, config, done = job.session, job.session.config, step.index + 1
    session.watchdog.beat()
    session.at.step = done
    job.journal.read_memory(memory_bytes(session.processes.device))
    stop, overdue = agree(job, step)
    save = stop or overdue or done % config.checkpoint.every_steps == 0 or done == job.plan.total_steps
    log = done == 1 or done % config.logging.every_steps == 0 or step.ends_epoch
    if config.memory.empty_cache_every and done % config.memory.empty_cache_every == 0:
        empty_cache(session.processes.device)
        job.clock.waited()
    if log or save:
        job.journal.flush(step)
        job.clock.waited()
        job.clock.settle()
    if log:
        write_line(job, step)
    if step.ends_epoch:
        write_epoch(job, step)
        stop = stop or not close_epoch(job, step)
    if save or stop or job.keeper.exhausted:
        with job.clock("checkpoint"):
            save_checkpoint(job, step)
    if step.ends_epoch:
        job.progress.go_on()
    if stop:
        session.processes.main_does(job.writer.finish)
        raise session.stop.error()


def save_checkpoint(job: Job, step: Step) -> None:
    """Hand the state to the checkpoint writer. The journal must have been flushed.

    Raises:
        ArtifactError: the previous checkpoint could not be written.
    """
    job.last_saved = time.monotonic()
    session, scaler = job.session, job.session.accelerator.scaler
    if not session.processes.is_main:
        return
    state = State(
        base=job.task.base,
        phase=job.phase,
        cursor=job.plan.cursor_after(step),
        step=step.index + 1,
        global_batch=job.plan.global_batch,
        num_processes=session.processes.world,
        seconds=job.seconds(),
        stages=job.clock.seconds(),
        journal=job.journal.state(),
        scaler=scaler.state_dict() if scaler is not None else None,
        file_sizes=session.rundir.sync_records(),
        validated=job.keeper.state(),
        drawn=DRAWN,
    )
    checkpoint = Checkpoint(job.trainable_weights(), optimizer_tensors(job.optimizer), state, job.keeper.tensors())
    job.writer.save(job.number_of(step), checkpoint)
    session.write_status()


def close_epoch(job: Job, step: Step) -> bool:
    """Log heat maps and validate. False if a stop was requested meanwhile: the next start validates instead."""
    if job.session.trackers:
        pictures = job.examiner.draw(job.judged_weights())
        if pictures:  # Unless none of the images could be read.
            job.session.trackers.show(f"phase{job.phase}/heat maps", pictures, job.number_of(step))
    try:
        validate_epoch(job, step)
    except StopRequested:
        return False
    return True


def validate_epoch(job: Job, step: Step) -> None:
    """Validate the weights as they are after ``step``, the last one of its epoch, if a validation is due."""
    epoch, every = step.epoch + 1, job.session.config.validation.every_epochs
    if not every or (epoch % every and epoch < job.plan.num_epochs):
        return
    weights = job.judged_weights()
    with job.clock("validation"):
        measured = job.examiner.validate(weights)
    found = {**head_of_line(job, step, "validation"), **measured}
    job.keeper.judge(found, weights)
    record(job, step, found)
    figures = ", ".join(f"{name} {found[name]:.4f}" for name in VALIDATED if found.get(name) is not None)
    best = " (best)" if job.keeper.stale == 0 else ""
    job.session.say(f"phase {job.phase}: validation after epoch {epoch}: {figures}{best}")
    if job.keeper.exhausted:
        job.session.say(f"phase {job.phase}: no better validation since epoch {job.keeper.best_epoch}: it ends here")


def agree(job: Job, step: Step) -> tuple[bool, bool]:
    """Whether any process was asked to stop, and whether a checkpoint is overdue by the main process's clock.

    Raises:
        ArtifactError: a checkpoint could not be written; on the main process.
        SystemExit: the same, on the other processes.
    """
    session, processes, done = job.session, job.session.processes, step.index + 1
    if done < job.agree_at:
        return False, False
    stop = bool(session.stop)
    failed = job.writer.failed()
    save_every_s = 60.0 * session.config.checkpoint.every_minutes
    overdue = processes.is_main and time.monotonic() - job.last_saved > save_every_s
    gap = steps_to_next_agreement(job, done) if processes.is_main else 0
    votes = torch.tensor([stop, overdue, failed, gap], dtype=torch.int32, device=processes.device)
    asked, due, broken, gap = processes.sum(votes).tolist()
    job.clock.waited()
    job.agreed, job.agree_at = (done, time.monotonic()), done + gap
    if broken:
        job.writer.finish()
        # The line above raises the error on the main process; the others exit with the same code.
        raise SystemExit(ArtifactError.exit_code)
    return asked > 0, due > 0


def steps_to_next_agreement(job: Job, done: int) -> int:
    if job.session.processes.device.type != "cuda":
        return 1
    before, at = job.agreed
    step_s = (time.monotonic() - at) / max(1, done - before)
    # The first interval after a start is not representative.
    return min(AGREE_EVERY_ON_CUDA, max(1, int(AGREE_WITHIN_S / max(step_s, 1e-6)))) if before else 1


def write_line(job: Job, step: Step) -> None:
    """Write a step's line of metrics.jsonl and show it on the screen."""
    device = job.session.processes.device
    line = {
        **head_of_line(job, step, "step"),
        "images": job.plan.cursor_after(step),
        **means(job.journal.take_line()),
        "lr": job.optimizer.param_groups[0]["lr"],
        "images_per_s": job.progress.rate(job.plan.cursor_after(step)),
        "memory_bytes": memory_bytes(device),
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    record(job, step, line)
    if job.session.processes.is_main:
        job.progress.show(line)


def write_epoch(job: Job, step: Step) -> None:
    """Write the epoch's line of metrics.jsonl."""
    sums = job.journal.end_epoch()
    line = {
        **head_of_line(job, step, "epoch"),
        "images": sums.images,
        **means(sums),
        "lr": job.optimizer.param_groups[0]["lr"],
        "images_per_s": job.progress.lap_rate(),
        "memory_bytes": int(job.journal.epoch_memory[-1]),
        "peak_memory_bytes": peak_memory_bytes(job.session.processes.device),
        "failures": sums.failures,
    }
    record(job, step, line)


def head_of_line(job: Job, step: Step, event: str) -> dict[str, Any]:
    """What every line of metrics.jsonl begins with."""
    return {"event": event, "phase": job.phase, "epoch": step.epoch + 1, "step": step.index + 1}


def record(job: Job, step: Step, line: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl and send it to the trackers."""
    session = job.session
    if session.processes.is_main:
        session.rundir.append(session.rundir.metrics, line)
        session.trackers.log(line, job.number_of(step))
