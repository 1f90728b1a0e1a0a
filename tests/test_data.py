"""Images: what decodes to what, what cannot be used and why, what a folder holds, and the loader's batches."""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from images import noise, write_images
from PIL import ExifTags, Image, UnidentifiedImageError

from trajdist.cli import main
from trajdist.data.decode import decode, open_image, to_square
from trajdist.data.drawing import DefectDraw
from trajdist.data.loader import ImageBatch, SlotDataset, build_loader, resolve_threads, resolve_workers
from trajdist.data.samples import SamplePhotos
from trajdist.data.sources import ImageFolder, open_sets, open_source
from trajdist.data.storage import Access, read_bytes
from trajdist.errors import DataError
from trajdist.sharding import Plan, Selection, Slots, digest


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(raw: bytes) -> np.ndarray:
    image = decode(raw)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("WEBP", {"quality": 95}),
    ],
)
def test_formats(kind, options):
    difference = np.abs(pixels(encode(noise(0), kind, **options)) - np.asarray(noise(0)))
    lossy = "quality" in options
    assert difference.mean() <= 3 * lossy


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_modes(mode):
    grey = Image.new("RGB", (8, 8), (128, 128, 128)).convert("L")
    image = Image.new("LAB", (8, 8), (137, 128, 128)) if mode == "LAB" else grey.convert(mode)
    # Pillow before 13 does not read back its own YCbCr unless it is compressed.
    shown = pixels(encode(image, "TIFF", compression="tiff_lzw"))
    assert np.ptp(shown.mean((0, 1))) <= 2, "grey stays grey"
    assert mode == "1" or np.abs(shown - 128).max() <= 2


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[0, 32768, 65535]], np.uint16), "PNG"),
        (np.array([[0, 32768, 65535]], np.uint16), "TIFF"),
        (np.array([[0, 32768, 65535]], np.int32), "TIFF"),
        (np.array([[0, 0.5, 1.0]], np.float32), "TIFF"),
        (np.array([[0, 128, 255]], np.float32), "TIFF"),
        (np.array([[0, 128, 255]], np.int32), "TIFF"),
    ],
)
def test_deep_greys_keep_their_range(values, kind):
    shown = pixels(encode(Image.fromarray(values), kind))
    assert np.abs(shown[0, :, 0] - [0, 128, 255]).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_each_level_of_sixteen_bits_becomes_the_nearest_of_eight(dtype):
    levels = np.arange(2**16).reshape(256, 256)
    shown = pixels(encode(Image.fromarray(levels.astype(dtype)), "TIFF"))[..., 0]
    assert np.array_equal(shown, np.rint(levels / 257))


def test_transparent_palette_keeps_its_colours():
    image = noise(0).quantize(16)
    opaque, transparent = (
        pixels(encode(image, "PNG", **options)) for options in ({}, {"transparency": bytes([0] * 16)})
    )
    assert np.array_equal(opaque, transparent)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = noise(0).resize((40, 24))
    turned = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert np.array_equal(pixels(encode(turned, "PNG", exif=exif)), np.asarray(upright))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]),
        ([0.0, 0.5, 1.0, np.inf], [0, 128, 255, 0]),
        ([-0.16, 0.5, 1.0, 1.16], [0, 128, 255, 255]),
        ([-40.0, 17.0, 255.0, 300.0], [0, 17, 255, 255]),
    ],
)
def test_floats_that_overshoot_or_are_no_numbers(values, expected):
    raw = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert pixels(raw)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.linspace(800, 4095, 200, dtype=np.float32), "floats lie in 800 to 4095:"),
        (np.linspace(-1, 1, 200, dtype=np.float32), "floats lie in -1 to 1:"),
        (np.linspace(-300, 255, 200, dtype=np.float32), "floats lie in -300 to 255:"),
        (np.append(np.linspace(0, 1, 199, dtype=np.float32), np.float32(1.6)), "but the largest is 1.6:"),
        (np.append(np.linspace(0, 1, 199, dtype=np.float32), np.float32(200)), "but the largest is 200:"),
        (np.linspace(0, 2**20, 200).astype(np.int32), "integers lie in 0 to 1.04858e"),
        (np.linspace(-5, 200, 200).astype(np.int32), "integers lie in -5 to 200:"),
    ],
    ids=["camera", "normalised", "negative", "warm pixel", "hot pixel", "20 bits", "signed"],
)
def test_deep_greys_in_another_range_are_refused(values, said):
    """Clipped, all of them could look alike."""
    with pytest.raises(ValueError, match=re.escape(said)):
        decode(encode(Image.fromarray(values[None]), "TIFF"))


def test_a_dark_field_of_floats():
    values = np.full((20, 20), 4, np.float32)
    values[3, 5] = 250
    shown = pixels(encode(Image.fromarray(values), "TIFF"))[..., 0]
    assert np.array_equal(shown, values)


@pytest.mark.parametrize(
    ("exif", "kind"),
    [(b"Exif\0\0" + b"\0" * 40, "JPEG"), (b"Exif\0\0II*\0\xff\xff\xff\xff", "JPEG"), (b"garbage", "PNG")],
)
def test_damaged_metadata_make_no_bad_picture(exif, kind):
    image = noise(0, 40)
    assert pixels(encode(image, kind, exif=exif, dpi=(72, 72))).shape == (40, 40, 3)


def test_an_image_is_turned_whose_other_metadata_cannot_be_kept():
    """Its resolution unit is text, which Pillow reads but does not write."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.0
    raw = encode(noise(0, 40).crop((0, 0, 40, 20)), "JPEG", exif=exif)
    at = raw.index(b"\x1a\x01\x05\x00") if b"\x1a\x01\x05\x00" in raw else raw.index(b"\x01\x1a\x00\x05")
    spoilt = raw[: at + 2] + raw[at + 2 : at + 4].replace(b"\x05", b"\x02") + raw[at + 4 :]
    assert decode(raw).size == decode(spoilt).size == (20, 40)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"])
def test_no_picture_runs_a_program(content, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(UnidentifiedImageError):
        decode(content)


def test_large_jpegs_are_decoded_small_to_nearly_the_same():
    raw = encode(noise(0, 1024), "JPEG", quality=95)
    assert decode(raw, 64).size == (128, 128)
    whole, small = (to_square(decode(raw, size), 64, "squash").astype(int) for size in (None, 64))
    assert np.abs(whole - small).mean() < 2


def test_squash_keeps_every_place_crop_keeps_the_aspect():
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    assert to_square(image, 30, "squash")[:, :9].min() > 250
    assert to_square(image, 30, "crop")[:, 2:].max() < 5
    assert to_square(image, 30, "squash").shape == (30, 30, 3)


@pytest.mark.parametrize("shape", [(96, 96), (201, 90), (90, 201), (33, 20)])
def test_resized_as_pillow_does_to_one_level(shape):
    """The filter is Pillow's; a crop takes whole pixels, where Pillow's own would shift by half of one."""
    image = noise(3, 120).resize(shape)
    side = min(shape)
    left, top = (shape[0] - side) // 2, (shape[1] - side) // 2
    expected = {"squash": image, "crop": image.crop((left, top, left + side, top + side))}
    for fit, part in expected.items():
        pillow = np.asarray(part.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(to_square(image, 64, fit).astype(int) - pillow).max() <= 1


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 47)
    with pytest.raises(Image.DecompressionBombWarning):
        decode(encode(noise(0), "PNG"))


@pytest.mark.filterwarnings("ignore")
def test_threads_refuse_decompression_bombs_too(monkeypatch):
    """Filters of warnings are the process's: the first would take its own away before the second opens its picture."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 47)
    bomb, turns, second_came, first_left = encode(noise(0), "PNG"), count(), threading.Event(), threading.Event()

    def in_turn(raw: bytes) -> Image.Image:
        if next(turns):
            second_came.set()
            first_left.wait(30)
        else:
            second_came.wait(0.5)
        return open_image(raw)

    def is_refused(raw: bytes) -> bool:
        try:
            decode(raw)
        except Image.DecompressionBombWarning:
            return True
        finally:
            first_left.set()
        return False

    monkeypatch.setattr("trajdist.data.decode.open_image", in_turn)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(is_refused, [bomb, bomb])) == [True, True]


@pytest.fixture
def spoilt(tmp_path) -> ImageFolder:
    """Two good images among four that cannot be used."""
    write_images(tmp_path, 2)
    whole = encode(noise(0, 200), "JPEG")
    bad = {"empty.png": b"", "text.jpg": b"<html>no image</html>", "short.jpg": whole[: len(whole) // 2]}
    for name, raw in bad.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "gone.png").write_bytes(b"x")
    folder = ImageFolder(tmp_path, "data.imagenet.path")
    (tmp_path / "gone.png").unlink()
    return folder


def test_bad_files_are_empty_slots_with_reasons(spoilt):
    batch = SlotDataset(spoilt, lambda epoch, positions: positions, 32, "squash")[Slots(0, 0, 6, 8)]
    assert batch.weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert batch.images.shape == (8, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.images[2:] == 128).all()
    assert batch.images[:2].float().std() > 10
    assert int(batch.digest) == digest(np.array([0, 1]))
    reasons = {spoilt.name(index): reason for index, reason in batch.failures}
    assert set(reasons) == {"empty.png", "gone.png", "short.jpg", "text.jpg"}
    assert "the file is empty" in reasons["empty.png"]
    assert "cannot identify image file" in reasons["text.jpg"]
    assert "truncated" in reasons["short.jpg"]
    assert "No such file" in reasons["gone.png"]
    assert not any("\n" in reason or "0x" in reason for reason in reasons.values())


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "endless.png")
    with pytest.raises(OSError, match="not a regular file"):
        ImageFolder(tmp_path, "key").read(0)
    make(tmp_path / "endless.tar")
    with pytest.raises(DataError, match="not a regular file"):
        open_source(str(tmp_path / "endless.tar"), "key")


def failing_open(times: int, number: int):
    """``os.open`` that fails ``times`` times; and the list of its calls."""
    calls: list[Path] = []

    def opened(path: Path, flags: int) -> int:
        calls.append(path)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return os.open(path, flags)

    return opened, calls


@pytest.mark.parametrize(
    ("times", "number", "tries", "succeeds"),
    [(2, errno.EIO, 3, True), (3, errno.ESTALE, 4, True), (4, errno.EIO, 4, False), (1, errno.ENOENT, 1, False)],
)
def test_passing_errors_are_tried_again(tmp_path, monkeypatch, times, number, tries, succeeds):
    (tmp_path / "x").write_bytes(b"whole")
    opened, calls = failing_open(times, number)
    pauses: list[float] = []
    monkeypatch.setattr("trajdist.data.storage.open_regular", opened)
    monkeypatch.setattr("time.sleep", pauses.append)
    if succeeds:
        assert read_bytes(tmp_path / "x", retries=3) == b"whole"
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            read_bytes(tmp_path / "x", retries=3)
    assert len(calls) == tries
    assert pauses == sorted(set(pauses)), "pauses grow"
    assert len(pauses) == tries - 1


def test_folder_listing(tmp_path):
    root = tmp_path / "set"
    write_images(root / "b", 2)
    write_images(root / "a" / "deep", 1)
    write_images(root / ".hidden", 1)
    (root / ".secret.png").write_bytes(b"x")
    (root / "notes.txt").write_text("no image")
    (root / "UPPER.JPG").write_bytes(b"x")
    write_images(tmp_path / "elsewhere", 1)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "loop").symlink_to(root)
    folder = ImageFolder(root, "key")
    names = [folder.name(index) for index in range(len(folder))]
    assert names == ["UPPER.JPG", "a/deep/0000.png", "b/0000.png", "b/0001.png", "linked/0000.png"]
    assert folder.load(1, None).size == (48, 48)
    (root / "b" / "0001.png").rename(root / "b" / "0002.png")
    assert ImageFolder(root, "key").fingerprint != folder.fingerprint


def test_a_stamp_asks_for_many_files_at_a_time_and_keeps_their_order(tmp_path, monkeypatch):
    """On a network file system each answer takes up to a millisecond: 1.3 million of them, half an hour."""
    write_images(tmp_path, 4)
    folder = ImageFolder(tmp_path, "key")
    (tmp_path / "0002.png").unlink()
    expected = hashlib.sha256(os.fsencode(tmp_path.resolve()))
    for number in range(4):
        file = tmp_path / f"{number:04d}.png"
        facts = f"{file.stat().st_size} {file.stat().st_mtime_ns}" if file.exists() else "none"
        expected.update(f"{facts}|".encode())
    stat, two = os.stat, threading.Barrier(2, timeout=10)

    def only_two_at_once(path: object, **options: object) -> os.stat_result:
        if str(path).endswith(".png"):
            two.wait()
        return stat(path, **options)

    monkeypatch.setattr("trajdist.data.sources.PART", 1)
    monkeypatch.setattr(os, "stat", only_two_at_once)
    assert folder.stamp() == expected.hexdigest()


def test_names_that_are_no_unicode(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encode(noise(0), "PNG"))
    assert ImageFolder(tmp_path, "key").load(0, None).size == (48, 48)


def test_one_file_that_is_no_picture_is_none(tmp_path):
    (tmp_path / "notes.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="holds no images"):
        open_source(str(tmp_path / "notes.zip"), "key")


def test_the_home_of_an_unknown_user(tmp_path):
    with pytest.raises(DataError, match="'~nosuchuser/images' does not exist"):
        open_source("~nosuchuser/images", "key")


def test_one_image_is_a_source(tmp_path):
    write_images(tmp_path, 2)
    source = open_source(str(tmp_path / "0001.png"), "IMAGES")
    assert (len(source), source.name(0)) == (1, "0001.png")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (["a.gif", "b.GIF", "deeper/c.gif"], "3 files with other endings (.gif) are left out"),
        (["a.gif"], "1 file with another ending (.gif) is left out"),
        (
            ["a.gif", "b.gif", "a.psd", "b.psd", "a.jp2", "a.tga"],
            "6 files with other endings (.gif, .psd, .jp2, ...) are left out",
        ),
    ],
)
def test_pictures_in_formats_that_do_not_count_are_told(tmp_path, capsys, others, words):
    source = open_source(str(fill(tmp_path, "one.jpg", "two.TIFF", *others)), "data.imagenet.path")
    assert list(map(source.name, range(len(source)))) == ["one.jpg", "two.TIFF"]
    told = capsys.readouterr().err
    assert told.startswith(f"trajdist: data.imagenet.path={str(tmp_path)!r}: {words}")
    assert told.count("\n") == 1


def test_labels_notes_and_hidden_files_are_no_news(tmp_path, capsys):
    fill(tmp_path, "one.jpg", "one.txt", "one.json", "labels.csv", "README.md", "one.cls", "one.xml", "LICENSE")
    open_source(str(fill(tmp_path, ".thumb.gif", ".cache/a.gif")), "key")
    assert capsys.readouterr().err == ""


def test_one_process_tells_of_pictures_that_are_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    open_source(str(fill(tmp_path, "one.jpg", "a.gif")), "key")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("path", "words"), [(None, "is not set"), ("/no/such/folder", "does not exist"), ("skimage:cats", "skimage:photos")]
)
def test_no_source(path, words):
    with pytest.raises(DataError, match=words) as caught:
        open_source(path, "data.domain.path")
    assert "data.domain.path" in str(caught.value)


def batches(folder: ImageFolder, workers: int, plan: Plan, cursor: int = 0, **more) -> list[ImageBatch]:
    selection = Selection.draw(len(folder), -1, 0.0, 0, 1)
    dataset = SlotDataset(folder, selection.train, 32, "squash", **more)
    loader = build_loader(dataset, plan, cursor=cursor, num_workers=workers, pin_memory=False)
    made = list(loader)
    assert len(made) == len(loader)
    return made


def assert_same(left: list[ImageBatch], right: list[ImageBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(one[field], other[field]) for field in range(3))
        assert one.failures == other.failures


def test_workers_give_the_same_batches(spoilt):
    plan = Plan(num_images=6, num_epochs=2, global_batch=4, world=1, batch_size=4)
    alone = batches(spoilt, 0, plan)
    assert_same(alone, batches(spoilt, 2, plan))
    assert [int(batch.weights.sum()) + len(batch.failures) for batch in alone] == [4, 2, 4, 2]
    assert_same(alone[2:], batches(spoilt, 0, plan, cursor=6))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned")
def test_workers_are_forked_whatever_python_does_by_default(spoilt):
    """As since Python 3.14. Only a forked worker knows what cannot be pickled."""
    default = multiprocessing.get_start_method()
    plan = Plan(num_images=4, num_epochs=1, global_batch=4, world=1, batch_size=4)
    dataset = SlotDataset(spoilt, lambda epoch, positions: positions, 32, "squash")
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert len(list(build_loader(dataset, plan, num_workers=1, pin_memory=False))) == 1
    finally:
        multiprocessing.set_start_method(default, force=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_leave_signals_to_the_training_process(spoilt, number):
    """A scheduler may send them to all processes of a job; the batch under way is still needed."""

    def signalled(epoch: int, positions: np.ndarray) -> np.ndarray:
        signal.raise_signal(number)
        return positions

    plan = Plan(num_images=2, num_epochs=1, global_batch=2, world=1, batch_size=2)
    dataset = SlotDataset(spoilt, signalled, 32, "squash")
    (batch,) = build_loader(dataset, plan, num_workers=1, pin_memory=False)
    assert batch.weights.tolist() == [1, 1]


def test_threads_give_the_same_batches(spoilt):
    plan = Plan(num_images=6, num_epochs=2, global_batch=4, world=1, batch_size=4)
    defects = DefectDraw(4, seed=0, phase=2)
    for more in ({}, {"defects": defects}):
        alone, together = (batches(spoilt, 0, plan, threads=threads, **more) for threads in (0, 3))
        assert_same(alone, together)
    drawn = [torch.cat([batch.coverage for batch in each]) for each in (alone, together)]
    assert torch.equal(*drawn)
    assert drawn[0].any()


@pytest.mark.parametrize(("setting", "workers", "threads"), [("auto", 0, 2), ("auto", 3, 0), (0, 0, 0), (3, 3, 0)])
def test_threads_read_where_auto_leaves_no_room_for_workers(monkeypatch, setting, workers, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert resolve_threads(setting, workers) == threads


@pytest.mark.parametrize(
    ("setting", "local_world", "device", "workers"),
    [("auto", 1, "cuda", 16), ("auto", 8, "cuda", 7), ("auto", 8, "cpu", 6), ("auto", 64, "cpu", 0), (3, 64, "cpu", 3)],
)
def test_workers_take_the_processors_that_nobody_computes_on(monkeypatch, setting, local_world, device, workers):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("trajdist.data.loader.processors", lambda: 64)
    assert resolve_workers(setting, local_world, device) == workers


def test_held_out_crops_do_not_touch_the_others():
    sources = [SamplePhotos(f"skimage:gravel{part}", "key") for part in ("", "/heldout")]
    boxes = [[source._box((512, 512), 0, crop) for crop in range(len(source))] for source in sources]
    assert max(right for _, _, right, _ in boxes[0]) <= min(left for left, *_ in boxes[1])
    assert len({source.fingerprint for source in sources}) == 2
    assert np.array_equal(*(np.asarray(source.load(3, None)) for source in [sources[0]] * 2))


def test_a_folder_with_too_long_a_name(tmp_path):
    with pytest.raises(DataError, match="does not exist, or may not be read"):
        open_source(str(tmp_path / ("a" * 300)), "key")


def test_no_path_is_no_labelled_set(tmp_path, monkeypatch):
    """Whatever the folder holds that the command is started in."""
    for part in ("test", "ground_truth"):
        (tmp_path / part).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is not set"):
        open_sets({"imagenet": None}, Access())


@pytest.mark.parametrize("parts", [("test/good", "test/hole"), ("test/good", "ground_truth/hole")])
@pytest.mark.parametrize("above", ["set", "."])
def test_a_labelled_set_is_not_trained_on(parts, above, tmp_path, capsys):
    """With masks or without; nor is a folder of such sets."""
    for part in ("train/good", *parts):
        write_images(tmp_path / "all" / "set" / part, 2)
    path = f"data.imagenet.path={tmp_path / 'all' / above}"
    assert main(["train", "debug", path, f"run_dir={tmp_path / 'run'}"]) == 3
    assert str(tmp_path / "all/set/train/good") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folders", "path", "told"),
    [
        (("tin/test_public/good", "tin/test_public/ground_truth/bad"), "", r"contains '.*test_public', .* images\.$"),
        (("01/train/ok", "01/test/ok", "01/test/ko"), "01", r"contains '.*01/test', .*, as in '.*01/train/ok'\.$"),
        (("01/train/ok", "01/test/ok", "01/test/ko"), "01/test", r" is a labelled set, .*, as in '.*01/train/ok'\.$"),
        (
            ("a/Data/Images/Normal", "a/Data/Images/Anomaly", "a/Data/Masks/Anomaly"),
            "a",
            r"as in '.*/Images/Normal'\.$",
        ),
        (("Images/Normal", "Images/Anomaly"), "Images", r" is a labelled set, .*, as in '.*/Images/Normal'\.$"),
    ],
)
def test_labelled_sets_in_other_layouts_are_not_trained_on(folders, path, told, tmp_path):
    for folder in folders:
        write_images(tmp_path / "sets" / folder, 1)
    with pytest.raises(DataError, match=told):
        open_sets({"domain": str(tmp_path / "sets" / path)}, Access())
    assert len(open_sets({"domain": str(tmp_path / "sets" / folders[0])}, Access())["domain"]) == 1


def test_folders_of_such_names_without_defects_are_no_labelled_set(tmp_path):
    for folder in ("train/good", "train/bad", "val/good", "test/good", "Images"):
        write_images(tmp_path / folder, 1)
    for folder in ("ground_truth", "Masks"):  # Annotations of another kind.
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.json").write_text("{}")
    assert len(open_sets({"imagenet": str(tmp_path)}, Access())["imagenet"]) == 5
    assert len(open_sets({"domain": str(tmp_path / "test")}, Access())["domain"]) == 1
