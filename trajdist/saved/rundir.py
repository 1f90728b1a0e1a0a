"""The run directory: its layout, and how a run writes to it. Only the main process writes."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from trajdist.errors import ArtifactError, os_errors
from trajdist.files import exists, hold, is_file, is_held, read_object, user_path, write_bytes, write_json

# Required in every summary of a phase: its readers rely on them.
FIGURES: tuple[str, ...] = ("images", "failures", "epochs", "steps", "seconds", "images_per_s", "first_loss")
FIGURES += ("final_loss", "peak_memory_bytes", "memory_growth_bytes", "num_processes", "trained_parameters")
# PEFT's names of the files of an adapter.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# In the config of an adapter, before the fingerprint of its base model.
BASE_PREFIX = "trajdist:"
# In run.json: where Phase 2 begins in the metrics and the ledger.
AFTER_PHASE1 = "records_after_phase1"


class RunDir:
    """Paths and records of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.bad_images = self.path / "bad_images.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.stop_file = self.path / "STOP"
        self.model = self.path / "phase1" / "model.safetensors"
        self.trajectory = self.path / "phase1" / "trajectory.safetensors"
        self.adapter = self.path / "phase2" / "adapter"
        self.contrast = self.path / "phase2" / "contrast.safetensors"
        self._lock: int | None = None

    def is_at(self, path: str) -> bool:
        """Whether ``path`` is this folder, or the folder of its Phase 1."""
        return user_path(path).resolve() in (self.path.resolve(), self.model.parent.resolve())

    def domains(self) -> list[Path]:
        """Run directories of the domains of a joint adaptation, sorted; usually none."""
        return sorted(path.parent for path in self.path.glob("domains/*/config.yaml"))

    def has_adapted(self) -> bool:
        """Whether a Phase 2 is done, or that of several domains has begun.

        Raises:
            ArtifactError: summary.json is damaged.
        """
        return bool(self.domains()) or "phase2" in self.read_summary()

    def subset(self, set_name: str) -> Path:
        """File of the image numbers of a stratified subset."""
        return self.path / f"subset-{set_name}.npy"

    def calibration(self, phase: int) -> Path:
        return self.path / f"phase{phase}" / "calibration.safetensors"

    def made(self, phase: int) -> tuple[Path, ...]:
        """The files of a finished phase that scoring needs."""
        adapter = self.adapter / ADAPTER_CONFIG, self.adapter / ADAPTER_WEIGHTS
        return (*((self.trajectory, self.model) if phase == 1 else adapter), self.calibration(phase))

    def drop_calibration(self, phase: int) -> None:
        """Remove a phase's calibration as soon as new weights are saved: that of fewer epochs would pass for theirs.

        Raises:
            ArtifactError: it cannot be removed.
        """
        with _recording(self.calibration(phase)):
            self.calibration(phase).unlink(missing_ok=True)

    def forget_stop(self) -> None:
        """Remove the STOP file, if there is one.

        Raises:
            ArtifactError: it cannot be removed.
        """
        with os_errors(f"{str(self.stop_file)!r} cannot be removed", fix="remove it, as it would stop the run"):
            self.stop_file.unlink(missing_ok=True)

    def has_begun(self) -> bool:
        """Whether the run has produced anything that depends on its config."""
        return any(any(self.path.glob(made)) for made in ("phase1/*.safetensors", "checkpoints/*", "domains/*"))

    def create(self) -> None:
        """Create the folders.

        Raises:
            ArtifactError: they cannot be created or are not writable.
        """
        with self._writing("made"):
            for folder in (self.path, self.path / "phase1"):
                folder.mkdir(parents=True, exist_ok=True)
            # An empty file means that every image was usable.
            self.bad_images.touch()

    def _writing(self, what: str) -> AbstractContextManager[None]:
        return os_errors(f"run_dir={str(self.path)!r} cannot be {what}", fix="name a folder that can be written")

    def sweep(self) -> None:
        """Remove partial files, and a partial line, left by a killed process. Call only while holding the lock.

        Metrics and ledger are cut to a checkpoint instead: :meth:`rewind_records`.

        Raises:
            ArtifactError: the line cannot be removed.
        """
        for folder in (self.path, self.path / "phase1", self.path / "phase2", self.checkpoints):
            for leftover in folder.glob(".*.tmp"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        self._drop_torn_line()

    def write_config(self, text: str) -> None:
        write_bytes(self.config, text.encode())

    def append(self, file: Path, *records: dict[str, Any]) -> None:
        """Append records as JSON lines.

        Raises:
            ArtifactError: the file cannot be written.
            ValueError: a record contains NaN or infinity.
        """
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with _recording(file), open(file, "a", encoding="utf-8") as handle:
            handle.write(text)

    def sync_records(self) -> dict[str, int]:
        """Sync the metrics and ledger to disk; returns their sizes in bytes by name, to be stored in a checkpoint."""
        sizes = {}
        for file in (self.metrics, self.ledger):
            with _recording(file), open(file, "ab") as handle:
                os.fsync(handle.fileno())
                sizes[file.name] = handle.tell()
        return sizes

    def rewind_records(self, sizes: dict[str, int]) -> None:
        """Truncate the metrics and ledger to their sizes at a checkpoint: the steps after it will be repeated."""
        for file in (self.metrics, self.ledger):
            with _recording(file):
                if exists(file) and file.stat().st_size > sizes.get(file.name, 0):
                    os.truncate(file, sizes.get(file.name, 0))

    def _drop_torn_line(self) -> None:
        """Remove an incomplete last line of the list of bad images, so that the next one starts on a new line."""
        with _recording(self.bad_images):
            whole = self.bad_images.read_bytes() if exists(self.bad_images) else b""
            if whole and not whole.endswith(b"\n"):
                os.truncate(self.bad_images, whole.rfind(b"\n") + 1)

    def recall(self, key: str) -> Any:
        """The value of ``key`` in run.json, or None.

        Raises:
            ArtifactError: run.json is damaged.
        """
        return self._document("run.json").get(key)

    def remember(self, key: str, value: Any, replace: bool = False) -> None:
        """Set ``key`` in run.json, unless it already has a value and ``replace`` is false.

        Raises:
            ArtifactError: run.json is damaged or cannot be written.
        """
        facts = self._document("run.json")
        if facts.get(key) is None or (replace and facts[key] != value):
            write_json(self.path / "run.json", {**facts, key: value})

    def records_after_phase1(self) -> dict[str, int]:
        """The sizes of the metrics and ledger in bytes when Phase 1 was done, by name; empty if it is not.

        Raises:
            ArtifactError: run.json is damaged.
        """
        sizes = self.recall(AFTER_PHASE1) or {}
        if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
            raise ArtifactError(
                f"{str(self.path / 'run.json')!r} is damaged: {AFTER_PHASE1}={sizes!r} are not file sizes."
            )
        return sizes

    def forget(self, *keys: str) -> None:
        """Remove keys from run.json.

        Raises:
            ArtifactError: run.json is damaged or cannot be written.
        """
        facts = self._document("run.json")
        if facts.keys() & set(keys):
            write_json(self.path / "run.json", {key: facts[key] for key in facts if key not in keys})

    def _document(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of this folder; empty if there is no such file."""
        path = self.path / name
        return read_object(path) if exists(path) else {}

    def lock(self) -> None:
        """Lock the folder until :meth:`unlock` or process exit; no-op on file systems without locks.

        Raises:
            ArtifactError: another run holds the lock, or the folder is not writable.
        """
        with self._writing("written"):
            self._lock = hold(self.path / ".lock")
        if self._lock is None:
            raise ArtifactError(
                f"run_dir={str(self.path)!r} is in use by another run: wait for it, or name another run_dir."
            )

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_held(self) -> bool | None:
        """Whether another process holds the lock; None if that cannot be determined. Not for the holder itself."""
        return is_held(self.path / ".lock")

    def move_away(self) -> Path | None:
        """Rename an old run directory to make way for a new one; returns its new path, None if there was none.

        Raises:
            ArtifactError: another run is using it, or it cannot be renamed.
        """
        if not exists(self.path):
            return None
        if not self.path.name:
            raise ArtifactError(
                f"run_dir={str(self.path)!r} cannot be renamed to start over, as it is the current folder: "
                "run the command in another folder, with the path of this one."
            )
        self.lock()
        number = 1
        while exists(aside := self.path.with_name(f"{self.path.name}.old-{number}")):
            number += 1
        with self._writing("renamed"):
            self.path.rename(aside)
        self.unlock()
        return aside

    def write_status(self, status: str, phase: int, step: int, why: str = "") -> None:
        """Write status.json; ``status`` is "running", "stopped", "done" or "failed"."""
        document = {"status": status, "phase": phase, "step": step, "why": why, "time": time.time()}
        write_json(self.path / "status.json", document)

    def read_status(self) -> str:
        """The last written status: "running", "stopped", "done" or "failed"; "unknown" if there is none."""
        return str(self._document("status.json").get("status", "unknown"))

    def was_adapting(self) -> bool:
        """Whether status.json, if it can be read, says that the run was last in Phase 2."""
        with suppress(ArtifactError):
            return self._document("status.json").get("phase") == 2
        return False

    def told_status(self) -> str:
        """The status for people: a killed run had no time to write how it ended."""
        status = self.read_status()
        if status != "running" or self.is_held() is not False:
            return status
        return "running (by its status; no process here holds the run directory: it was killed, or runs elsewhere)"

    def read_summary(self) -> dict[str, Any]:
        """Summaries of the finished phases, by phase; empty if there are none.

        Raises:
            ArtifactError: summary.json is damaged.
        """
        summary = self._document("summary.json")
        for phase, figures in summary.items():
            if lacks := _lacking(figures):
                raise ArtifactError(
                    f"{str(self.path / 'summary.json')!r} is damaged: its {phase} has no {lacks}; restore it, or name "
                    "another run_dir."
                )
        return summary

    def phase1_steps(self) -> int:
        """Number of steps of a finished Phase 1, which the numbers of Phase 2's checkpoints continue; else 0.

        Raises:
            ArtifactError: summary.json is damaged.
        """
        return int(self.read_summary().get("phase1", {}).get("steps", 0))

    def write_summary(self, phase: str, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", {**self.read_summary(), phase: summary})


def check_has_adapter(folder: Path) -> None:
    """Check that a folder has an adapter.

    Raises:
        ArtifactError: it has none.
    """
    if not is_file(folder / ADAPTER_CONFIG):
        inside = [path for path in (folder / "adapter", folder / "phase2/adapter") if is_file(path / ADAPTER_CONFIG)]
        fix = f"name {str(inside[0])!r}" if inside else "name a folder like RUN_DIR/phase2/adapter"
        raise ArtifactError(f"the adapter {str(folder)!r} has no {ADAPTER_CONFIG}: {fix}.")


def _recording(file: Path) -> AbstractContextManager[None]:
    return os_errors(f"{str(file)!r} cannot be written", fix="free some space or make it writable")


def _lacking(figures: Any) -> str | None:
    """The first required figure that a phase's summary, or that of one of its domains, lacks, if any."""
    domains = figures.get("domains", {}) if isinstance(figures, dict) else None
    if not isinstance(domains, dict):
        return "figures"
    own = next((name for name in FIGURES if not isinstance(figures.get(name), (int, float))), None)
    return own or next(filter(None, map(_lacking, domains.values())), None)
