"""Phase 2: load Phase 1, attach LoRA, train, verify, save, calibrate; for one domain, or for several at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trajdist.artifacts import seeded
from trajdist.data.drawing import DefectDraw
from trajdist.errors import ArtifactError
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.files import write_bytes
from trajdist.runtime.memory import naming_memory
from trajdist.saved import bundle
from trajdist.saved.card import adapter_card
from trajdist.scoring.residuals import ResidualModel
from trajdist.sharding import seed_of
from trajdist.training.adoption import adopt_phase1
from trajdist.training.calibrating import calibrate, contrast_residuals, is_calibration_of
from trajdist.training.doctor import smaller
from trajdist.training.extractors import shared_extractor
from trajdist.training.job import Job
from trajdist.training.objectives import ContrastModel, DefectContrast, Task, reconstructing
from trajdist.training.passes import CleanImages
from trajdist.training.session import Session, with_keys_of
from trajdist.training.summary import combine, finish, is_done, summarise
from trajdist.training.train import Training, reconstruction, train


def phase2(session: Session) -> None:
    """Adapt a trained Phase 1 to the domain set with LoRA, or to each of ``data.domains``.

    Raises:
        ArtifactError, ConfigError: see :func:`adopt_phase1` and :func:`trajdist.training.train.train`.
        DataError: the images changed, or too many of them could not be read.
        TrainingError: a loss or a gradient was not finite, or the trained adapter failed its verification.
        StopRequested: a stop was requested; a new start resumes from the checkpoint, if there is one yet.
    """
    session.at.phase, session.at.step = 2, 0
    if session.config.data.domains:
        _adapt_to_all(session)
    elif not is_done(session, 2):
        training = _prepare(session)
        (job,) = train(shared_extractor(session), [training])
        _conclude(job, summarise(job))


def _adapt_to_all(session: Session) -> None:
    """Give each domain its own run directory below this one, with the same contents as if it were adapted to alone."""
    processes = session.processes
    processes.main_does(lambda: adopt_phase1(session))
    extractor = shared_extractor(session)
    session.write_status()
    domains = {name: session.of_domain(name) for name in session.config.data.domains}
    under_way: dict[str, Session] = {}
    try:
        with naming_memory(processes, lambda device: _smaller_of(domains, device)):
            _adapt_to_each(domains, under_way, extractor)
            for domain in domains.values():
                domain.accept()
            together = processes.main_knows(
                lambda: combine({name: domain.rundir.read_summary()["phase2"] for name, domain in domains.items()})
            )
            finish(session, 2, together)
    except BaseException as error:
        for domain in under_way.values():
            domain.write_status(error)
        raise
    finally:
        session.at.step = max(domain.at.step for domain in domains.values())
        for domain in domains.values():
            domain.rundir.unlock()


def _adapt_to_each(domains: dict[str, Session], under_way: dict[str, Session], extractor: TrajectoryExtractor) -> None:
    """Adapt to the domains that are not done. Meanwhile ``under_way`` has those among them that are known.

    An error concerns these: if one domain is refused, those after it are left as they are.
    """
    for name, domain in domains.items():
        under_way[name] = domain
        with domain.naming():
            if is_done(domain, 2):
                del under_way[name]
    trainings = [_prepare(domain) for domain in under_way.values()]
    jobs = train(extractor, trainings) if trainings else []
    summaries = [summarise(job) for job in jobs]
    for job, summary in zip(jobs, summaries, strict=True):
        _conclude(job, summary)
        under_way.pop(job.session.domain).write_status(ended=True)


def _smaller_of(domains: dict[str, Session], device_type: str) -> str:
    """How several domains need less memory; it is the largest batch that counts."""
    name, largest = max(domains.items(), key=lambda each: each[1].config.data.domain.batch_size)
    return with_keys_of(name, smaller(largest.config, 2, device_type))


def _prepare(session: Session) -> Training:
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
    calibration = session.rundir.calibration(1)
    if not is_calibration_of(calibration, base_id):
        raise ArtifactError(
            f"{str(session.rundir.model)!r} is not the model that {str(calibration)!r} was made for: restore both, or "
            "train Phase 1 again."
        )
    settings = session.config.domain_adaptation.lora
    with seeded(seed_of(session.config.seed, 2)):
        adapted = lora.attach(base, settings, base_id)
    objective = reconstruction(session.config, extractor)
    task = Task(adapted, objective, settings.learning_rate, settings.weight_decay, base_id)
    if session.config.contrasts(2):
        with session.naming():
            whitened = contrast_residuals(CleanImages(session, selection, extractor), adapted, base_id)
        task = _contrasting(task, session, extractor, whitened)
    return Training(session, selection, task)


def _conclude(job: Job, summary: dict[str, Any]) -> None:
    """Verify and save the adapter, calibrate it, and write its model card and its summary."""
    from trajdist.saved import lora

    session, base_id, whitened = job.session, job.task.base, job.task.whitened
    trained: Any = reconstructing(job.trained_model())

    def save() -> None:
        lora.save_proven(session.rundir, trained, base_id)
        session.rundir.drop_calibration(2)

    session.processes.main_does(save)
    adapter_id = lora.adapter_fingerprint(trained, base_id)
    clean = CleanImages(session, job.selection, shared_extractor(session))
    with session.naming():
        calibrate(clean, trained, session.rundir.calibration(2), adapter_id, whitened)
    session.processes.main_does(lambda: _write_card(job, summary))
    finish(session, 2, summary)


def _write_card(job: Job, summary: dict[str, Any]) -> None:
    session = job.session
    data = {
        "trained_on": job.selection.num_train,
        "held_out": job.selection.num_holdout,
        "fingerprint": session.sources["domain"].fingerprint,
        "num_processes": session.reference_world,
    }
    card = adapter_card(session.config, job.task.base, data, summary)
    write_bytes(session.rundir.adapter / "README.md", card.encode(errors="backslashreplace"))


def _contrasting(task: Task, session: Session, extractor: TrajectoryExtractor, whitened: ResidualModel) -> Task:
    """The same adapter, but trained to tell drawn defects from clean places."""
    valid_LD = extractor.projection.valid_LD
    model = ContrastModel(task.model, whitened, valid_LD.flatten().nonzero().squeeze(1))
    defects = DefectDraw(extractor.resolution, session.config.seed, phase=2)
    return replace(task, model=model, objective=DefectContrast(valid_LD), defects=defects, whitened=whitened)
