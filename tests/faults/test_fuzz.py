"""Whatever bytes a file holds, reading it ends in a result or in one of our own sentences, in bounded memory."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from images import noise
from outcome import write_rows
from safetensors.torch import save

from trajdist.artifacts import METADATA_KEY, read_document, read_tensors
from trajdist.config_files import load_config
from trajdist.config_parsing import parse_config
from trajdist.data.decode import decode
from trajdist.data.loader import SlotDataset
from trajdist.errors import ArtifactError, ConfigError, UserError
from trajdist.extraction.backbones import build_backbone
from trajdist.runtime.memory import peak_memory_bytes, reset_peak_memory
from trajdist.saved import bundle
from trajdist.saved.checkpoint import FILES, load_checkpoint, verify
from trajdist.saved.lora import load_adapter
from trajdist.scoring.output import read_rows
from trajdist.sharding import Slots
from trajdist.tools.audit import audit
from trajdist.tools.inspection import inspect

bounded = settings(max_examples=60)
KEYS = st.sampled_from(["data", "imagenet", "path", "batch_size", "model", "seed", "train", "__class__"]) | st.text()
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def complaint(kind: type[UserError], read: Callable[..., object], *args: object) -> str:
    """What an error of this kind says; nothing where there is none. Any other error fails the test."""
    try:
        read(*args)
    except kind as error:
        return str(error)
    return ""


@bounded
@given(tree=st.dictionaries(KEYS, TREES, max_size=5))
def test_config_trees(tree):
    assert "\n" not in complaint(ConfigError, parse_config, tree)


@bounded
@given(raw=st.binary(max_size=200) | st.text(max_size=200).map(str.encode), override=st.text(max_size=40))
@example(raw=b"a: &a [*a]", override="=")
@example(raw=b"seed: !!python/object/apply:os.system ['false']", override="a.b")
def test_config_files(raw, override, folder):
    (folder / "config.yaml").write_bytes(raw)
    for overrides in ([], [override]):
        assert "\n" not in complaint(ConfigError, load_config, folder / "config.yaml", overrides)


@bounded
@given(manifest=TREES, state=TREES)
@example(manifest={"files": []}, state=[])
@example(manifest={"files": {name: {"bytes": 10**400, "sha256": None} for name in FILES}}, state={})
@example(manifest={"files": {"../../x": {"bytes": 0, "sha256": ""}}}, state={"cursor": 1e400})
def test_checkpoints(manifest, state, folder):
    """File names come from the program, never from a manifest."""
    for name in FILES:
        (folder / name).write_bytes(b"{}")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "state.json").write_text(json.dumps(state))
    assert verify(folder)
    with pytest.raises(ArtifactError):
        load_checkpoint(folder)


SOUND = save({"a": torch.zeros(3)}, metadata={METADATA_KEY: "{}"})


def with_header(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + bytes(64)


HUGE = {"a": {"dtype": "F64", "shape": [2**40, 2**20], "data_offsets": [0, 2**63]}}
SWOLLEN = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]}}
STRANGE = {"a": {"dtype": "PICKLE", "shape": "x", "data_offsets": None}, "__metadata__": [1]}
NESTED = b"[" * 100_000
# Valid but for its seed, which no generator takes.
SEED = {"backbone": "resnet18", "weights": "none", "seed": 10**30, "image_size": 32, "fit": "crop", "projection": "pca"}
SEED |= {"blocks": ["layer1.0"], "channels": [64], "spatial_resolution": 2, "feature_dim": 4, "num_images": 1}
SEED |= {"kind": "trajectory", "backbone_fingerprint": ""}
FILES_OF_STRANGERS = (
    st.binary(max_size=200)
    | TREES.map(lambda tree: with_header(json.dumps(tree).encode()))
    | st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)).map(
        lambda flip: SOUND[: flip[0]] + bytes([flip[1]]) + SOUND[flip[0] + 1 :]
    )
    | st.integers(0, len(SOUND)).map(lambda stop: SOUND[:stop])
)


@bounded
@given(raw=FILES_OF_STRANGERS)
@example(raw=b"")
@example(raw=with_header(b"{}", 2**63))
@example(raw=with_header(NESTED))
@example(raw=with_header(json.dumps(HUGE).encode()))
@example(raw=with_header(json.dumps(SWOLLEN).encode()))
@example(raw=with_header(json.dumps(STRANGE).encode()))
@example(raw=save({"a": torch.zeros(3)}, metadata={METADATA_KEY: "[" * 100_000}))
@example(raw=save({"a": torch.zeros(3)}, metadata={METADATA_KEY: json.dumps(SEED)}))
@example(raw=save({"a": torch.zeros(3)}, metadata={METADATA_KEY: '{"kind": "model", "hidden_dim": 1e9}'}))
def test_safetensors(raw, folder):
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    readers = [read_tensors, read_document, bundle.load_model, bundle.load_extractor, lambda path: list(inspect(path))]
    for read in readers:
        assert "\n" not in complaint(ArtifactError, read, path)


def test_a_hostile_header_takes_no_memory(folder):
    """It claims 2**63 bytes; the sum of what is read stays small."""
    path, device = folder / "huge.safetensors", torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    for header in (json.dumps(HUGE).encode(), json.dumps(SWOLLEN).encode()):
        path.write_bytes(with_header(header))
        with pytest.raises(ArtifactError, match="not a valid safetensors file"):
            read_tensors(path)
    with open(path, "wb") as sparse:
        sparse.truncate(2**33)
    with pytest.raises(ArtifactError, match="damaged: it has more than"):
        load_checkpoint_state(path)
    assert peak_memory_bytes(device) - before < 2**28


def load_checkpoint_state(path: Path) -> None:
    path.rename(path.with_name("state.json"))
    load_checkpoint(path.parent)


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    noise(0, 24).save(stream, kind)
    return stream.getvalue()


PICTURES = [encoded(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF")]


class OneImage:
    fingerprint = ""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "x"

    def load(self, index: int, size: int | None):
        return decode(self._raw, size)


@st.composite
def damaged_pictures(draw) -> bytes:
    raw = bytearray(draw(st.sampled_from(PICTURES)))
    for place in draw(st.lists(st.integers(0, len(raw) - 1), max_size=8)):
        raw[place] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))])


@pytest.mark.filterwarnings("ignore::UserWarning")
@bounded
@given(raw=st.binary(max_size=100) | damaged_pictures())
def test_image_bytes(raw):
    """An image is used whole or leaves an empty slot and a reason."""
    dataset = SlotDataset(OneImage(raw), lambda epoch, positions: np.zeros(len(positions), np.int64), 16, "crop")
    batch = dataset[Slots(0, 0, 1, 2)]
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.weights.tolist() == [0.0 if batch.failures else 1.0, 0.0]
    assert all("\n" not in reason for _, reason in batch.failures)


@bounded
@given(ledger=st.lists(TREES | st.fixed_dictionaries({"phase": st.integers(), "epoch": st.integers()}), max_size=4))
@example(
    ledger=[{"phase": 1, "epoch": 0, "start": 0, "stop": 4, "images": 2, "digest": 0, "missing": [-1, 10**30]}],
)
def test_ledgers(ledger, folder):
    (folder / "run.json").write_text(json.dumps({"imagenet": {"num_images": 5}}))
    (folder / "config.yaml").write_text("")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    assert bool(audit(folder).problems) == bool(ledger)


@bounded
@given(line=st.binary(max_size=60) | TREES.map(lambda tree: json.dumps(tree).encode()))
@example(line=b"caf\xe9")
@example(line=NESTED)
@example(line=b'{"image": "b.png"}')
@example(line=b'{"image": "b.png", "score": "high", "p_value": 0.5, "is_anomalous": false}')
@example(line=b'{"image": "b.png", "score": 1.5}')
@example(line=b'{"image": "b.png", "score": 1.5, "p_value": null, "is_anomalous": false}')
@example(line=b'{"image": "b.png", "score": null, "p_value": null, "is_anomalous": null}')
def test_rows_of_a_scoring(line, folder):
    write_rows(folder, [{"image": "a.png", "score": 1.5}, {"image": "b.png", "score": None}])
    with open(folder / "scores.jsonl", "ab") as handle:
        handle.write(line)
    said = complaint(ArtifactError, lambda: list(read_rows(folder)))
    assert bool(said) == bool(line)
    assert said.endswith("scores.jsonl' is damaged in line 3: restore it, or name another --out." if line else "")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self._folder),)


def test_a_pickle_runs_nothing(tmp_path):
    torch.save({"fc.weight": Trap(tmp_path / "trap")}, tmp_path / "weights.pt")
    with pytest.raises(ArtifactError, match=r"weights\.pt' is damaged, or not a state dict of tensors only: save"):
        build_backbone("resnet18", str(tmp_path / "weights.pt"), [], 64, 0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.save({"x": Trap(tmp_path / "trap")}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "trajdist:x"}))
    with pytest.raises(ArtifactError, match="does not exist"):
        load_adapter(torch.nn.Linear(1, 1), folder, "x")
    assert not (tmp_path / "trap").exists()
