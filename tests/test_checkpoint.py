"""How a checkpoint is written: without a second copy in memory, and for whoever may read the folder."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trajdist.artifacts import read_tensors
from trajdist.errors import ArtifactError
from trajdist.runtime.memory import memory_bytes, peak_memory_bytes, reset_peak_memory
from trajdist.saved import checkpoint as writing
from trajdist.saved.checkpoint import (
    FILES,
    KEPT,
    Books,
    Checkpoint,
    CheckpointWriter,
    State,
    Tensors,
    Totals,
    load_checkpoint,
    newest_checkpoint,
    verify,
)

CPU = torch.device("cpu")


def write(folder: Path, model: Tensors, optimizer: Tensors, kept: Tensors | None = None) -> Path:
    writer = CheckpointWriter(folder, keep=1)
    writer.save(7, Checkpoint(model, optimizer, State.model_construct(), kept or {}))
    writer.finish()
    path, problems = newest_checkpoint(folder)
    assert not problems
    assert path is not None
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are counted by Linux")
def test_memory_holds_one_copy(tmp_path):
    model = {str(number): torch.ones(2**23) for number in range(4)}
    optimizer = {f"{number}.{kind}": torch.ones(2**23) for number in range(4) for kind in ("exp_avg", "exp_avg_sq")}
    state_bytes = sum(tensor.nbytes for tensor in (*model.values(), *optimizer.values()))
    reset_peak_memory(CPU)
    before = memory_bytes(CPU)
    path = write(tmp_path, model, optimizer)
    assert peak_memory_bytes(CPU) - before < 1.3 * state_bytes
    assert verify(path) is None


def test_files_are_as_readable_as_each_other(tmp_path):
    path = write(tmp_path, {"a": torch.ones(3)}, {"0.step": torch.ones(())})
    modes = {stat.S_IMODE((path / name).stat().st_mode) for name in (*FILES, "manifest.json")}
    assert len(modes) == 1


def test_what_was_written_is_what_is_read(debug_run):
    path, problems = newest_checkpoint(debug_run / "checkpoints")
    assert not problems
    assert path is not None
    checkpoint = load_checkpoint(path)
    assert checkpoint.model
    assert {name.split(".")[1] for name in checkpoint.optimizer} == {"step", "exp_avg", "exp_avg_sq"}


def test_not_a_number_is_written_and_read_as_anything_else(tmp_path):
    path = write(tmp_path, {"a": torch.tensor([float("nan"), 1.0])}, {"0.step": torch.ones(())})
    assert read_tensors(path / "model.safetensors")["a"].isnan().tolist() == [True, False]


def test_a_file_that_is_not_what_was_in_memory_is_no_checkpoint(tmp_path, monkeypatch):
    """Hashes of what lies on the disk cannot know that the disk took something else than it was given."""
    good = write(tmp_path, {"a": torch.zeros(3)}, {"0.step": torch.ones(())})

    def one_bit_else(tensors: Tensors, path: Path, **options: object) -> None:
        save_file(tensors, path, **options)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(writing, "save_file", one_bit_else)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(8, Checkpoint({"a": torch.ones(3)}, {"0.step": torch.ones(())}, State.model_construct()))
    with pytest.raises(ArtifactError, match=r"model\.safetensors does not read back"):
        writer.finish()
    assert newest_checkpoint(tmp_path)[0] == good


def test_what_goes_on_while_a_checkpoint_is_written_is_not_in_it(tmp_path, monkeypatch):
    """Training goes on in the same books and the same weights."""
    books = Books(line=Totals.zero(), epoch=Totals.zero(), total=Totals.zero(), first_loss=1.0, final_loss=None)
    model, optimizer, kept = ({name: torch.ones(3)} for name in ("a", "0.step", "best.a"))

    def train_on(tensors: Tensors, path: Path, **options: object) -> None:
        books.total.images += 1
        for live in (model, optimizer, kept):
            next(iter(live.values())).add_(1)
        save_file(tensors, path, **options)

    monkeypatch.setattr(writing, "save_file", train_on)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(7, Checkpoint(model, optimizer, State.model_construct(journal=books), kept))
    writer.finish()
    path, problems = newest_checkpoint(tmp_path)
    assert not problems
    assert path is not None
    assert json.loads((path / "state.json").read_text())["journal"]["total"]["images"] == 0
    for name in ("model", "optimizer", "kept"):
        (value,) = read_tensors(path / f"{name}.safetensors").values()
        assert value.tolist() == [1.0] * 3, name


@contextmanager
def noting_syncs() -> Iterator[list[object]]:
    """What is made to survive a power cut in the block, as numbers that renames do not change, and the renames."""
    noted: list[object] = []
    fsync, rename = os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        noted.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noting_rename(path: Path, target: Path) -> Path:
        noted.append(target)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noting_fsync)
        patch.setattr(Path, "rename", noting_rename)
        yield noted


def assert_appeared_synced(folder: Path, noted: list[object]) -> None:
    """After a power cut at any time, a folder that was renamed is whole or not there; after the last sync, it is."""
    renamed = noted.index(folder)
    before, after = noted[:renamed], noted[renamed:]
    assert [path.name for path in (folder, *folder.iterdir()) if path.stat().st_ino not in before] == []
    assert folder.parent.stat().st_ino in after


def test_a_checkpoint_survives_a_power_cut(tmp_path):
    with noting_syncs() as noted:
        path = write(tmp_path, {"a": torch.ones(3)}, {"0.step": torch.ones(())}, {"best.a": torch.ones(3)})
    assert {file.name for file in path.iterdir()} == {*FILES, KEPT, "manifest.json"}
    assert_appeared_synced(path, noted)
