"""A run from start to finish, and Phase 1: measure statistics, build the model, train, save, calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trajdist.artifacts import seeded
from trajdist.config import SETS, Config
from trajdist.data.base import ImageSource
from trajdist.errors import ConfigError, StopRequested, TrainingError
from trajdist.files import exists
from trajdist.runtime.memory import naming_memory
from trajdist.saved import bundle
from trajdist.saved.rundir import RunDir
from trajdist.sharding import seed_of
from trajdist.tables import summary_table
from trajdist.training.adaptation import phase2
from trajdist.training.calibrating import calibrate
from trajdist.training.doctor import smaller
from trajdist.training.extractors import prepare_extractor
from trajdist.training.objectives import Task
from trajdist.training.passes import CleanImages
from trajdist.training.session import Session, open_session
from trajdist.training.summary import finish, is_done, summarise
from trajdist.training.train import Training, reconstruction, train


def run(
    config: Config,
    sources: dict[str, ImageSource],
    phases: Sequence[int],
    fresh: bool = False,
    profile: bool = False,
) -> dict[str, Any]:
    """Run the phases that are not done yet. Every process of the job must call it.

    Args:
        sources: image sources by name: ``imagenet``, ``domain``, ``domains.NAME``, ``validation``.
        phases: 1, 2 or both.
        fresh: start over; an existing run directory is renamed.
        profile: write a trace of a few steps.

    Returns:
        The contents of summary.json.

    Raises:
        UserError: its subclass determines the exit code.
        StopRequested: by a signal or the STOP file; the same call resumes from the checkpoint.
    """
    _check_request(config, phases, fresh)
    session = open_session(config, sources, fresh, profile)
    with session.stop.listening():
        try:
            with naming_memory(session.processes, lambda device: smaller(config, session.at.phase or 1, device)):
                _run_phases(session, phases)
        except StopRequested as stop:
            _record_end(session, stop)
            session.processes.leave()
            raise
        except BaseException as error:
            _record_end(session, error)
            raise
        else:
            _record_end(session, None)
        finally:
            session.rundir.unlock()
    session.processes.leave()
    return session.rundir.read_summary()


def _run_phases(session: Session, phases: Sequence[int]) -> None:
    scaler = session.accelerator.scaler
    initial = None if scaler is None else scaler.state_dict()
    with session.watchdog.watching(lambda why: session.write_status(TrainingError(why))):
        for phase in sorted(phases):
            PHASES[phase](session)
            # Accelerate keeps all that it prepared, so Phase 2 would hold Phase 1's weights and optimizer.
            session.accelerator.free_memory()
            # fp16's gradient scale starts anew, as in a run that is resumed between the phases.
            if scaler is not None:
                scaler.load_state_dict(initial)
        session.accept()


def _check_request(config: Config, phases: Sequence[int], fresh: bool) -> None:
    """Refuse what the user cannot have meant, before anything is opened.

    Raises:
        ConfigError: names the key and the intended command.
    """
    if 1 in phases and config.phase1 is not None and not RunDir(config.run_dir).is_at(config.phase1):
        raise ConfigError(
            f"phase1={config.phase1!r} is another run's Phase 1, but this command trains its own: leave it out, or "
            "use the command adapt."
        )
    if fresh and 1 not in phases and (config.phase1 is None or RunDir(config.run_dir).is_at(config.phase1)):
        raise ConfigError(
            f"--fresh would move run_dir={config.run_dir!r} away with the Phase 1 that this command adapts: name "
            f"another run_dir, with phase1={config.run_dir!r}."
        )
    if 2 in phases and config.domain_adaptation.lora.target_modules != "all-linear":
        # Only if needed: PEFT takes longer to import than torch, and Phase 1 does without.
        from trajdist.saved import lora

        lora.check_targets(config)


def _record_end(session: Session, error: BaseException | None) -> None:
    session.write_status(error, ended=True)
    session.trackers.finish()
    if not session.processes.is_main:
        return
    if error is None:
        session.console.print(summary_table(session.rundir.read_summary()))
        session.say(f"all files are in {session.rundir.path}")
    elif isinstance(error, (StopRequested, KeyboardInterrupt)):
        session.rundir.forget_stop()
        session.say(f"stopped ({error}): run the same command again to resume")


def phase1(session: Session) -> None:
    """Train the sequence model on the trajectories of the ImageNet set, and calibrate it.

    Raises:
        DataError: the images changed, or too many of them could not be read.
        TrainingError: a loss or a gradient was not finite.
        ArtifactError, ConfigError: see :func:`trajdist.training.train.train`.
        StopRequested: a stop was requested; a new start resumes from the checkpoint, if there is one yet.
    """
    session.at.phase = 1
    if is_done(session, 1) or _was_adopted(session):
        return
    selection = session.selection(1)
    extractor = prepare_extractor(session, selection)
    document = bundle.model_document(session.config, extractor)
    with seeded(seed_of(session.config.seed, 1)):
        model = bundle.new_model(document, document.length, document.width)
    settings = session.config.train
    objective = reconstruction(session.config, extractor)
    task = Task(model, objective, settings.learning_rate, settings.weight_decay, base=document.trajectory_fingerprint)
    (job,) = train(extractor, [Training(session, selection, task)])
    summary = summarise(job)
    trained = job.trained_model()

    def save() -> None:
        bundle.save_model(session.rundir.model, trained, document)
        session.rundir.drop_calibration(1)

    session.processes.main_does(save)
    base = bundle.base_fingerprint(trained, document)
    calibrate(CleanImages(session, selection, extractor), trained, session.rundir.calibration(1), base)
    finish(session, 1, summary)


def _was_adopted(session: Session) -> bool:
    """Whether Phase 1 was adopted (``phase1=DIR``); a run that trains its own records its images first."""
    rundir = session.rundir
    adopted = session.processes.main_knows(lambda: exists(rundir.model) and rundir.recall(SETS[1]) is None)
    if adopted:
        session.say("phase 1 was adopted from another run: nothing to train")
    return adopted


PHASES = {1: phase1, 2: phase2}
