"""Adopts the Phase 1 of another run (``phase1=DIR``), and checks that the config agrees with it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from trajdist.config import SETS, Config
from trajdist.errors import ArtifactError, ConfigError, os_errors
from trajdist.files import exists, is_file, is_folder, user_path, write_bytes
from trajdist.saved import bundle
from trajdist.saved.rundir import RunDir
from trajdist.training.session import Session

# Models that model.num_heads says nothing about.
WITHOUT_HEADS = ("autoencoder", "vae")


def adopt_phase1(session: Session) -> None:
    """With ``phase1=DIR``, copy that run's Phase 1 into this run directory, so that it is self-contained.

    Raises:
        ArtifactError: there is no finished Phase 1, or its files are damaged.
        ConfigError: this config does not describe the model of that Phase 1.
    """
    rundir = session.rundir
    if session.config.phase1 is not None:
        _adopt(session, session.config.phase1)
    if not exists(rundir.model) or not exists(rundir.calibration(1)):
        what = "Phase 1 is not finished" if exists(rundir.model) else "there is no Phase 1"
        raise ArtifactError(f"{what} in {str(rundir.path)!r}: train it first, or name an older run with phase1=DIR.")
    _check_same_model(session.config, rundir.trajectory, rundir.model, made_alike=False)


def _adopt(session: Session, chosen: str) -> None:
    """Copy the chosen Phase 1, unless that was done before: then it may no longer exist.

    Raises:
        ArtifactError: it is not finished, or the run has another one.
        ConfigError: the config does not describe its model.
    """
    rundir, config = session.rundir, session.config
    folder = user_path(chosen)
    folder = folder / "phase1" if is_folder(folder / "phase1") else folder
    model = folder / rundir.model.name
    if not exists(rundir.model):
        _copy(folder, rundir, config, was_adopted=bool(session.domain))
    elif is_file(model) and model.read_bytes() != rundir.model.read_bytes():
        raise ArtifactError(
            f"{str(rundir.path)!r} has another Phase 1 than phase1={chosen!r}: leave phase1 out to use its own, "
            "or name another run_dir."
        )


def _copy(folder: Path, rundir: RunDir, config: Config, was_adopted: bool) -> None:
    """Copy a finished Phase 1; with ``was_adopted`` from the run of a joint adaptation, whose config has the same keys.

    Raises:
        ArtifactError: it is not finished, or the run has begun one of its own.
        ConfigError: ``config`` does not describe its model.
    """
    if rundir.recall(SETS[1]) is not None:
        raise ArtifactError(
            f"{str(rundir.path)!r} has begun a Phase 1 of its own, and phase1={config.phase1!r} would replace it: "
            "name another run_dir, or start over with --fresh."
        )
    targets = rundir.trajectory, rundir.calibration(1), rundir.model
    for target in targets:
        if not is_file(folder / target.name):
            raise ArtifactError(f"phase1={config.phase1!r} has no {target.name}: name a run whose Phase 1 is done.")
    # Check before copying anything: the user can then correct the config and run the command again.
    trajectory, model = folder / rundir.trajectory.name, folder / rundir.model.name
    _check_same_model(config, trajectory, model, made_alike=not was_adopted)
    with os_errors(f"phase1={config.phase1!r} cannot be read", fix="make its files readable"):
        for target in targets:
            write_bytes(target, (folder / target.name).read_bytes())


def _check_same_model(config: Config, trajectory: Path, model: Path, made_alike: bool) -> None:
    """Refuse a Phase 2 config that does not describe the Phase 1 model it adapts.

    Args:
        made_alike: compare how it was made as well, which earlier versions did not do.

    Raises:
        ConfigError: the first key that differs.
    """
    made = bundle.read(trajectory, bundle.TrajectoryDocument)
    learned = bundle.read(model, bundle.ModelDocument)
    pairs: dict[str, tuple[object, object]] = {
        "backbone.name": (config.backbone.name, made.backbone),
        "data.image_size": (config.data.image_size, made.image_size),
        "data.domain.fit": (config.data.domain.fit, made.fit),
        "model.spatial_resolution": (config.model.spatial_resolution, made.spatial_resolution),
        "model.feature_dim": (config.model.feature_dim, made.feature_dim),
        "trajectory.subcells": (config.trajectory.subcells, made.subcells),
        "model.type": (config.model.type, learned.type),
        "model.hidden_dim": (config.model.hidden_dim, learned.hidden_dim),
        "model.latent_dim": (config.model.latent_dim, learned.latent_dim),
        "model.num_layers": (config.model.num_layers, learned.num_layers),
    }
    if made_alike:
        pairs |= _making(config, made, learned)
    for key, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise ConfigError(f"{key}={mine!r}, but the Phase 1 in {str(model.parent)!r} has {theirs!r}: use that.")


def _making(
    config: Config, made: bundle.TrajectoryDocument, learned: bundle.ModelDocument
) -> dict[str, tuple[object, object]]:
    """The keys that say how a Phase 1 was made, each as the config has it and as it was."""
    pairs: dict[str, tuple[object, object]] = {
        "trajectory.projection": (config.trajectory.projection, made.projection),
        "model.dropout": (config.model.dropout, learned.dropout),
    }
    if learned.type not in WITHOUT_HEADS:
        pairs["model.num_heads"] = (config.model.num_heads, learned.num_heads)
    # Without patterns, the blocks of Phase 1 are meant; what wider ones match, only the network could tell.
    patterns = config.backbone.blocks
    if patterns and not all(any(fnmatchcase(block, pattern) for pattern in patterns) for block in made.blocks):
        pairs["backbone.blocks"] = (patterns, made.blocks)
    return pairs
