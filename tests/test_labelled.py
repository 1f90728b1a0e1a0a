"""The MVTec layout: which images, what is wrong with them and where, and what is refused."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from references import shares_of_regions

from trajdist.data.decode import to_square
from trajdist.data.labelled import LabelledFolder
from trajdist.errors import DataError


def save(path: Path, pixels: np.ndarray, **how: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def picture(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A black picture with a white rectangle, and the mask of that."""
    pixels, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    pixels[height // 4 : height // 2, width // 2 :] = 255
    mask[height // 4 : height // 2, width // 2 :] = 255
    return pixels, mask


@pytest.fixture
def root(tmp_path) -> Path:
    """Two good images, a crack 60 x 80 with its mask, and a hole with a mask named like the image."""
    good, _ = picture(40, 40)
    save(tmp_path / "test/good/001.png", good)
    save(tmp_path / "test/good/000.png", good)
    pixels, mask = picture(60, 80)
    save(tmp_path / "test/crack/000.png", pixels)
    save(tmp_path / "ground_truth/crack/000_mask.png", mask)
    save(tmp_path / "test/hole/7.jpg", pixels)
    save(tmp_path / "ground_truth/hole/7.png", mask)
    return tmp_path


def test_images_kinds_and_names(root):
    folder = LabelledFolder(root, "DATASET")
    assert [folder.name(index) for index in range(len(folder))] == [
        "test/crack/000.png",
        "test/good/000.png",
        "test/good/001.png",
        "test/hole/7.jpg",
    ]
    assert [folder.kind(index) for index in range(4)] == ["crack", "good", "good", "hole"]
    assert folder.kinds == ["good", "crack", "hole"]
    assert folder.load(0, None).size == (80, 60)
    assert len(folder.fingerprint) == 64
    assert pickle.loads(pickle.dumps(folder)).name(3) == "test/hole/7.jpg"  # as worker processes get it


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("size", [20, 64, 200])
def test_a_mask_lies_on_its_image(root, fit, size):
    folder = LabelledFolder(root, "DATASET")
    for index in (0, 3):
        mask = folder.mask(index, size, fit)
        assert mask.shape == (size, size)
        assert mask.dtype == np.bool_
        bright = to_square(folder.load(index, None), size, fit)[..., 0] > 127
        assert (mask != bright).mean() < 0.03
        assert mask.any()


def test_a_good_image_has_an_empty_mask(root):
    mask = LabelledFolder(root, "DATASET").mask(1, 32, "squash")
    assert mask.shape == (32, 32)
    assert not mask.any()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_any_mode(root, mode):
    _, mask = picture(60, 80)
    deep = Image.fromarray((mask > 0).astype(np.uint16))  # 1 of 65,535
    image = deep if mode == "I;16" else Image.fromarray(mask).convert(mode)
    image.save(root / "ground_truth/crack/000_mask.png")
    read = LabelledFolder(root, "DATASET").mask(0, 80, "squash")
    np.testing.assert_array_equal(
        read, np.asarray(Image.fromarray(mask).resize((80, 80), Image.Resampling.NEAREST)) > 0
    )


def test_good_images_may_be_in_a_folder_ok(root):
    (root / "test/good").rename(root / "test/ok")
    folder = LabelledFolder(root, "DATASET")
    assert folder.kinds == ["good", "crack", "hole"]
    assert [(folder.name(index), folder.kind(index)) for index in (2, 3)] == [
        ("test/ok/000.png", "good"),
        ("test/ok/001.png", "good"),
    ]
    assert not folder.has_mask(2)


@pytest.mark.parametrize("name", ["000.bmp", "000_mask.PNG", "000_mask.tif", "000.TIFF"])
def test_masks_of_other_formats(root, name):
    (root / "ground_truth/crack/000_mask.png").unlink()
    save(root / "ground_truth/crack" / name, picture(60, 80)[1])
    assert LabelledFolder(root, "DATASET").mask(0, 64, "squash").mean() == pytest.approx(1 / 8, abs=0.01)


def test_clean_images_are_in_one_folder(root):
    shutil.copytree(root / "test/good", root / "test/ok")
    with pytest.raises(DataError, match=r"has images in test/good and in test/ok: put all clean images into one"):
        LabelledFolder(root, "DATASET")


def test_a_mask_in_a_format_that_loses_is_none(root):
    (root / "ground_truth/crack/000_mask.png").rename(root / "ground_truth/crack/000_mask.jpg")
    with pytest.raises(DataError, match=r"crack/000\.png' has no mask: add '.*crack/000_mask\.png'"):
        LabelledFolder(root, "DATASET")


def test_a_folder_of_masks_is_taken_together(root):
    (root / "ground_truth/crack/000_mask.png").unlink()
    parts = np.zeros((2, 60, 80), np.uint8)
    parts[0, :15, :20], parts[1, 30:, 40:] = 251, 7
    for number, part in enumerate(parts):
        save(root / f"ground_truth/crack/000/{number:03d}.png", part)
    (root / "ground_truth/crack/000/.000.png").write_bytes(b"metadata of a file manager")
    truth = LabelledFolder(root, "DATASET").truth(0, 60, "crop")
    expected = Image.fromarray(parts.max(0)).crop((10, 0, 70, 60))
    np.testing.assert_array_equal(truth.mask_SS, np.asarray(expected) > 0)
    assert truth.regions_SS.sum() == pytest.approx(2)


def test_a_folder_of_masks_that_do_not_fit(root):
    (root / "ground_truth/crack/000_mask.png").unlink()
    (root / "ground_truth/crack/000").mkdir()
    folder = LabelledFolder(root, "DATASET")
    with pytest.raises(DataError, match=r"crack/000' cannot be read \(ValueError: a folder without masks\)"):
        folder.mask(0, 64, "squash")
    save(root / "ground_truth/crack/000/0.webp", picture(60, 80)[1])
    with pytest.raises(DataError, match=r"crack/000' cannot be read \(ValueError: '0\.webp' in it is no mask: \.png"):
        folder.mask(0, 64, "squash")
    (root / "ground_truth/crack/000/0.webp").unlink()
    for number, (height, width) in enumerate([(60, 80), (30, 40)]):
        save(root / f"ground_truth/crack/000/{number}.png", picture(height, width)[1])
    with pytest.raises(DataError, match=r"crack/000' cannot be read \(ValueError: 2 masks of different sizes\)"):
        folder.mask(0, 64, "squash")


def test_two_images_do_not_share_a_mask(root):
    save(root / "test/crack/000.jpg", picture(60, 80)[0])
    told = (
        r"crack/000\.jpg' and '.*crack/000\.png' share the mask '.*crack/000_mask\.png': rename one image and give it"
    )
    with pytest.raises(DataError, match=told):
        LabelledFolder(root, "DATASET")


def test_a_mask_may_be_smaller_or_larger_than_its_image(root):
    folder = LabelledFolder(root, "DATASET")
    for height, width in ((30, 40), (15, 20), (600, 800), (31, 41)):
        save(root / "ground_truth/crack/000_mask.png", picture(height, width)[1])
        truth = folder.truth(0, 64, "crop")
        assert truth.mask_SS.any()
        assert truth.regions_SS.sum() == pytest.approx(1)


def test_a_thin_defect_is_one_region_whatever_the_size(root):
    mask = np.zeros((600, 800), np.uint8)
    mask[np.arange(500), np.arange(500)] = 255
    save(root / "ground_truth/crack/000_mask.png", mask)
    truth = LabelledFolder(root, "DATASET").truth(0, 64, "squash")
    assert shares_of_regions(truth.mask_SS).sum() != pytest.approx(1), "among the pixels it falls apart or vanishes"
    assert truth.regions_SS.sum() == pytest.approx(1)
    assert (truth.regions_SS > 0).sum() >= 60


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "turned"), [(6, True), (8, True), (3, False), (9, False)])
def test_an_image_on_its_side_has_an_upright_mask(root, ending, orientation, turned):
    pixels, _ = picture(60, 80)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    (root / "test/hole/7.jpg").unlink()
    save(root / f"test/hole/7.{ending}", np.ascontiguousarray(np.rot90(pixels)) if turned else pixels, exif=exif)
    assert LabelledFolder(root, "DATASET").load(3, None).size == (80, 60)
    assert LabelledFolder(root, "DATASET").mask(3, 64, "squash").any()


def test_no_test_folder(tmp_path):
    with pytest.raises(DataError, match=r"^DATASET=.* has no folder test: .*ground_truth"):
        LabelledFolder(tmp_path, "DATASET")


def test_a_bucket_is_named_as_it_was_written():
    with pytest.raises(DataError, match=r"^DATASET='s3://bucket/tile' is not a local folder: copy it to"):
        LabelledFolder("s3://bucket/tile", "DATASET")


def test_no_images(tmp_path):
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no images"):
        LabelledFolder(tmp_path, "DATASET")


def test_no_good_images(root):
    for path in (root / "test/good").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no images in test/good"):
        LabelledFolder(root, "DATASET")


def test_only_good_images(root):
    for kind in ("crack", "hole"):
        for path in (root / "test" / kind).iterdir():
            path.unlink()
    assert LabelledFolder(root, "DATASET").kinds == ["good"]


@pytest.mark.parametrize("stray", ["test/stray.png", "test/good/deeper/stray.png"])
def test_an_image_in_no_class_folder(root, stray):
    save(root / stray, picture(8, 8)[0])
    with pytest.raises(DataError, match=r"stray\.png' is not directly in a class folder"):
        LabelledFolder(root, "DATASET")


def test_a_defect_without_a_mask(root):
    (root / "ground_truth/hole/7.png").unlink()
    mend = r"add '.*ground_truth/hole/7_mask\.png', or move ground_truth away to measure images only\.$"
    with pytest.raises(DataError, match=rf"test/hole/7\.jpg' has no mask: {mend}"):
        LabelledFolder(root, "DATASET")


def test_a_defect_without_a_folder_of_masks(root):
    save(root / "test/stain/1.png", picture(8, 8)[0])
    with pytest.raises(DataError, match=r"stain/1\.png' has no mask"):
        LabelledFolder(root, "DATASET")


def test_a_mask_of_another_shape(root):
    folder = LabelledFolder(root, "DATASET")
    for height, width in ((60, 60), (80, 60)):
        save(root / "ground_truth/crack/000_mask.png", picture(height, width)[1])
        with pytest.raises(DataError, match=rf"is {width} x {height} pixels but its image 80 x 60: give the mask its"):
            folder.mask(0, 64, "squash")


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_a_mask_that_lies_on_its_side_like_the_file_of_its_image(root, ending):
    pixels, mask = picture(60, 80)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (root / "test/hole/7.jpg").unlink()
    save(root / f"test/hole/7.{ending}", np.ascontiguousarray(np.rot90(pixels)), exif=exif)
    save(root / "ground_truth/hole/7.png", np.ascontiguousarray(np.rot90(mask)))
    told = r"7\.png' is 60 x 80 pixels but its image 80 x 60 once it is upright by its EXIF orientation: turn the mask"
    with pytest.raises(DataError, match=told):
        LabelledFolder(root, "DATASET").mask(3, 64, "squash")


@pytest.mark.parametrize(
    ("what", "name"), [("mask", "ground_truth/crack/000_mask.png"), ("image", "test/crack/000.png")]
)
def test_a_damaged_mask_or_image(root, what, name):
    (root / name).write_bytes(b"not a picture")
    with pytest.raises(
        DataError, match=rf"^the {what} '{root / name}' cannot be read \(.*image file\): rest"
    ) as caught:
        LabelledFolder(root, "DATASET").mask(0, 64, "squash")
    assert "0x" not in str(caught.value)


def test_without_masks_only_images_are_labelled(root):
    fingerprint = LabelledFolder(root, "DATASET").fingerprint
    shutil.rmtree(root / "ground_truth")
    folder = LabelledFolder(root, "DATASET")
    assert folder.kinds == ["good", "crack", "hole"]
    assert not folder.has_masks
    assert folder.fingerprint != fingerprint
    assert not any(folder.mask(index, 32, "squash").any() for index in range(len(folder)))
