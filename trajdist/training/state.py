"""A job's state between two steps: handed to the checkpoint writer, and loaded from a checkpoint."""

from __future__ import annotations

import time

import torch

from trajdist.saved.checkpoint import Checkpoint, check_fits, optimizer_tensors, restore_optimizer
from trajdist.sharding import Step
from trajdist.training.job import Job


def save_checkpoint(job: Job, step: Step) -> None:
    """Hand the state to the checkpoint writer. The journal must have been flushed.

    Raises:
        ArtifactError: the previous checkpoint could not be written.
    """
    job.last_saved = time.monotonic()
    if not job.processes.is_main:
        return
    scaler = job.accelerator.scaler
    state = {
        "base": job.base,
        "phase": job.phase,
        "cursor": job.plan.cursor_after(step),
        "step": step.index + 1,
        "global_batch": job.plan.global_batch,
        "num_processes": job.processes.world,
        "seconds": job.seconds(),
        "stages": job.clock.seconds(),
        "journal": job.journal.state(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "file_sizes": job.rundir.sync_records(),
        "validated": job.keeper.state(),
    }
    checkpoint = Checkpoint(job.trainable_weights(), optimizer_tensors(job.optimizer), state, job.keeper.tensors())
    job.writer.save(job.number_of(step), checkpoint)
    job.rundir.write_status("running", job.phase, step.index + 1)


def restore(job: Job, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into the job.

    Raises:
        ArtifactError: it does not fit the model or the optimizer.
    """
    check_fits(checkpoint, job.trainable_weights(), job.optimizer)
    with torch.no_grad():
        for name, weight in job.trainable_weights().items():
            weight.copy_(checkpoint.model[name])
    restore_optimizer(job.optimizer, checkpoint.optimizer)
    if job.accelerator.scaler is not None and checkpoint.state["scaler"]:
        job.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    job.keeper.restore(checkpoint.state["validated"], checkpoint.kept, job.trainable_weights())
    job.journal.restore(checkpoint.state["journal"])
    job.seconds_before = checkpoint.state["seconds"]
