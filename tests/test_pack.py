"""``trajdist pack``: what goes in comes out, in order, whatever interrupts it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tarfile
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import psutil
import pytest
from images import noise, write_images
from jobs import launch, start
from PIL import Image
from tars import encoded, write_tar
from test_shards import run

from trajdist.cli import main
from trajdist.data.sources import open_source
from trajdist.tools import pack as packing
from trajdist.tools import preparation


def packed(source: Path, out: Path, *options: str) -> int:
    return main(["pack", str(source), str(out), "--workers", "1", *options])


def contents(path: Path) -> list[bytes]:
    source = open_source(str(path), "key")
    return [source.read(index) for index in range(len(source))]


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.tar"))}


@pytest.fixture
def images(tmp_path) -> Path:
    for name in ("cat", "dog"):
        write_images(tmp_path / "images" / name, 9)
    return tmp_path / "images"


def test_masks_are_not_packed(tmp_path, capsys):
    for part in ("test/good", "ground_truth/hole"):
        write_images(tmp_path / "set" / part, 2)
    assert packed(tmp_path / "set", tmp_path / "out") == 3
    assert "its masks would be packed as images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_as_they_are_with_class_and_key(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert packed(images, out, "--shard-size", "20KiB") == 0
    folder, shards = open_source(str(images), "key"), open_source(str(out), "key")
    assert contents(out) == contents(images)
    names = [shards.name(index).partition("/")[2] for index in range(len(shards))]
    assert names == [folder.name(index) for index in range(len(folder))]
    assert shards.classes().tolist() == folder.classes().tolist()
    assert len(shards.shard_sizes()) > 3
    assert all(path.stat().st_size <= 20 * 1024 for path in out.glob("*.tar"))
    record = json.loads((out / "pack.json").read_text())
    assert {shard["name"]: shard["sha256"] for shard in record["shards"]} == digests(out)
    told = " ".join(capsys.readouterr().out.split())
    assert "18 images of" in told
    assert "times as many" in told


@pytest.mark.parametrize("labels", [[417, 3, 988, 3], [7, 7, 7, 7]])
def test_labels_of_shards_stay_as_they_are(labels, tmp_path):
    members = {}
    for number, label in enumerate(labels):
        members |= {f"{number}.png": encoded(number), f"{number}.cls": str(label).encode()}
    write_tar(tmp_path / "tars" / "a.tar", members)
    assert packed(tmp_path / "tars", tmp_path / "out") == 0
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        classes = [tar.extractfile(member).read() for member in tar if member.name.endswith(".cls")]
    assert classes == [str(label).encode() for label in labels]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # It leaves its file open.
def test_webdataset_reads_them_alike(images, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    assert packed(images, tmp_path / "out") == 0
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    assert [sample["png"] for sample in samples] == contents(images)
    assert [sample["cls"] for sample in samples] == [b"0"] * 9 + [b"1"] * 9
    assert samples[9]["__key__"] == "dog/0000"


def test_scaled(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise(0, 300).save(folder / "large.png")
    noise(1, 300).resize((600, 100)).save(folder / "wide.jpg", quality=95)
    noise(2, 32).save(folder / "small.png")
    exif = Image.Exif()
    exif[0x112] = 6
    noise(3, 200).resize((400, 200)).save(folder / "turned.jpg", exif=exif)
    (folder / "zbroken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    assert packed(folder, out, "--short-side", "64") == 0
    source = open_source(str(out), "key")
    names = [source.name(index).partition("/")[2] for index in range(5)]
    assert names == ["large.jpg", "small.png", "turned.jpg", "wide.jpg", "zbroken.jpg"]
    sizes = [source.load(index, None).size for index in range(4)]
    assert sizes == [(64, 64), (32, 32), (64, 128), (384, 64)]
    assert source.read(1) == (folder / "small.png").read_bytes()
    assert source.read(4) == b"no image"
    bad = json.loads((out / "bad_images.jsonl").read_text())
    assert bad["image"] == "zbroken.jpg"
    assert "cannot identify" in bad["reason"]
    small = np.asarray(noise(0, 300).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(source.load(0, None)).astype(int) - small).mean() < 3


def test_keys_that_webdataset_would_mix_up(tmp_path):
    folder = write_images(tmp_path / "images", 1)
    raw = (folder / "0000.png").read_bytes()
    for name in ("a.1.png", "a.2.png", "a_1.png", "b.png", "b.jpg"):
        (folder / name).write_bytes(raw)
    assert packed(folder, tmp_path / "out", "--workers", "1") == 0
    source = open_source(str(tmp_path / "out"), "key")
    assert [source.name(index).partition("/")[2] for index in range(len(source))] == [
        "0000.png",
        "a_1.png",
        "a_2.png",
        "a_1_2.png",
        "b.jpg",
        "b_2.png",
    ]


def test_any_number_of_workers_and_any_interruption_gives_the_same_shards(images, tmp_path, monkeypatch):
    options = ("--shard-size", "20KiB", "--short-side", "40")
    assert packed(images, tmp_path / "whole", *options) == 0
    assert main(["pack", str(images), str(tmp_path / "two"), "--workers", "2", *options]) == 0
    note, left = packing.Packing._note_shard, [2]

    def fail(self, path, named):
        if not left[0]:
            raise OSError(28, os.strerror(28))
        left[0] -= 1
        note(self, path, named)

    monkeypatch.setattr(packing.Packing, "_note_shard", fail)
    assert packed(images, tmp_path / "twice", *options) == 4
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "twice" / "pack.json").read_text())["shards"]) == 2
    (tmp_path / "twice" / ".shard-000002.tar.part").write_bytes(b"half")
    assert packed(images, tmp_path / "twice", *options) == 0
    os.truncate(tmp_path / "two" / "shard-000001.tar", 100)
    assert packed(images, tmp_path / "two", *options) == 0
    assert digests(tmp_path / "whole") == digests(tmp_path / "two") == digests(tmp_path / "twice")
    assert not list((tmp_path / "twice").glob(".*"))


def test_a_kill_between_the_list_of_bad_images_and_its_note_lists_none_twice(images, tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (images / name / "0004.png").write_bytes(b"spoilt")
    options = ("--shard-size", "20KiB", "--short-side", "16")
    with monkeypatch.context() as patched:
        note = packing.Packing._note

        def killed_before_the_first_shard_is_noted(self) -> None:
            if self.shards:
                raise OSError(28, os.strerror(28))
            note(self)

        patched.setattr(packing.Packing, "_note", killed_before_the_first_shard_is_noted)
        assert packed(images, tmp_path / "out", *options) == 4
    assert packed(images, tmp_path / "out", *options) == 0
    lines = [json.loads(line)["image"] for line in (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()]
    assert lines == ["cat/0004.png", "dog/0004.png"]


def test_a_killed_command_goes_on(tmp_path):
    write_images(tmp_path / "images", 600, side=200)
    command = ["pack", tmp_path / "images", tmp_path / "out", "--shard-size", "400KiB", "--short-side", "150"]
    job = start([*command, "--workers", "2"])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("shard-*.tar"))) < 2:
        assert time.monotonic() < deadline, "no shards come"
        time.sleep(0.01)
    workers = job.descendants()[1:]
    assert len(workers) >= 2
    job.signal(signal.SIGKILL)
    job.end()
    assert not psutil.wait_procs(workers, timeout=30)[1], "no worker is left behind"
    finished = launch([*command, "--workers", "2"])
    assert finished.returncode == 0, finished.stderr
    assert packed(tmp_path / "images", tmp_path / "whole", "--shard-size", "400KiB", "--short-side", "150") == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("other options", 2, "holds shards of other images or options"),
        ("other images", 2, "holds shards of other images or options"),
        ("foreign shard", 2, "holds 'mine.tar', none of its shards"),
        ("foreign shard of our name", 2, "holds 'shard-000000.tar', none of its shards"),
        ("foreign shard beside ours", 2, "holds 'mine.tar', none of its shards"),
        ("foreign shard of our name beside ours", 2, "holds 'shard-000099.tar', none of its shards"),
        ("into itself", 2, "is SOURCE, and would hold images as well as shards"),
        ("no files", 3, "has no image files to pack"),
        ("a file", 4, "cannot be written"),
        ("gone", 3, "cannot be read (gone): restore it"),
    ],
)
def test_refusals(images, tmp_path, capsys, monkeypatch, what, code, words):
    out = tmp_path / "out"
    source, options = images, ("--shard-size", "20KiB")
    if what.startswith("other"):
        assert packed(images, out, *options) == 0
        if what == "other options":
            options = ("--short-side", "16")
        else:
            (images / "cat" / "0000.png").write_bytes((images / "cat" / "0001.png").read_bytes())
    elif what.startswith("foreign shard"):
        if what.endswith("beside ours"):
            assert packed(images, out, *options) == 0
        out.mkdir(exist_ok=True)
        number = 99 if what.endswith("beside ours") else 0
        foreign = out / (f"shard-{number:06d}.tar" if "of our name" in what else "mine.tar")
        foreign.write_bytes(b"mine")
    elif what == "into itself":
        out = images / ".." / images.name
    elif what == "no files":
        source = "skimage:gravel"
    elif what == "a file":
        out.write_text("")
    else:
        monkeypatch.setattr("trajdist.data.sources.read_bytes", lambda *_: (_ for _ in ()).throw(OSError(5, "gone")))
    assert packed(source, out, *options) == code
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    if what.startswith("foreign shard"):
        assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize("noted", [None, "x", [{}], [{"name": 3}], {"name": "../images/cat/0000.png"}, {"images": 1.5}])
def test_a_damaged_record(images, tmp_path, capsys, noted):
    out = tmp_path / "out"
    assert packed(images, out, "--shard-size", "20KiB") == 0
    record = json.loads((out / "pack.json").read_text())
    shards = [record["shards"][0] | noted] if isinstance(noted, dict) else noted
    (out / "pack.json").write_text(json.dumps({**record, "shards": shards}))
    capsys.readouterr()
    assert packed(images, out, "--shard-size", "20KiB") == 4
    told = capsys.readouterr().err
    assert "pack.json' is damaged (shards" in told
    assert told.count("\n") == 1
    assert (images / "cat" / "0000.png").exists()


def test_a_disk_that_took_something_else(images, tmp_path, monkeypatch, capsys):
    add = packing._add
    monkeypatch.setattr(packing, "_add", lambda tar, name, content: add(tar, name, content[::-1]))
    assert packed(images, tmp_path / "out") == 4
    assert "does not read back" in capsys.readouterr().err
    assert not digests(tmp_path / "out")


def test_names_that_are_no_text(tmp_path):
    write_images(tmp_path / "images", 2)
    (tmp_path / "images" / "0000.png").rename(tmp_path / "images" / os.fsdecode(b"caf\xe9.png"))
    assert packed(tmp_path / "images", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "images")


def test_a_folder_whose_name_is_no_text(tmp_path):
    """Without a .cls it is the class."""
    write_images(tmp_path / "images" / os.fsdecode(b"caf\xe9"), 2)
    assert packed(tmp_path / "images", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "images")


def test_images_without_a_name(tmp_path):
    """They get the ending of what they are: shards know images by that."""
    datasets = pytest.importorskip("datasets")
    raw = [path.read_bytes() for path in sorted(write_images(tmp_path / "images", 3).iterdir())]
    rows = [{"bytes": content, "path": None} for content in [*raw, b"spoilt"]]
    data = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    data.save_to_disk(str(tmp_path / "data"))
    assert main(["pack", f"hf:{tmp_path / 'data'}", str(tmp_path / "out")]) == 0
    source = open_source(str(tmp_path / "out"), "key")
    assert [source.read(index) for index in range(4)] == [*raw, b"spoilt"]
    assert [source.name(index).rpartition("/")[2] for index in (0, 3)] == ["00000000.png", "00000003.jpg"]


@pytest.mark.parametrize(("size", "most"), [(10, 16), (100, 5), (400, 2), (1000, 2)])
def test_few_bytes_wait_to_be_written(monkeypatch, size, most):
    """However large the images are, however many the workers, and however slow the disk."""
    monkeypatch.setattr(preparation, "AHEAD_BYTES", 500)
    asked: list[int] = []

    class Pool:
        def submit(self, _work, part) -> Future:
            asked.extend(part)
            done: Future = Future()
            done.set_result([preparation.Packed(str(number), b"x" * size, size, None) for number in part])
            return done

    parts = [range(number, number + 1) for number in range(40)]
    waiting = []
    for number, image in enumerate(preparation._in_order(Pool(), parts, 16)):
        assert image.name == str(number)
        waiting.append(len(asked) - number)
    assert max(waiting) == most


def test_training_on_what_was_packed_is_training_on_the_folder(images, tmp_path, fresh_accelerate):
    assert packed(images, tmp_path / "out", "--shard-size", "20KiB") == 0
    assert run(tmp_path / "out", tmp_path / "shards") == run(images, tmp_path / "folder")


def test_shards_can_be_packed_anew(images, tmp_path):
    assert packed(images, tmp_path / "small", "--shard-size", "20KiB") == 0
    assert packed(tmp_path / "small", tmp_path / "large") == 0
    assert contents(tmp_path / "large") == contents(images)
    source = open_source(str(tmp_path / "large"), "key")
    assert source.name(9) == "shard-000000.tar/dog/0000.png"
    assert source.classes().tolist() == [0] * 9 + [1] * 9
