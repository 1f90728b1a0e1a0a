"""``trajdist merge``: merge an adapter into the weights of its base model, giving a new Phase 1 model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import yaml

from trajdist.config_files import read_yaml
from trajdist.errors import ArtifactError, ConfigError, TrainingError, os_errors
from trajdist.files import exists, is_file
from trajdist.saved import bundle, lora
from trajdist.saved.rundir import RunDir
from trajdist.scoring.detector import Detector
from trajdist.scoring.scorer import Scorer, load, own_adapters
from trajdist.tools.export import TRIALS, trial_images, unit

# In the units of :func:`trajdist.tools.export.unit`; leaves room only for the rounding of W + B A.
TOLERANCE = 1e-3


def merge(run_dir: str | Path, adapter: str | Path | None, out: Path) -> float:
    """Write the merged model to ``out/phase1``; it scores like the adapter and can be adapted like any Phase 1.

    Args:
        run_dir: the run whose Phase 1 the adapter was trained on.
        adapter: the adapter's folder; None for the run's own.
        out: a folder that does not exist yet; created atomically.

    Returns:
        The largest difference in cell scores between merged and unmerged model, over trial images; see
        :func:`trajdist.tools.export.unit`.

    Raises:
        ConfigError: ``out`` exists.
        ArtifactError: a file is missing, damaged or from another run; the run has an adapter for each of several
            domains and none was named; or ``out`` cannot be written.
        TrainingError: the merged model gives different scores.
    """
    if exists(out):
        raise ConfigError(f"--out {str(out)!r} exists: name a folder that does not.")
    source = RunDir(run_dir)
    scorer = load(run_dir, adapter or own_adapters(source) or source.adapter, device="cpu")
    if not is_file(source.config):
        # Without one, ``inspect`` would not recognise the merged folder as a run.
        raise ArtifactError(f"{str(source.config)!r} does not exist: copy it from where the run was trained.")
    target = RunDir(out.with_name(f".{out.name}.tmp"))
    shutil.rmtree(target.path, ignore_errors=True)
    try:
        with os_errors(f"--out {str(out)!r} cannot be written", fix="free some space or name another"):
            target.path.mkdir(parents=True)
            _write(scorer.detectors[0], source, target, out)
            difference = _difference(scorer, load(target.path, phase=1, device="cpu"))
            target.path.rename(out)
    finally:
        shutil.rmtree(target.path, ignore_errors=True)
    return difference


def _write(adapted: Detector, source: RunDir, target: RunDir, out: Path) -> None:
    document = bundle.read(source.model, bundle.ModelDocument)
    merged = adapted.with_model("phase1", lora.merged(adapted.model))
    target.create()
    # Commands on its config must use this folder, not the run that it came from, nor the Phase 1 of that run.
    config = {**read_yaml(source.config), "run_dir": str(out), "phase1": None}
    target.write_config(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    shutil.copyfile(source.trajectory, target.trajectory)
    bundle.save_model(target.model, merged.model, document)
    merged.save(target.calibration(1), bundle.base_fingerprint(merged.model, document))


def _difference(scorer: Scorer, again: Scorer) -> float:
    """The largest difference in cell scores, over trial images.

    Raises:
        TrainingError: it exceeds :data:`TOLERANCE`.
    """
    trials = [trial_images(scorer.size, count) for count in TRIALS]
    pairs = [(scorer.score_batch(images)[0], again.score_batch(images)[0]) for images in trials]
    found = [float((one.cells_BHW - other.cells_BHW).abs().max()) / unit(one) for one, other in pairs]
    difference = float(np.max(found))  # NaN if one of them is.
    if not difference <= TOLERANCE:
        raise TrainingError(f"the merged model gives other scores (by {difference:.2g}): please report it.")
    return difference
