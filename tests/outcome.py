"""What a run or a scoring leaves behind, compared with one that nothing interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajdist.tools.audit import audit


def read(run_dir: Path, name: str) -> dict[str, Any]:
    """One of the JSON files of a run or a scoring; empty before there is one."""
    path = run_dir / name
    return json.loads(path.read_text()) if path.exists() else {}


def read_lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one of the files that have a JSON document in each line."""
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a scoring."""
    return read_lines(out, "scores.jsonl")


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write a scoring's rows; what a row does not say is as that of a clean image, or of an unreadable one."""
    unread: dict[str, Any] = {"score": None, "p_value": None, "is_anomalous": None, "error": "it is damaged"}
    whole = [({"p_value": 0.5, "is_anomalous": False} if row["score"] is not None else unread) | row for row in rows]
    (out / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))


def flip_a_weight(file: Path) -> None:
    """One bit, so that the weight is another number and the file as good as before."""
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)


def assert_done(run_dir: Path) -> None:
    """Finished, and every image seen once per epoch."""
    found = audit(run_dir)
    assert not found.problems
    assert found.status == "done"


def assert_same_bits(run_dir: Path, reference: Path) -> None:
    """Models, adapters and calibrations are those of the other run, byte by byte."""
    assert_done(run_dir)
    ours, theirs = _tensors(run_dir), _tensors(reference)
    assert ours.keys() == theirs.keys() >= {"phase1/model.safetensors", "phase1/calibration.safetensors"}
    assert [name for name, tensors in ours.items() if tensors != theirs[name]] == []


def _tensors(run_dir: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in run_dir.glob("phase?/**/*.safetensors")}
