"""What a run leaves behind, compared with a run that nothing interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajdist.tools.audit import audit

ARTIFACTS = (
    "phase1/model.safetensors",
    "phase1/trajectory.safetensors",
    "phase1/calibration.safetensors",
    "phase2/adapter/adapter_model.safetensors",
    "phase2/calibration.safetensors",
)


def read(run_dir: Path, name: str) -> dict[str, Any]:
    """One of the JSON files of a run; empty before there is one."""
    path = run_dir / name
    return json.loads(path.read_text()) if path.exists() else {}


def assert_done(run_dir: Path) -> None:
    """Finished, and every image seen once per epoch."""
    found = audit(run_dir)
    assert not found.problems
    assert found.status == "done"


def assert_same_bits(run_dir: Path, reference: Path) -> None:
    """Model, adapter and calibrations are those of the other run, byte by byte."""
    assert_done(run_dir)
    different = [name for name in ARTIFACTS if (run_dir / name).read_bytes() != (reference / name).read_bytes()]
    assert different == []
