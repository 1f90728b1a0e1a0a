"""Tensors on disk: in safetensors, never pickle; written atomically.

trajdist's safetensors files may carry a JSON document under the metadata key ``trajdist``. It is the only key, as
safetensors writes several in random order. It holds the fingerprint of the tensors as well, because a weight with a
flipped bit is still a number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trajdist.errors import ArtifactError, one_line, os_errors
from trajdist.files import exists, is_file, write_bytes

METADATA_KEY = "trajdist"
# The document's key of that fingerprint.
_TENSORS = "tensors"
_PIECE = 2**24  # bytes


def fingerprint(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any] | None = None) -> str:
    """SHA-256, in hexadecimal, over names, dtypes, shapes and bytes of tensors, and over JSON facts."""
    digest = hashlib.sha256(json.dumps(facts or {}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any]) -> None:
    """Write tensors, and a JSON document in their metadata, atomically.

    Raises:
        ArtifactError: the file cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**document, _TENSORS: fingerprint(on_cpu)}, sort_keys=True)
    write_bytes(path, save(on_cpu, metadata={METADATA_KEY: text}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    with _reading(path), _opened(path) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        document = _document(handle)
    written = document.get(_TENSORS) if isinstance(document, dict) else None
    if written is not None and written != fingerprint(tensors):
        raise ArtifactError(f"{str(path)!r} is damaged: its tensors are not those that were written; restore it.")
    return tensors


def check_tensors(path: Path) -> None:
    """Check that the tensors of a file are those that were written, if it holds their fingerprint.

    Raises:
        ArtifactError: they are not, or the file is missing or damaged.
    """
    with _reading(path), _opened(path) as handle:
        document = _document(handle)
    if isinstance(document, dict) and _TENSORS in document:
        read_tensors(path)


def holds(path: Path, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a safetensors file holds exactly these CPU tensors, by name and byte for byte.

    The file is read in chunks, not memory-mapped: mapped pages would count as this process's memory.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            return entries.keys() == tensors.keys() and all(
                _same(file, 8 + length + entry["data_offsets"][0], tensors[name]) for name, entry in entries.items()
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def _same(file: BinaryIO, start: int, tensor: torch.Tensor) -> bool:
    """Compare bytes rather than values, so that a NaN equals itself."""
    file.seek(start)
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    pieces = (content[at : at + _PIECE] for at in range(0, len(content), _PIECE))
    return all(file.read(len(piece)) == piece for piece in pieces)


def read_document(path: Path) -> Any:
    """The JSON document in a safetensors file's metadata, or None.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    with _reading(path), _opened(path) as handle:
        document = _document(handle)
    if isinstance(document, dict):
        document.pop(_TENSORS, None)
    return document


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, list[int]]]]:
    """The metadata of a safetensors file, and the type and shape of each tensor by name; the tensors are not read.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    with _reading(path), _opened(path) as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return handle.metadata() or {}, {name: (it.get_dtype(), it.get_shape()) for name, it in parts.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, RecursionError) as error:
        raise _damaged(path, error) from None


def _document(handle: Any) -> Any:
    text = (handle.metadata() or {}).get(METADATA_KEY)
    return None if text is None else json.loads(text)


def _opened(path: Path) -> Any:
    """A safetensors file; the library itself would wait for a pipe."""
    if not is_file(path):
        raise FileNotFoundError(path)
    return safe_open(path, framework="pt")


def _damaged(path: Path, error: Exception) -> ArtifactError:
    if not is_file(path):
        return ArtifactError(f"{str(path)!r} {'is not a regular file' if exists(path) else 'does not exist'}.")
    # safetensors calls a file missing that it may not read.
    with os_errors(f"{str(path)!r} cannot be read", fix="make it readable"), open(path, "rb"):
        pass
    if "\ufffd" in os.fsencode(path).decode(errors="replace"):
        return ArtifactError(f"{str(path)!r} is not valid UTF-8, so safetensors cannot open it: rename the folder.")
    reason = one_line(error)
    return ArtifactError(f"{str(path)!r} is not a valid safetensors file ({reason}): restore it or make it again.")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU from this seed in the block; then they go on as before."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would also seed the GPUs, whose random state is not restored.
        torch.default_generator.manual_seed(seed)
        yield


def load_state(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load a state dict after checking names, shapes and dtypes against the module.

    Raises:
        ArtifactError: names the first tensor that is missing, unknown or of another shape or dtype.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            state = "lacks" if name not in tensors else "has an unknown"
            raise ArtifactError(f"{str(path)!r} {state} tensor {name!r}: it belongs to another model.")
        mine, theirs = expected[name], tensors[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise ArtifactError(
                f"{str(path)!r} has {name!r} as {theirs.dtype} {list(theirs.shape)}, "
                f"the model needs {mine.dtype} {list(mine.shape)}."
            )
    # assign=True: the module may be on the meta device, whose tensors have no storage to copy into.
    module.load_state_dict(dict(tensors), assign=True)
