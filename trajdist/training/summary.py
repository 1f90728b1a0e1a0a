"""The figures of a phase in summary.json: whether it is done, and its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from trajdist.artifacts import fingerprint, read_tensors
from trajdist.config import SETS
from trajdist.data.loader import processors, resolve_threads, resolve_workers
from trajdist.errors import ArtifactError, os_errors
from trajdist.files import is_file, read_object
from trajdist.runtime.memory import peak_memory_bytes
from trajdist.saved.rundir import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AFTER_PHASE1, BASE_PREFIX, RunDir
from trajdist.training.calibrating import is_calibration_of
from trajdist.training.doctor import Facts, diagnose, split
from trajdist.training.job import Job
from trajdist.training.session import Session


def is_done(session: Session, phase: int) -> bool:
    """Whether a phase is done. It is not if more epochs are wanted now, unless a later phase builds on it.

    Raises:
        DataError: it was done with other images.
        ArtifactError: its files are gone or damaged, and a later phase builds on them.
    """
    rundir = session.rundir
    done, adapted = session.processes.main_knows(
        lambda: (rundir.read_summary().get(f"phase{phase}"), rundir.has_adapted())
    )
    if not done or ("domains" in done and not session.config.data.domains):
        return False
    is_base = phase == 1 and adapted
    if lost := session.processes.main_knows(lambda: _lost(rundir, phase)):
        if is_base or session.checkpoint_phase() > phase:
            raise ArtifactError(
                f"{str(lost)!r} is gone or damaged, and Phase 2 is built on it: restore it, or start over with --fresh."
            )
        session.say(f"{str(lost)!r} is gone or damaged, and made again")
        return False
    session.check_images(SETS[phase])
    if done.get("validation", {}).get("stopped_early"):
        return _done_already(session, done, f"phase {phase} stopped early, after {done['epochs']} epochs")
    epochs, wanted = done["epochs"], session.config.data.of_phase(phase).num_epochs
    is_so = f"phase {phase} is done ({epochs} epochs)"
    if wanted <= epochs:
        return _done_already(session, done, is_so)
    saved = 0 if is_base else session.checkpoint_phase()
    if saved == phase:
        session.say(f"phase {phase} has {epochs} epochs and continues to {wanted}")
        return False
    built_on = phase == 1 and (adapted or saved)
    reason = "Phase 2 is built on these" if built_on else "there is no checkpoint to resume from"
    return _done_already(session, done, is_so, f"; for {wanted} epochs start over with --fresh: {reason}")


def _lost(rundir: RunDir, phase: int) -> Path | None:
    """A file that a phase made and that is missing or damaged, if any.

    Raises:
        ArtifactError: a file cannot be read, which does not mean that it is damaged.
    """
    for path in rundir.made(phase):
        if not is_file(path):
            return path
        with os_errors(f"{str(path)!r} cannot be read", fix="make it readable"), open(path, "rb"):
            pass
        try:
            read_tensors(path) if path.suffix == ".safetensors" else read_object(path)
        except ArtifactError:
            return path
    return None if phase == 1 or _is_calibrated(rundir) else rundir.adapter / ADAPTER_WEIGHTS


def _is_calibrated(rundir: RunDir) -> bool:
    """Whether the calibration of Phase 2 is that of its adapter: PEFT's file has no fingerprint of its own.

    As :func:`trajdist.saved.lora.adapter_fingerprint` has it, but without importing PEFT, which takes seconds.
    """
    named = str(read_object(rundir.adapter / ADAPTER_CONFIG).get("base_model_name_or_path"))
    tensors = read_tensors(rundir.adapter / ADAPTER_WEIGHTS)
    return is_calibration_of(rundir.calibration(2), fingerprint(tensors, {"base": named.removeprefix(BASE_PREFIX)}))


def _done_already(session: Session, done: dict[str, Any], why: str, but: str = "") -> Literal[True]:
    session.at.step = done["steps"]
    session.say(f"{why}: nothing to repeat{but}")
    return True


def summarise(job: Job) -> dict[str, Any]:
    """The figures of a phase that has just been trained, and what limits its speed. All processes must call it."""
    session, journal, time, taken = job.session, job.journal, job.stages, job.taken
    advice = diagnose(_facts(job, time, taken))
    session.say(f"phase {job.phase} is {advice}")
    memory = journal.epoch_memory
    return {
        "images": journal.total.images,
        "failures": journal.total.failures,
        "epochs": session.at.step // job.plan.steps_per_epoch,
        "steps": session.at.step,
        "seconds": taken,
        "images_per_s": journal.total.images / max(taken, 1e-9),
        "first_loss": journal.first_loss,
        "final_loss": journal.final_loss,
        "peak_memory_bytes": peak_memory_bytes(session.processes.device),
        "memory_growth_bytes": int(memory[-1] - memory[0]) if memory else 0,
        "num_processes": session.processes.world,
        "trained_parameters": sum(weight.numel() for weight in job.trainable_weights().values()),
        "time": split(time, taken),
        "doctor": advice,
        **({"validation": validation} if (validation := job.keeper.summary()) else {}),
    }


def _facts(job: Job, time: dict[str, float], taken: float) -> Facts:
    session, config, processes = job.session, job.session.config, job.session.processes
    # Contrast draws new defects every epoch and trains on whole images: neither a cache nor fewer places would help.
    contrast = config.contrasts(job.phase)
    workers = resolve_workers(config.data.num_workers, processes.local_world, processes.device.type)
    return Facts(
        seconds=taken,
        steps=session.at.step,
        time=time,
        waits=processes.gather([time["data"]]),
        workers=workers,
        threads=resolve_threads(config.data.num_workers, workers),
        processors=processors() // processes.local_world,
        overlapping=processes.device.type == "cuda",
        compiled=config.backbone.compile,
        cacheable=config.cache.dir is None and job.plan.num_epochs > 1 and not contrast,
        half_precision=session.accelerator.mixed_precision != "no",
        all_places=config.train.cell_fraction == 1 and not contrast,
        idle_share=job.clock.idle_share,
    )


def finish(session: Session, phase: int, summary: dict[str, Any]) -> None:
    """Write the phase's summary, which marks it as done. All processes must call it."""

    def record() -> None:
        sizes = session.rundir.sync_records()
        if phase == 1:
            session.rundir.remember(AFTER_PHASE1, sizes, replace=True)
        session.rundir.write_summary(f"phase{phase}", summary)

    session.processes.main_does(record)


def combine(domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Combine the summaries of domains that were adapted to at once; the originals are kept under ``domains``."""
    parts = list(domains.values())
    totals = {key: sum(part[key] for part in parts) for key in ("images", "failures", "trained_parameters")}
    largest = ("epochs", "steps", "seconds", "peak_memory_bytes", "memory_growth_bytes", "num_processes")
    return {
        **totals,
        **{key: max(part[key] for part in parts) for key in largest},
        "images_per_s": totals["images"] / max(1e-9, *(part["seconds"] for part in parts)),
        **{
            key: sum(part[key] * part["images"] for part in parts) / max(1, totals["images"])
            for key in ("first_loss", "final_loss")
        },
        "time": max(parts, key=lambda part: float(part["seconds"]))["time"],
        "domains": domains,
    }
