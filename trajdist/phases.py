"""Phase 1: statistics, model, loop, save. Phase 2: load, attach LoRA, loop, prove, save."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trajdist import bundle
from trajdist.artifacts import fingerprint
from trajdist.card import adapter_card
from trajdist.config import SETS, Config
from trajdist.data.base import ImageSource
from trajdist.data.drawing import DefectDraw
from trajdist.data.loader import processors, resolve_workers
from trajdist.doctor import Facts, diagnose, split
from trajdist.errors import ArtifactError, ConfigError, StopRequested, UserError
from trajdist.files import write_bytes
from trajdist.loop import Job, Position, seconds, trainable, trained_model
from trajdist.objectives import ContrastModel, DefectContrast, Objective, ReconstructionError
from trajdist.progress import summary_table
from trajdist.residuals import ResidualModel
from trajdist.runtime import peak_memory_bytes
from trajdist.session import Session, open_session
from trajdist.sharding import Selection, key64
from trajdist.statistics import calibrate, contrast_residuals, load_extractor, prepare_extractor
from trajdist.training import Trainee, train
from trajdist.trajectory import TrajectoryExtractor


def run(
    config: Config,
    sources: dict[str, ImageSource],
    phases: Sequence[int],
    fresh: bool = False,
    profile: bool = False,
) -> dict[str, Any]:
    """Run the phases that are not done yet; returns the summary. Every process of the job calls it.

    Raises:
        UserError: its kind tells the exit code.
        StopRequested: a signal or the STOP file; the same call goes on from the checkpoint.
    """
    session = open_session(config, sources, fresh, profile)
    at = Position()
    with session.stop.listening():
        try:
            _run_phases(session, at, phases)
            _record_end(session, at, None)
        except StopRequested as stop:
            _record_end(session, at, stop)
            session.processes.leave()
            raise
        except BaseException as error:
            _record_end(session, at, error)
            raise
        finally:
            session.rundir.unlock()
    session.processes.leave()
    return session.rundir.read_summary()


def _run_phases(session: Session, at: Position, phases: Sequence[int]) -> None:
    with session.watchdog.watching(lambda why: _record_failure(session, at, why)):
        for phase in sorted(phases):
            PHASES[phase](session, at)


def _record_end(session: Session, at: Position, error: BaseException | None) -> None:
    session.trackers.finish()
    if not session.processes.is_main:
        return
    if error is None:
        session.rundir.write_status("done", at.phase, at.step)
        session.console.print(summary_table(session.rundir.read_summary()))
        session.say(f"all files are in {session.rundir.path}")
    elif isinstance(error, (StopRequested, KeyboardInterrupt)):
        session.rundir.stop_file.unlink(missing_ok=True)
        session.rundir.write_status("stopped", at.phase, at.step, str(error))
        session.say(f"stopped ({error}): run the same command again to go on")
    else:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _record_failure(session, at, why)


def _record_failure(session: Session, at: Position, why: str) -> None:
    """On a full disk the status cannot be written either; the first error is the one to show."""
    if session.processes.is_main:
        with contextlib.suppress(ArtifactError):
            session.rundir.write_status("failed", at.phase, at.step, why)


def phase1(session: Session, at: Position) -> None:
    """Learn the trajectories of the ImageNet set."""
    at.phase = 1
    if _is_done(session, 1):
        return
    selection = session.selection("imagenet", 1)
    extractor = prepare_extractor(session, selection)
    document = bundle.model_document(session.config, extractor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key64(session.config.seed, 1) >> 1)
        model = bundle.new_model(document)
    settings = session.config.train
    objective = _reconstruction(session.config, extractor)
    base = document.trajectory_fingerprint
    trainee = Trainee(model, objective, settings.learning_rate, settings.weight_decay, base)
    job = train(session, at, selection, extractor, trainee)
    summary = _summarise(session, job)
    trained = trained_model(job)
    session.processes.main_does(lambda: bundle.save_model(session.rundir.model, trained, document))
    base = bundle.base_fingerprint(trained, document)
    calibrate(session, "imagenet", selection, extractor, trained, session.rundir.calibration(1), base)
    _finish(session, 1, summary)


def phase2(session: Session, at: Position) -> None:
    """Adapt a trained Phase 1 to the domain set with LoRA."""
    # PEFT takes longer to import than torch; Phase 1 does without.
    from trajdist import lora

    at.phase = 2
    if _is_done(session, 2):
        return
    session.processes.main_does(lambda: adopt_phase1(session))
    selection = session.selection("domain", 2)
    extractor = load_extractor(session)
    base, document = bundle.load_model(session.rundir.model)
    bundle.check_trajectories(session.rundir, document, extractor)
    base_id = bundle.base_fingerprint(base, document)
    settings = session.config.domain_adaptation.lora
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key64(session.config.seed, 2) >> 1)
        adapted = lora.attach(
            base, **settings.model_dump(exclude={"learning_rate", "weight_decay"}), base_fingerprint=base_id
        )
    before = fingerprint(lora.base_state(adapted))
    objective: Objective = _reconstruction(session.config, extractor)
    trainee = Trainee(adapted, objective, settings.learning_rate, settings.weight_decay, base_id)
    whitened = None
    if session.config.domain_adaptation.objective == "contrast":
        whitened = contrast_residuals(session, selection, extractor, adapted, base_id)
        trainee = _contrasting(trainee, session, extractor, whitened)
    job = train(session, at, selection, extractor, trainee)
    summary = _summarise(session, job)
    trained = trained_model(job)
    trained = trained.model if whitened is not None else trained
    session.processes.main_does(lambda: lora.save_proven(session.rundir, trained, before, base_id))
    adapter_id = lora.adapter_fingerprint(trained, base_id)
    calibrate(session, "domain", selection, extractor, trained, session.rundir.calibration(2), adapter_id, whitened)
    session.processes.main_does(lambda: _write_card(session, selection, base_id, summary))
    _finish(session, 2, summary)


def _write_card(session: Session, selection: Selection, base_id: str, summary: dict[str, Any]) -> None:
    data = {
        "trained_on": selection.num_train,
        "held_out": selection.num_holdout,
        "fingerprint": session.sources["domain"].fingerprint,
        "num_processes": session.reference_world,
    }
    card = adapter_card(session.config, base_id, data, summary)
    write_bytes(session.rundir.adapter / "README.md", card.encode())


def _reconstruction(config: Config, extractor: TrajectoryExtractor) -> ReconstructionError:
    return ReconstructionError(extractor.projection.valid_LD, config.train.kl_weight, config.train.kl_warmup_fraction)


def _contrasting(
    trainee: Trainee, session: Session, extractor: TrajectoryExtractor, whitened: ResidualModel
) -> Trainee:
    """The same adapter, trained to tell drawn defects from clean places."""
    valid_LD = extractor.projection.valid_LD
    model = ContrastModel(trainee.model, whitened, valid_LD.flatten().nonzero().squeeze(1))
    defects = DefectDraw(extractor.resolution, session.config.seed, phase=2)
    return replace(trainee, model=model, objective=DefectContrast(valid_LD), defects=defects, whitened=whitened)


def adopt_phase1(session: Session) -> None:
    """With ``phase1=DIR``, copy that run's Phase 1 into this run directory, so that it stands alone.

    Raises:
        ArtifactError: there is no finished Phase 1.
        ConfigError: this config describes another model than that Phase 1 is.
    """
    rundir, chosen = session.rundir, session.config.phase1
    if chosen is not None and not rundir.model.exists():
        folder = Path(chosen).expanduser()
        folder = folder / "phase1" if (folder / "phase1").is_dir() else folder
        for target in (rundir.trajectory, rundir.calibration(1), rundir.model):
            if not (folder / target.name).is_file():
                raise ArtifactError(f"phase1={chosen!r} has no {target.name}: name a run whose Phase 1 is done.")
            shutil.copyfile(folder / target.name, target.with_suffix(".tmp"))
            target.with_suffix(".tmp").rename(target)
    if not rundir.model.exists():
        raise ArtifactError(
            f"there is no Phase 1 in {str(rundir.path)!r}: train it first, or name an older run with phase1=DIR."
        )
    _check_same_model(session.config, rundir.trajectory, rundir.model)


def _check_same_model(config: Config, trajectory: Path, model: Path) -> None:
    """The config of Phase 2 must describe the Phase 1 it adapts."""
    made = bundle.read(trajectory, bundle.TrajectoryDocument)
    learned = bundle.read(model, bundle.ModelDocument)
    pairs = {
        "backbone.name": (config.backbone.name, made.backbone),
        "data.image_size": (config.data.image_size, made.image_size),
        "data.domain.fit": (config.data.domain.fit, made.fit),
        "model.spatial_resolution": (config.model.spatial_resolution, made.spatial_resolution),
        "model.feature_dim": (config.model.feature_dim, made.feature_dim),
        "model.type": (config.model.type, learned.type),
        "model.hidden_dim": (config.model.hidden_dim, learned.hidden_dim),
        "model.latent_dim": (config.model.latent_dim, learned.latent_dim),
        "model.num_layers": (config.model.num_layers, learned.num_layers),
    }
    for key, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise ConfigError(f"{key}={mine!r}, but the Phase 1 in {str(model.parent)!r} has {theirs!r}: use that.")


def _is_done(session: Session, phase: int) -> bool:
    """Whether a phase is done; one that is to have more epochs now goes on, if nothing was built on it yet."""
    done = session.rundir.read_summary().get(f"phase{phase}")
    if not done:
        return False
    if done.get("validation", {}).get("stopped_early"):
        session.say(f"phase {phase} stopped early, after {done['epochs']} epochs: nothing to repeat")
        return True
    epochs, wanted = done["epochs"], getattr(session.config.data, SETS[phase]).num_epochs
    checkpoint = session.newest_checkpoint() if wanted > epochs else None
    if checkpoint and checkpoint.state["phase"] == phase:
        session.say(f"phase {phase} has {epochs} epochs and goes on to {wanted}")
        return False
    why = "" if wanted <= epochs else f"; for {wanted} epochs start over with --fresh, Phase 2 is built on these"
    session.say(f"phase {phase} is done ({epochs} epochs): nothing to repeat{why}")
    return True


def _summarise(session: Session, job: Job) -> dict[str, Any]:
    """The figures of a phase that has just been trained, and what bounds it."""
    journal, taken = job.journal, seconds(job)
    time = job.clock.seconds()
    advice = diagnose(_facts(session, job, time, taken))
    session.say(f"phase {job.phase} is {advice}")
    memory = journal.epoch_memory
    return {
        "images": journal.total.images,
        "failures": journal.total.failures,
        "epochs": job.at.step // job.plan.steps_per_epoch,
        "steps": job.at.step,
        "seconds": taken,
        "images_per_s": journal.total.images / max(taken, 1e-9),
        "first_loss": journal.first_loss,
        "final_loss": journal.final_loss,
        "peak_memory_bytes": peak_memory_bytes(job.processes.device),
        "memory_growth_bytes": int(memory[-1] - memory[0]) if memory else 0,
        "num_processes": job.processes.world,
        "trained_parameters": sum(weight.numel() for weight in trainable(job).values()),
        "time": split(time, taken),
        "doctor": advice,
        **({"validation": validation} if (validation := job.keeper.summary()) else {}),
    }


def _facts(session: Session, job: Job, time: dict[str, float], taken: float) -> Facts:
    config, processes = session.config, session.processes
    # It draws new defects in every epoch, over the whole of each image.
    contrast = job.phase == 2 and config.domain_adaptation.objective == "contrast"
    return Facts(
        seconds=taken,
        steps=job.at.step,
        time=time,
        waits=processes.gather([time["data"]]),
        workers=resolve_workers(config.data.num_workers, processes.local_world, processes.device.type),
        processors=processors() // processes.local_world,
        overlapping=processes.device.type == "cuda",
        compiled=config.backbone.compile,
        cacheable=config.cache.dir is None and job.plan.num_epochs > 1 and not contrast,
        half_precision=session.accelerator.mixed_precision != "no",
        all_places=config.train.cell_fraction == 1 and not contrast,
    )


def _finish(session: Session, phase: int, summary: dict[str, Any]) -> None:
    """Write the phase's summary: from now on it is done."""

    def record() -> None:
        session.rundir.remember(f"records_after_phase{phase}", session.rundir.sync_records(), replace=True)
        session.rundir.write_summary(f"phase{phase}", summary)

    session.processes.main_does(record)


PHASES = {1: phase1, 2: phase2}
