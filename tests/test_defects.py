"""Drawn defects: their masks are the truth about them, and no image of the set was trained on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from images import write_images
from PIL import Image

from trajdist.data.defects import DEFECTS, SIDE, main, write_labelled
from trajdist.data.labelled import LabelledFolder
from trajdist.data.samples import COLLECTIONS, SamplePhotos
from trajdist.data.sources import open_source


@pytest.fixture(scope="module", params=["gravel", "photos"])
def source(request) -> SamplePhotos:
    return SamplePhotos(f"skimage:{request.param}/heldout", "source")


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("labelled")
    write_labelled(source, made)
    return made


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def pairs(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Kind, how much each pixel was changed in its most changed channel, mask."""
    found = []
    for path in sorted(folder.glob("ground_truth/*/*_mask.png")):
        name = path.name.replace("_mask", "")
        kind = path.parent.name
        change = np.abs(pixels(folder / "test" / kind / name) - pixels(folder / "test/good" / name)).max(-1)
        found.append((kind, change, pixels(path) > 0))
    return found


def test_the_set_is_in_mvtec_layout(source, folder):
    dataset = LabelledFolder(folder, "DATASET")
    assert dataset.kinds == ["good", *sorted(DEFECTS)]
    kinds = [dataset.kind(index) for index in range(len(dataset))]
    assert kinds.count("good") == len(source)
    assert {kinds.count(kind) for kind in DEFECTS} == {len(source) // 3}
    assert dataset.load(0, None).size == (SIDE, SIDE)


def test_every_defect_can_be_seen_and_is_small(folder):
    for kind, change, mask in pairs(folder):
        assert mask.shape == (SIDE, SIDE)
        assert 0.003 < mask.mean() < 0.1, kind
        assert change[mask].mean() > 8, kind
        assert change[mask].min() > 2, kind


def test_masks_cover_all_changed_pixels(folder):
    assert max(change[~mask].max() for _, change, mask in pairs(folder)) <= 2


def test_masks_survive_a_small_backbone(folder):
    """At 64 pixels no defect is lost to nearest-neighbour sampling."""
    dataset = LabelledFolder(folder, "DATASET")
    for index in range(len(dataset)):
        assert dataset.mask(index, 64, "squash").any() == (dataset.kind(index) != "good")


def test_the_set_is_the_same_every_time(source, folder, tmp_path):
    write_labelled(source, tmp_path)

    def digests(root: Path) -> dict[str, str]:
        files = (file for file in root.rglob("*") if file.is_file())
        return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    assert digests(tmp_path) == digests(folder)


def test_no_two_defects_are_alike(folder):
    masks = [mask.tobytes() for _, _, mask in pairs(folder)]
    assert len(set(masks)) == len(masks)


def test_good_images_are_the_crops_themselves(source, folder):
    for index in (0, len(source) - 1):
        crop = source.load(index, None).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(pixels(folder / f"test/good/{index:03d}.png"), np.asarray(crop))


@pytest.mark.parametrize("name", COLLECTIONS)
def test_no_held_out_crop_is_a_training_crop(name):
    training, held_out = SamplePhotos(f"skimage:{name}", "key"), SamplePhotos(f"skimage:{name}/heldout", "key")
    assert training.fingerprint != held_out.fingerprint
    names = [part.name(index) for part in (training, held_out) for index in range(len(part))]
    assert len(set(names)) == len(names)

    def thumbnails(part: SamplePhotos) -> set[bytes]:
        return {part.load(index, None).resize((8, 8)).tobytes() for index in range(0, len(part), 3)}

    assert not thumbnails(training) & thumbnails(held_out)


def test_written_again_the_files_stay_as_they_are(tmp_path):
    """An evaluation that goes on tells by their times whether they are the same."""
    source = open_source("skimage:gravel/heldout", "key")
    write_labelled(source, tmp_path)
    before = LabelledFolder(tmp_path, "DATASET").stamp()
    damaged = tmp_path / "test/good/000.png"
    whole = damaged.read_bytes()
    write_labelled(source, tmp_path)
    assert LabelledFolder(tmp_path, "DATASET").stamp() == before
    damaged.write_bytes(whole[:100])
    write_labelled(source, tmp_path)
    assert damaged.read_bytes() == whole


def test_as_a_command(tmp_path, monkeypatch, capsys):
    """The folder may lie at home: a shell script passes a ``~`` on as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([str(write_images(tmp_path / "images", 3)), "~/set"]) == 0
    assert LabelledFolder(tmp_path / "set", "DATASET").kinds == ["good", *sorted(DEFECTS)]
    assert main([str(tmp_path / "nowhere"), "~/set"]) == 3
    assert capsys.readouterr().err.startswith(f"trajdist: source={str(tmp_path / 'nowhere')!r} does not exist")
