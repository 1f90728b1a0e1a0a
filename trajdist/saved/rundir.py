"""The run directory: where a run writes, and how. Only the main process writes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trajdist.errors import ArtifactError
from trajdist.files import read_json, write_bytes, write_json


class RunDir:
    """Paths and records of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_images(self) -> Path:
        return self.path / "bad_images.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    @property
    def model(self) -> Path:
        return self.path / "phase1" / "model.safetensors"

    @property
    def trajectory(self) -> Path:
        return self.path / "phase1" / "trajectory.safetensors"

    @property
    def adapter(self) -> Path:
        return self.path / "phase2" / "adapter"

    @property
    def contrast(self) -> Path:
        return self.path / "phase2" / "contrast.safetensors"

    def domains(self) -> list[Path]:
        """Run directories of the domains that were adapted to at once; usually none."""
        return sorted(path.parent for path in self.path.glob("domains/*/config.yaml"))

    def subset(self, set_name: str) -> Path:
        """Numbers of the images of a stratified subset."""
        return self.path / f"subset-{set_name}.npy"

    def calibration(self, phase: int) -> Path:
        return self.path / f"phase{phase}" / "calibration.safetensors"

    def has_begun(self) -> bool:
        """Whether anything is there that follows from the config."""
        return any(
            any(self.path.glob(made)) for made in ("phase1/*.safetensors", "checkpoints/*", "subset-*.npy", "domains/*")
        )

    def create(self) -> None:
        """Make the folder.

        Raises:
            ArtifactError: the path cannot be made or written to.
        """
        with self._writing("made"):
            for folder in (self.path, self.path / "phase1"):
                folder.mkdir(parents=True, exist_ok=True)
            # An empty list says that every image could be used.
            self.bad_images.touch()

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"run_dir={str(self.path)!r} cannot be {what} ({error.strerror}): name a folder that can be written."
            ) from None

    def sweep(self) -> None:
        """Remove what a killed process left half written. Only for the holder of the lock."""
        for folder in (self.path, self.path / "phase1", self.path / "phase2", self.checkpoints):
            for leftover in folder.glob(".*.tmp"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        write_bytes(self.config, text.encode())

    def append(self, file: Path, *records: dict[str, Any]) -> None:
        """Append JSON lines."""
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with _recording(file), open(file, "a", encoding="utf-8") as handle:
            handle.write(text)

    def sync_records(self) -> dict[str, int]:
        """Make the records survive a crash; returns their sizes, which a checkpoint remembers."""
        sizes = {}
        for file in (self.metrics, self.ledger):
            with _recording(file), open(file, "ab") as handle:
                os.fsync(handle.fileno())
                sizes[file.name] = handle.tell()
        return sizes

    def rewind_records(self, sizes: dict[str, int]) -> None:
        """Cut off what was recorded after a checkpoint: those steps are taken again."""
        for file in (self.metrics, self.ledger):
            with _recording(file):
                if file.exists() and file.stat().st_size > sizes.get(file.name, 0):
                    os.truncate(file, sizes.get(file.name, 0))

    def mend(self, file: Path) -> None:
        """Cut off a last line that a crash cut short, so that the next one begins a line."""
        with _recording(file):
            whole = file.read_bytes() if file.exists() else b""
            if whole and not whole.endswith(b"\n"):
                os.truncate(file, whole.rfind(b"\n") + 1)

    def recall(self, key: str) -> Any:
        """What run.json has under ``key``, or None."""
        path = self.path / "run.json"
        facts = read_json(path) if path.exists() else {}
        if not isinstance(facts, dict):
            raise ArtifactError(f"{str(path)!r} is damaged: it is not a JSON object.")
        return facts.get(key)

    def remember(self, key: str, value: Any, replace: bool = False) -> None:
        """Write ``value`` under ``key`` of run.json, unless the key is there."""
        if replace or self.recall(key) is None:
            path = self.path / "run.json"
            facts = read_json(path) if path.exists() else {}
            write_json(path, {**facts, key: value})

    def lock(self) -> None:
        """Hold the folder until :meth:`unlock` or the end of the process, where the file system can lock.

        Raises:
            ArtifactError: another run holds it, or it cannot be written.
        """
        with self._writing("written"):
            self._lock = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # A lock of the process, not of the open file: decoding workers must not outlive their trainer with it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.unlock()
            raise ArtifactError(
                f"run_dir={str(self.path)!r} is in use by another run: wait for it, or name another run_dir."
            ) from None
        except OSError:
            pass  # Some network file systems have no locks.

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_held(self) -> bool | None:
        """Whether another process holds the folder; None where nobody can tell.

        Not for the process that holds it: closing the file again would drop its lock.
        """
        try:
            lock = os.open(self.path / ".lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:
            return None
        try:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return None
        finally:
            os.close(lock)
        return False

    def move_away(self) -> Path | None:
        """Rename an old run directory so that a fresh one can take its place; returns where it went.

        Raises:
            ArtifactError: another run is at work in it, or it cannot be renamed.
        """
        if not self.path.exists():
            return None
        self.lock()
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        with self._writing("renamed"):
            self.path.rename(aside)
        self.unlock()
        return aside

    def write_status(self, status: str, phase: int, step: int, why: str = "") -> None:
        """``status`` is running, stopped, done or failed."""
        document = {"status": status, "phase": phase, "step": step, "why": why, "time": time.time()}
        write_json(self.path / "status.json", document)

    def read_status(self) -> str:
        """running, stopped, done or failed; "unknown" before the first."""
        path = self.path / "status.json"
        document = read_json(path) if path.exists() else {}
        return str(document.get("status", "unknown")) if isinstance(document, dict) else "unknown"

    def told_status(self) -> str:
        """For people: what was killed had no time to write how it ended."""
        status = self.read_status()
        if status != "running" or self.is_held() is not False:
            return status
        return "running (by its status; no process that this machine sees holds the run directory: it was killed)"

    def read_summary(self) -> dict[str, Any]:
        """Summaries of the finished phases; empty when none is."""
        path = self.path / "summary.json"
        summary = read_json(path) if path.exists() else {}
        if not isinstance(summary, dict):
            raise ArtifactError(f"{str(path)!r} is damaged: it is not a JSON object.")
        return summary

    def write_summary(self, phase: str, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", {**self.read_summary(), phase: summary})


@contextmanager
def _recording(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{str(file)!r} cannot be written ({error.strerror}): free some space or make it writable."
        ) from None
