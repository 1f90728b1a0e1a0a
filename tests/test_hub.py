"""Hugging Face data sets as a source."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import noise, write_images
from tars import encoded
from test_shards import run

from trajdist.data.hub import HubDataset
from trajdist.data.sources import open_source
from trajdist.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("cat", "dog"):
        write_images(tmp_path / "images" / name, 8)
    return tmp_path / "images"


def test_a_folder(images):
    source, folder = open_source(f"hf:imagefolder:{images}", "key"), open_source(str(images), "key")
    assert isinstance(source, HubDataset)
    assert [source.read(index) for index in range(16)] == [folder.read(index) for index in range(16)]
    assert source.name(9) == "00000009-0001.png"
    assert source.classes().tolist() == folder.classes().tolist()
    assert source.load(0, None).size == (48, 48)


@pytest.mark.parametrize("names", [["bus/0", "bus/test-1", "train/0"], ["IMG_0", "train_station_2", "val/x"]])
def test_names_that_are_those_of_splits(names, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, name in enumerate(names):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(tmp_path / "images" / f"{name}.png")
    source = open_source(f"hf:imagefolder:{tmp_path / 'images'}", "key")
    assert len(source) == 3
    assert len({source.read(index) for index in range(3)}) == 3


def test_a_row_without_an_image_is_a_bad_image(tmp_path):
    rows = [{"bytes": encoded(0), "path": "a.png"}, None]
    data = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    data.save_to_disk(str(tmp_path / "data"))
    source = open_source(f"hf:{tmp_path / 'data'}", "key")
    assert [source.name(index) for index in range(2)] == ["00000000-a.png", "00000001"]
    assert source.read(0) == encoded(0)
    with pytest.raises(OSError, match="holds no image"):
        source.read(1)


def test_saved_to_disk_with_and_without_splits(images, tmp_path):
    data = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(tmp_path / "two"))
    assert len(open_source(f"hf:{tmp_path / 'one'}", "key")) == 16
    assert len(open_source(f"hf:{tmp_path / 'two'}:test", "key")) == 3
    with pytest.raises(DataError, match="has splits: add one of train, test"):
        open_source(f"hf:{tmp_path / 'two'}", "key")


def test_the_column_of_images_is_found_among_others(images, tmp_path):
    files = sorted(str(path) for path in images.rglob("*.png"))
    columns = {"text": ["x"] * 16, "photo": files, "number": list(range(16))}
    datasets.Dataset.from_dict(columns).cast_column("photo", datasets.Image()).save_to_disk(str(tmp_path / "data"))
    source = open_source(f"hf:{tmp_path / 'data'}", "key")
    assert source.load(3, None).size == (48, 48)
    assert source.classes() is None


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no images", "holds no images: its columns are text"),
        ("nothing", "is not a folder"),
        ("a name", "cannot be loaded"),
    ],
)
def test_no_source(tmp_path, what, words):
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(str(tmp_path / "data"))
    path = {
        "no images": f"hf:{tmp_path / 'data'}",
        "nothing": f"hf:imagefolder:{tmp_path / 'no'}",
        "a name": "hf:no/x:y",
    }
    with pytest.raises(DataError, match=words) as caught:
        open_source(path[what], "data.imagenet.path")
    assert "data.imagenet.path" in str(caught.value)


def test_training_on_it_is_training_on_the_folder(images, tmp_path, fresh_accelerate):
    assert run(f"hf:imagefolder:{images}", tmp_path / "hub") == run(images, tmp_path / "folder")


def test_images_without_a_label(images, tmp_path):
    files = sorted(str(path) for path in images.rglob("*.png"))[:3]
    columns = {"image": files, "label": [1, None, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "data"))
    assert open_source(f"hf:{tmp_path / 'data'}", "key").classes().tolist() == [1, -1, 0]
