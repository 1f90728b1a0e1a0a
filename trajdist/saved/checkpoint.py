"""Checkpoints: written to a temporary folder, hashed and renamed; resume from the newest one whose hashes match.

``checkpoints/step-NNNNNNNN/`` holds ``model.safetensors`` (the trained weights), ``optimizer.safetensors``,
``state.json`` (cursor, counters) and ``manifest.json`` with the size and SHA-256 of the others.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from trajdist.artifacts import holds, read_tensors
from trajdist.errors import ArtifactError, first_problem, one_line, os_errors
from trajdist.files import copy_mode, exists, is_folder, read_json, sha256, sync_file, sync_folder, write_bytes

Tensors = dict[str, torch.Tensor]
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
# Optional: extra copies of the weights, such as their moving average and the best ones so far.
KEPT = "kept.safetensors"
_NAME = re.compile(r"step-(\d{8,})")


class Totals(BaseModel):
    """Integer totals over a range of images, as a :class:`trajdist.training.journal.Journal` sums them.

    Attributes:
        images: number that was trained on.
        loss, recon, kl: sums of the per-image losses, in fixed point.
        digest: sum of :func:`trajdist.sharding.digest` over the batches.
        failures: images that could not be used.
        not_finite: images whose loss, plus steps whose gradient, was not finite.
    """

    model_config = ConfigDict(extra="forbid")
    images: int
    loss: int
    recon: int
    kl: int
    digest: int
    failures: int
    not_finite: int

    @classmethod
    def zero(cls) -> Totals:
        return cls(**dict.fromkeys(cls.model_fields, 0))

    def add(self, other: Totals) -> None:
        for name, value in other:
            setattr(self, name, getattr(self, name) + value)


class Books(BaseModel):
    """The serialised state of a :class:`trajdist.training.journal.Journal`."""

    model_config = ConfigDict(extra="forbid")
    line: Totals
    epoch: Totals
    total: Totals
    first_loss: float | None
    final_loss: float | None
    # Only in older files, and ignored: it says nothing about the memory of the process that resumes.
    epoch_memory: list[float] = Field([], exclude=True)
    skipped: int = Field(0, ge=0)


class Validated(BaseModel):
    """The serialised state of a :class:`trajdist.training.keeper.Keeper`."""

    model_config = ConfigDict(extra="forbid")
    epoch: int = Field(ge=0)
    stale: int = Field(ge=0)
    best: dict[str, Any] | None
    last: dict[str, Any] | None


class State(BaseModel):
    """Schema of ``state.json``."""

    model_config = ConfigDict(extra="forbid")
    base: str
    phase: Literal[1, 2]
    cursor: int = Field(ge=0, lt=2**62)
    step: int = Field(ge=0, lt=2**62)
    global_batch: int = Field(gt=0, lt=2**62)
    num_processes: int = Field(gt=0)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    stages: dict[str, float]
    journal: Books
    scaler: dict[str, int | float] | None
    file_sizes: dict[str, Annotated[int, Field(ge=0, lt=2**62)]]
    validated: Validated | None = None
    drawn: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to resume: trained weights, optimizer tensors, the state, and extra weights in ``kept``."""

    model: Tensors
    optimizer: Tensors
    state: State
    kept: Tensors = field(default_factory=dict)

    def files(self) -> dict[str, Tensors]:
        """The contents of each safetensors file."""
        files = {"model.safetensors": self.model, "optimizer.safetensors": self.optimizer}
        return files | ({KEPT: self.kept} if self.kept else {})


class CheckpointWriter:
    """Writes checkpoints from a background thread during training; keeps the newest ``keep``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, number: int, checkpoint: Checkpoint) -> None:
        """Wait for the previous write, copy everything to host memory, and write it in the background.

        Raises:
            ArtifactError: the previous write failed.
        """
        self.finish()
        # Training goes on updating the journal's totals in the state during the write.
        state = checkpoint.state.model_copy(deep=True)
        copied = Checkpoint(_copied(checkpoint.model), _copied(checkpoint.optimizer), state, _copied(checkpoint.kept))
        self._pending = self._thread.submit(self._write, number, copied)

    def failed(self) -> bool:
        """Whether the pending write has failed already; :meth:`finish` raises its error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait for the pending write.

        Raises:
            ArtifactError: it failed; the last good checkpoint is still there.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, number: int, checkpoint: Checkpoint) -> None:
        final = self._folder / f"step-{number:08d}"
        temporary = self._folder / f".{final.name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            # save_file writes the tensors directly, without a serialised copy in memory.
            for name, tensors in checkpoint.files().items():
                save_file(tensors, temporary / name)
            (temporary / "state.json").write_text(_as_json(checkpoint.state), encoding="utf-8")
            names = [*checkpoint.files(), "state.json"]
            for name in names:
                copy_mode(temporary / "state.json", temporary / name)
                sync_file(temporary / name)
            write_bytes(temporary / "manifest.json", json.dumps(_manifest(temporary, names), indent=2).encode())
            _check_contents(temporary, checkpoint)
            if exists(final):
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(self._folder)
        except (OSError, SafetensorError, ArtifactError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = one_line(error)
            raise ArtifactError(
                f"the checkpoint {str(final)!r} could not be written ({reason}): free some space or make the folder "
                "writable and run the same command again; it continues from the last good checkpoint."
            ) from None
        for old in sorted(_numbered(self._folder))[: -self._keep]:
            shutil.rmtree(old[1], ignore_errors=True)


def _as_json(state: State) -> str:
    return json.dumps(state.model_dump(), indent=2)


def _copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _manifest(folder: Path, names: list[str]) -> dict[str, Any]:
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    return {"format": 1, "files": entries}


def _check_contents(folder: Path, checkpoint: Checkpoint) -> None:
    """Compare the files with memory: their hashes only describe what was written, right or wrong.

    Done after hashing, and piecewise, as a second copy of all tensors might not fit into memory.

    Raises:
        ArtifactError: a file does not read back as it was written.
    """
    same = (folder / "state.json").read_text(encoding="utf-8") == _as_json(checkpoint.state)
    wrong = [] if same else ["state.json"]
    wrong += [name for name, tensors in checkpoint.files().items() if not holds(folder / name, tensors)]
    if wrong:
        raise ArtifactError(f"{wrong[0]} does not read back as it was written")


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    if not is_folder(folder):
        return
    with os_errors(f"{str(folder)!r} cannot be listed", fix="make it readable"):
        paths = list(folder.iterdir())
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match:
            yield int(match[1]), path


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and a sentence about each newer one that is damaged.

    Damaged checkpoints are renamed: otherwise they would count towards the number to keep.
    """
    problems: list[str] = []
    for _, path in sorted(_numbered(folder), reverse=True):
        problem = verify(path)
        if problem is None:
            return path, problems
        aside = _set_aside(path)
        problems.append(
            f"the checkpoint {str(path)!r} is damaged ({problem}): using the one before it; this one is now {aside!r}."
        )
    return None, problems


def set_aside_above(folder: Path, number: int) -> list[str]:
    """Rename all checkpoints with higher numbers, which would count as newer than the next ones; their new names."""
    return [_set_aside(path, "left") for found, path in sorted(_numbered(folder)) if found > number]


def _set_aside(path: Path, why: str = "damaged") -> str:
    """Rename a checkpoint if possible; returns its (new) name."""
    number, aside = 1, path.with_name(f"{why}-{path.name}")
    while exists(aside):
        number, aside = number + 1, path.with_name(f"{why}-{path.name}-{number}")
    try:
        path.rename(aside)
    except OSError:
        return path.name
    return aside.name


def verify(path: Path) -> str | None:
    """Check sizes and hashes; returns what is wrong, or None. File names in the manifest are never trusted as paths."""
    try:
        manifest = read_json(path / "manifest.json")
        for name in (*FILES, KEPT) if KEPT in manifest["files"] else FILES:
            entry = manifest["files"][name]
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has the wrong size"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} has the wrong SHA-256"
    except ArtifactError as error:
        return str(error)
    except (KeyError, TypeError):
        return "manifest.json is not a manifest"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    return None


def read_state(path: Path) -> State:
    """The state in a checkpoint, without its tensors; see :func:`load_checkpoint`."""
    try:
        return State.model_validate(read_json(path / "state.json"))
    except ValidationError as error:
        field, why = first_problem(error)
        raise ArtifactError(f"{str(path / 'state.json')!r} is damaged ({field or 'state'}: {why}).") from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that :func:`verify` has accepted.

    Raises:
        ArtifactError: the hashes match, but the contents are not what this version writes.
    """
    state = read_state(path)
    kept = read_tensors(path / KEPT) if KEPT in read_json(path / "manifest.json")["files"] else {}
    model, optimizer = (read_tensors(path / name) for name in ("model.safetensors", "optimizer.safetensors"))
    return Checkpoint(model, optimizer, state, kept)


def check_fits(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Check that a checkpoint matches the model and optimizer, before any of it is loaded.

    Raises:
        ArtifactError: a tensor is missing, unexpected or of the wrong shape; names the first one.
    """
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        f"{number}.{name}": weight.shape if name != "step" else torch.Size()
        for number, weight in enumerate(parameters)
        for name in ("step", "exp_avg", "exp_avg_sq")
    }
    # The optimizer has no state before its first step.
    pairs = [(checkpoint.model, {name: weight.shape for name, weight in weights.items()})]
    pairs += [(checkpoint.optimizer, moments)] if checkpoint.optimizer else []
    for found, expected in pairs:
        check_shapes(found, expected, "the model")


def check_shapes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], what: str) -> None:
    """Check the names and shapes of a checkpoint's tensors; ``what`` is their owner, for the error message.

    Raises:
        ArtifactError: a tensor is missing, unexpected or of the wrong shape; names the first one.
    """
    shapes = {name: tensor.shape for name, tensor in found.items()}
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise ArtifactError(
            f"the checkpoint's {wrong[0]!r} does not match {what}: it belongs to another run; restore the "
            "checkpoints folder, or start over with --fresh."
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's state flattened to ``"{parameter index}.{name}"``, with the optimizer's own parameter indices."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Inverse of :func:`optimizer_tensors`. The learning rate is not restored: the schedule sets it."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
