"""Phase 2: load Phase 1, attach LoRA, train, verify, save, calibrate; for one domain, or for several at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from trajdist.artifacts import fingerprint
from trajdist.data.drawing import DefectDraw
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.files import write_bytes
from trajdist.runtime.memory import naming_memory
from trajdist.saved import bundle
from trajdist.saved.card import adapter_card
from trajdist.saved.rundir import RunDir
from trajdist.scoring.residuals import ResidualModel
from trajdist.sharding import Selection, seed_of
from trajdist.training.adoption import adopt_phase1
from trajdist.training.doctor import smaller
from trajdist.training.job import Job, Position
from trajdist.training.objectives import ContrastModel, DefectContrast
from trajdist.training.passes import CleanImages, calibrate, contrast_residuals, shared_extractor
from trajdist.training.session import Session, with_keys_of
from trajdist.training.summary import combine, finish, is_done, summarise
from trajdist.training.train import Task, Training, reconstruction, train


@dataclass(frozen=True)
class Adaptation:
    """An adapter that is ready to be trained.

    Attributes:
        training: the run, its images and the adapted model.
        extractor: shared by all domains.
        base_before: fingerprint of the base weights before training; they must not change.
        base_id: fingerprint of the Phase 1 model that the adapter belongs to.
    """

    training: Training
    extractor: TrajectoryExtractor
    base_before: str
    base_id: str


def phase2(session: Session, at: Position) -> None:
    """Adapt a trained Phase 1 to the domain set with LoRA, or to each of ``data.domains``.

    Raises:
        ArtifactError, ConfigError: see :func:`adopt_phase1` and :func:`trajdist.training.train.train`.
        DataError: the images changed, or too many of them could not be read.
        TrainingError: a loss or a gradient was not finite, or the trained adapter failed its verification.
        StopRequested: a stop was requested; a new start resumes from the checkpoint, if there is one yet.
    """
    at.phase, at.step = 2, 0
    if session.config.data.domains:
        _adapt_to_all(session, at)
    elif not is_done(session, 2):
        adaptation = _prepare(session, at)
        (job,) = train(adaptation.extractor, [adaptation.training])
        _conclude(adaptation, job, summarise(session, job))


def _adapt_to_all(session: Session, at: Position) -> None:
    """Give each domain its own run directory below this one, with the same contents as if it were adapted to alone."""
    session.processes.main_does(lambda: adopt_phase1(session))
    extractor = shared_extractor(session)
    session.record(at)
    progress = {name: Position(phase=2) for name in session.config.data.domains}
    domains = {name: session.of_domain(name) for name in progress}
    under_way = dict(domains)
    try:
        with naming_memory(session.processes, lambda device: _smaller_of(domains, device)):
            under_way = {name: domain for name, domain in domains.items() if not is_done(domain, 2)}
            adaptations = [_prepare(domain, progress[name]) for name, domain in under_way.items()]
            jobs = train(extractor, [adaptation.training for adaptation in adaptations]) if adaptations else []
            summaries = [summarise(domain, job) for domain, job in zip(under_way.values(), jobs, strict=True)]
            for name, adaptation, job, summary in zip(tuple(under_way), adaptations, jobs, summaries, strict=True):
                _conclude(adaptation, job, summary)
                under_way.pop(name).record(progress[name], ended=True)
            for domain in domains.values():
                domain.accept()
            rundirs = {name: domain.rundir for name, domain in domains.items()}
            finish(session, 2, session.processes.main_knows(lambda: combine(_summaries(rundirs))))
    except BaseException as error:
        for name, domain in under_way.items():
            domain.record(progress[name], error)
        raise
    finally:
        at.step = max(position.step for position in progress.values())
        for domain in domains.values():
            domain.rundir.unlock()


def _smaller_of(domains: dict[str, Session], device_type: str) -> str:
    """How several domains need less memory; it is the largest batch that counts."""
    name, largest = max(domains.items(), key=lambda each: each[1].config.data.domain.batch_size)
    return with_keys_of(name, smaller(largest.config, 2, device_type))


def _summaries(rundirs: dict[str, RunDir]) -> dict[str, dict[str, Any]]:
    return {name: rundir.read_summary()["phase2"] for name, rundir in rundirs.items()}


def _prepare(session: Session, at: Position) -> Adaptation:
    """Attach an adapter to the run's Phase 1 and choose its objective."""
    # PEFT takes longer to import than torch, and Phase 1 does not need it.
    from trajdist.saved import lora

    with session.naming():
        session.processes.main_does(lambda: adopt_phase1(session))
        selection = session.selection(2)
    extractor = shared_extractor(session)
    base, document = bundle.load_model(session.rundir.model)
    bundle.check_trajectories(session.rundir, document, extractor)
    base_id = bundle.base_fingerprint(base, document)
    settings = session.config.domain_adaptation.lora
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(session.config.seed, 2))
        adapted = lora.attach(base, settings, base_id)
    before = fingerprint(lora.base_state(adapted))
    objective = reconstruction(session.config, extractor)
    task = Task(adapted, objective, settings.learning_rate, settings.weight_decay, base_id)
    if session.config.contrasts(2):
        with session.naming():
            whitened = contrast_residuals(CleanImages(session, selection, extractor), adapted, base_id)
        task = _contrasting(task, session, extractor, whitened)
    return Adaptation(Training(session, at, selection, task), extractor, before, base_id)


def _conclude(adaptation: Adaptation, job: Job, summary: dict[str, Any]) -> None:
    """Verify and save the adapter, calibrate it, and write its model card and its summary."""
    from trajdist.saved import lora

    session, selection, base_id = adaptation.training.session, adaptation.training.selection, adaptation.base_id
    trained, whitened = job.trained_model(), adaptation.training.task.whitened
    trained = trained.model if whitened is not None else trained

    def save() -> None:
        lora.save_proven(session.rundir, trained, adaptation.base_before, base_id)
        session.rundir.drop_calibration(2)

    session.processes.main_does(save)
    adapter_id = lora.adapter_fingerprint(trained, base_id)
    clean = CleanImages(session, selection, adaptation.extractor)
    with session.naming():
        calibrate(clean, trained, session.rundir.calibration(2), adapter_id, whitened)
    session.processes.main_does(lambda: _write_card(session, selection, base_id, summary))
    finish(session, 2, summary)


def _write_card(session: Session, selection: Selection, base_id: str, summary: dict[str, Any]) -> None:
    data = {
        "trained_on": selection.num_train,
        "held_out": selection.num_holdout,
        "fingerprint": session.sources["domain"].fingerprint,
        "num_processes": session.reference_world,
    }
    card = adapter_card(session.config, base_id, data, summary)
    write_bytes(session.rundir.adapter / "README.md", card.encode(errors="backslashreplace"))


def _contrasting(task: Task, session: Session, extractor: TrajectoryExtractor, whitened: ResidualModel) -> Task:
    """The same adapter, but trained to tell drawn defects from clean places."""
    valid_LD = extractor.projection.valid_LD
    model = ContrastModel(task.model, whitened, valid_LD.flatten().nonzero().squeeze(1))
    defects = DefectDraw(extractor.resolution, session.config.seed, phase=2)
    return replace(task, model=model, objective=DefectContrast(valid_LD), defects=defects, whitened=whitened)
