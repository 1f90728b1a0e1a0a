"""Claims a run directory: whether this run may start there, or resume what is there.

What is found in a run directory that is met again, what is done, and where:

========================================  ========================================  ================================
a lock that is held                       refused                                   claim
anything, with --fresh                    renamed, once per job of a launcher       session.open_session
a STOP file                               removed, which is told                    session.open_session
partial files                             removed                                   claim
config.yaml: a key that changes results   refused, if the run has made anything     _check_same_config
run.json, but nothing made                its image sets are forgotten              claim
run.json: num_processes                   sets the global batch                     selection.training_plan
run.json: other images of a set           refused, if the phase has made anything   session.Session.selection
  of a finished phase                     refused                                   summary.is_done
run.json: another subset than is drawn    trained on, as earlier versions drew it   selection.as_begun
run.json: a set without max_holdout       as many are held out as when it began     session.Session.selection
  a domain with or without split_of       Phase 1's or its own are held out again   session.Session.selection
Phase 1, but not its images in run.json   was adopted: not trained                  phases._was_adopted
no Phase 1, with phase1=DIR               copied; refused if an own one was begun   adoption.adopt_phase1
another Phase 1 than that of phase1=DIR   refused                                   adoption.adopt_phase1
summary.json: the phase                   done; may go on from its checkpoint       summary.is_done
  of several domains, now one             not done                                  summary.is_done
  with files lost or damaged              repeated, or refused below a Phase 2      summary.is_done
a model that was not calibrated           refused, in Phase 2                       adaptation._prepare
trajectory.safetensors                    read, not measured                        extractors.prepare_extractor
contrast.safetensors                      read; for another base measured anew      calibrating.contrast_residuals
  with a checkpoint of Phase 2            read; for another base refused            calibrating.contrast_residuals
a damaged checkpoint                      set aside for the one before it           checkpoint.newest_checkpoint
a checkpoint of the phase                 resumed; cuts metrics and ledger          train._checkpoint_of
  of other weights, steps or more epochs  refused                                   train._checkpoint_of, _cursor_of
  of a version that drew other defects    its validations are not compared with     train._restore
  of an epoch that is not validated       validated first                           loop.resume
one of Phase 2, with Phase 1 to do        refused                                   train._checkpoint_of
one of Phase 1 after its end, in Phase 2  set aside; cuts metrics and ledger        train._checkpoint_of
========================================  ========================================  ================================
"""

from __future__ import annotations

from typing import Any

from trajdist.config import SETS, Config
from trajdist.config_files import dump_yaml, read_yaml
from trajdist.config_schema import fields, flat, flatten
from trajdist.errors import ArtifactError, ConfigError
from trajdist.files import exists
from trajdist.runtime.processes import device_type
from trajdist.saved import bundle
from trajdist.saved.rundir import RunDir


def claim(rundir: RunDir, config: Config, world: int) -> None:
    """Claim a run directory for this run; ``world`` is the number of processes it begins with if it is new.

    Raises:
        ConfigError: a key changed that would change the result.
        ArtifactError: the directory cannot be written, or is in use by another run.
    """
    rundir.create()
    rundir.lock()
    rundir.sweep()
    _check_same_config(rundir, config)
    rundir.forget_stop()
    if not rundir.has_begun():
        rundir.write_config(dump_yaml(config))
        # Left by a start that produced nothing, so nothing depends on these facts.
        rundir.forget("num_processes", *SETS.values())
    rundir.remember("num_processes", world)


def reference_world_of(rundir: RunDir) -> int:
    world = rundir.recall("num_processes")
    if not isinstance(world, int) or world < 1:
        raise ArtifactError(f"{str(rundir.path / 'run.json')!r} is damaged: num_processes={world!r} is not a number.")
    return world


def _check_same_config(rundir: RunDir, config: Config) -> None:
    """Refuse changed keys: a run may be resumed with other workers, logs or more epochs, but not another model."""
    if not exists(rundir.config) or not rundir.has_begun():
        return
    before, now = flatten(read_yaml(rundir.config)), flat(config)
    for key, default, _, may_change in fields():
        # A key that did not exist in the version that began the run counts as its default.
        began = before.get(key, default)
        if not may_change and began != now[key] and not _means_the_same(rundir, key, began, now[key]):
            of_phase2 = key.startswith(("data.domain.", "domain_adaptation."))
            raise ConfigError(
                f"{key}={now[key]!r}, but the run in {str(rundir.path)!r} began with {began!r}: keep the old value, "
                f"name another run_dir, or {how_to_start_over(rundir, of_phase2)}."
            )


def _means_the_same(rundir: RunDir, key: str, began: object, now: Any) -> bool:
    """Whether a key may change because the result does not: the same weights elsewhere, or what fp16 was on CPUs."""
    if key == "backbone.weights":
        return _have_moved(rundir, now)
    return key == "runtime.mixed_precision" and (began, now) == ("fp16", "no") and device_type() == "cpu"


def _have_moved(rundir: RunDir, weights: str) -> bool:
    """Whether ``backbone.weights`` names another file with the same weights as before.

    Raises:
        ConfigError: it is not a file.
    """
    if weights in ("DEFAULT", "none") or not exists(rundir.trajectory):
        return False
    try:
        bundle.load_extractor(rundir.trajectory, weights)
    except ArtifactError:
        return False
    return True


def how_to_start_over(rundir: RunDir, of_phase2: bool) -> str:
    """How to start over, as the end of a sentence; if only Phase 2 is concerned, Phase 1 is kept."""
    return (
        f"adapt again with phase1={str(rundir.path)!r} in another run_dir" if of_phase2 else "start over with --fresh"
    )
