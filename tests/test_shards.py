"""Tar shards: what counts as an image, what is refused, what a stale index does, and the order of an epoch."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
import tarfile
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from images import noise, write_images
from jobs import launch, start, stop_after_lines
from tars import encoded, write_shards, write_tar

from trajdist.cli import main
from trajdist.data import storage
from trajdist.data.loader import SlotDataset, in_threads
from trajdist.data.shards import TarShards
from trajdist.data.sources import open_source
from trajdist.errors import DataError
from trajdist.sharding import Order, Selection, Slots, key64, permute_windows
from trajdist.tools.audit import audit

# Measured once. A change would give resumed runs another order than they began with.
GOLDEN = [10, 18, 12, 1, 5, 6, 9, 2, 3, 7, 15, 0]
GOLDEN_WINDOWS = [4, 3, 5, 7, 6, 0, 2, 1]
PIXELS = ("data.image_size=32", "runtime.mixed_precision=no")


def names(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def shards(path) -> TarShards:
    source = open_source(str(path), "data.imagenet.path")
    assert isinstance(source, TarShards)
    return source


def versions(source) -> list[int]:
    return [source.version(index) for index in range(len(source))]


def changed(before: list[int], after: list[int]) -> list[int]:
    return [index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]


def test_a_replaced_image_has_another_version(tmp_path):
    """Of the same size at another time, or of another size at the same; of one that is gone nothing can be told."""
    images = write_images(tmp_path / "images", 4)
    source = open_source(str(images), "key")
    before = versions(source)
    assert all(0 < version < 2**63 for version in before)
    assert versions(open_source(str(images), "key")) == before
    first, second = images / "0000.png", images / "0001.png"
    os.utime(first, ns=(0, 1))
    stat = second.stat()
    second.write_bytes(second.read_bytes() + b" ")
    os.utime(second, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert changed(before, versions(source)) == [0, 1]
    (images / "0003.png").unlink()
    assert source.version(3) == 0


def test_a_replaced_shard_gives_all_its_images_another_version(tmp_path):
    images = write_images(tmp_path / "images", 7)
    _, second, _ = write_shards(tmp_path / "tars", images, 3)
    before = versions(shards(tmp_path / "tars"))
    assert all(0 < version < 2**63 for version in before)
    os.utime(second, ns=(0, 1))
    assert changed(before, versions(shards(tmp_path / "tars"))) == [3, 4, 5]


def test_the_images_of_a_folder_in_its_order(tmp_path):
    images = write_images(tmp_path / "images", 7)
    write_shards(tmp_path / "tars", images, 3)
    folder, source = open_source(str(images), "key"), shards(tmp_path / "tars")
    assert names(source) == [f"set-{index // 3:06d}.tar/{index:04d}.png" for index in range(7)]
    assert [source.read(index) for index in range(7)] == [folder.read(index) for index in range(7)]
    assert source.shard_sizes() == [3, 3, 1]
    assert source.load(6, None).size == (48, 48)


@pytest.mark.parametrize(
    "pattern", ["set-{000000..000002}.tar", "set-*.tar", "set-00000{0,2,1}.tar", "{set-000000,set-00000[12]}.tar"]
)
def test_patterns(tmp_path, pattern):
    write_shards(tmp_path, write_images(tmp_path / "images", 6), 2)
    assert len(shards(tmp_path / pattern)) == 6


def test_one_shard(tmp_path):
    write_shards(tmp_path, write_images(tmp_path / "images", 6), 2)
    assert len(shards(tmp_path / "set-000001.tar")) == 2


@pytest.mark.parametrize("folder", ["set", "set [1]"])
@pytest.mark.parametrize("name", ["a [2].tar", "*.tar", "**/*.tar"])
def test_brackets_in_names_that_exist_are_no_pattern(tmp_path, folder, name):
    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 2), 2)
    (tmp_path / folder).mkdir()
    (tmp_path / "tars" / "set-000000.tar").rename(tmp_path / folder / "a [2].tar")
    assert len(shards(tmp_path / folder / name)) == 2


def test_shards_beside_images_are_ambiguous(tmp_path):
    write_shards(write_images(tmp_path, 2), tmp_path, 2)
    with pytest.raises(DataError, match="holds images as well as tar files"):
        open_source(str(tmp_path), "data.imagenet.path")


@pytest.mark.parametrize(
    ("pattern", "words"), [("set-{000000..000004}.tar", "does not exist"), ("no-*.tar", "nothing there matches")]
)
def test_missing_shards_are_named(tmp_path, pattern, words):
    write_shards(tmp_path, write_images(tmp_path / "images", 6), 2)
    with pytest.raises(DataError, match=words) as caught:
        open_source(str(tmp_path / pattern), "data.imagenet.path")
    assert "data.imagenet.path" in str(caught.value)


def test_siblings_links_and_second_members_of_a_key(tmp_path, capfd):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, content: bytes = b"", **facts) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in facts.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        add("x", type=tarfile.DIRTYPE)
        add("x/0.jpg", encoded(0, "JPEG"))
        add("x/0.cls", b"7\n")
        add("x/0.json", b"{}")
        add("x/0.mask.png", encoded(1))
        add("x/\x1b[2Jlink.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("../../etc/outside.png", encoded(2))
        add("/absolute.png", encoded(3))
        add("x/._0.jpg", b"of a Mac")
        add("x/0.jpg", encoded(4, "JPEG"))
        add("sp\xe4t/" + "l" * 200 + ".png", encoded(5))
    source = shards(path)
    assert [name.removeprefix("a.tar/") for name in names(source)] == [
        "x/0.jpg",
        "../../etc/outside.png",
        "/absolute.png",
        "sp\xe4t/" + "l" * 200 + ".png",
    ]
    assert [source.load(index, None).size for index in range(4)] == [(48, 48)] * 4
    assert np.array_equal(np.asarray(source.load(3, None)), np.asarray(noise(5)))
    assert source.classes().tolist() == [0, 1, 2, 3]
    told = capfd.readouterr().err
    assert "x/0.mask.png" in told
    assert "its key 'x/0' is that of 'x/0.jpg'" in told
    assert r"x/\x1b[2Jlink.png" in told, "no terminal clears its screen"
    assert "it is a link" in told
    assert len(json.loads((tmp_path / "a.tar.index.json").read_text())["left_out"]) == 3


def test_no_name_holds_a_nul(tmp_path):
    """An extended header may, and no picture, nor a member of another shard, can be named so."""
    path, index = tmp_path / "a.tar", tmp_path / "a.tar.index.json"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.size, member.pax_headers = len(encoded(0)), {"path": "x\0y.png"}
        tar.addfile(member, io.BytesIO(encoded(0)))
    assert names(shards(path)) == [r"a.tar/x\x00y.png"]
    index.write_text(index.read_text().replace(r"\\x00", r"\u0000"))
    assert names(shards(path)) == [r"a.tar/x\x00y.png"], "a stranger's index counts no more"
    assert main(["pack", str(path), str(tmp_path / "out")]) == 0
    assert names(shards(tmp_path / "out")) == [r"shard-000000.tar/x\x00y.png"]


def test_no_private_step_of_tarfile_is_needed(tmp_path, monkeypatch):
    """Since Python 3.14 tarfile reads a header without ``TarInfo.frombuf``, where a subclass could see it."""
    frombuf = tarfile.TarInfo.frombuf.__func__

    def fromtarfile(cls, tar):
        member = frombuf(cls, tar.fileobj.read(512), tar.encoding, tar.errors)
        member.offset = tar.fileobj.tell() - 512
        return member._proc_member(tar)

    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(fromtarfile))
    monkeypatch.setattr(tarfile.TarInfo, "frombuf", None)
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "l" * 200 + ".png": encoded(1)})
    source = shards(tmp_path)
    assert np.array_equal(np.asarray(source.load(1, None)), np.asarray(noise(1)))


def test_broken_members_are_empty_slots_with_names(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "1.jpg": b"no image", "2.png": b"", "3.png": encoded(3)[:200]})
    source = shards(tmp_path)
    batch = SlotDataset(source, lambda epoch, positions: positions, 32, "squash")[Slots(0, 0, 4, 4)]
    assert batch.weights.tolist() == [1, 0, 0, 0]
    assert [source.name(index) for index, _ in batch.failures] == ["a.tar/1.jpg", "a.tar/2.png", "a.tar/3.png"]


def test_what_is_too_large_for_an_image_is_not_read(tmp_path):
    """A file of another kind that ends like an image, or a sparse one, would fill the memory."""
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "1.tif": b"II*\0"})
    (tmp_path / "images" / "0.png").write_bytes(encoded(0))
    with open(tmp_path / "images" / "1.tif", "wb") as sparse:
        sparse.truncate(2**34)
    source = shards(tmp_path / "a.tar")
    source._shards[0].sizes[1] = 2**34
    for each in (source, open_source(str(tmp_path / "images"), "key")):
        batch = SlotDataset(each, lambda epoch, positions: positions, 32, "squash")[Slots(0, 0, 2, 2)]
        assert batch.weights.tolist() == [1, 0]
        assert batch.failures == [(1, "OSError: 17,179,869,184 bytes are too many for an image")]


def damaged(path, how: str) -> None:
    raw = path.read_bytes()
    headers = [at for at in range(0, len(raw), 512) if raw[at + 257 : at + 262] == b"ustar"]
    if how == "zeroed header":
        raw = raw[: headers[1]] + b"\1" * 512 + raw[headers[1] + 512 :]
    elif how == "cut in a member":
        raw = raw[: headers[1] + 600]
    elif how == "cut between members":
        raw = raw[: headers[1]]
    elif how == "empty":
        raw = b""
    elif how == "two archives":
        raw += raw
    elif how == "compressed":
        raw = gzip.compress(raw)
    elif how == "no tar":
        raw = b"<html>404</html>" * 100
    path.write_bytes(raw)


def test_without_a_terminal_rich_makes_no_bar(tmp_path, monkeypatch):
    write_shards(tmp_path, write_images(tmp_path / "images", 6), 3)
    monkeypatch.setattr("trajdist.data.shards.track", None)
    assert len(open_source(f"{tmp_path}/*.tar", "key")) == 6


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_terminal_the_main_process_says_how_far_the_indexes_are(tmp_path, monkeypatch, capsys, rank):
    """The time that it sees is half a minute later each time that it looks."""
    write_shards(tmp_path, write_images(tmp_path / "images", 6), 1)
    monkeypatch.setattr("trajdist.data.shards.time", SimpleNamespace(monotonic=itertools.count(0, 31).__next__))
    monkeypatch.setenv("RANK", str(rank))
    assert names(open_source(f"{tmp_path}/*.tar", "key")) == [f"set-{n:06d}.tar/{n:04d}.png" for n in range(6)]
    lines = [f"trajdist: indexes of the shards: {count}/6" for count in (2, 4, 6)]
    assert capsys.readouterr().err.splitlines() == ([] if rank else lines)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("zeroed header", "is damaged at byte"),
        ("cut in a member", "is damaged or cut short"),
        ("cut between members", "is cut short"),
        ("empty", "is damaged or cut short"),
        ("two archives", "continues after its end"),
        ("compressed", r"is compressed \(gzip\)"),
        ("no tar", "is damaged or cut short"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, how, words, capsys):
    write_shards(tmp_path, write_images(tmp_path / "images", 6), 3)
    damaged(tmp_path / "set-000001.tar", how)
    assert main(["run", "debug", f"data.imagenet.path={tmp_path}/*.tar", f"run_dir={tmp_path / 'run'}"]) == 3
    told = capsys.readouterr().err
    assert "set-000001.tar" in told
    assert told.count("\n") == 1, "one sentence"
    with pytest.raises(DataError, match=words):
        open_source(f"{tmp_path}/*.tar", "key")


def test_a_shard_that_changed_is_indexed_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": encoded(0)})
    assert len(shards(path)) == 1
    index = tmp_path / "a.tar.index.json"
    written = index.stat().st_mtime_ns
    assert len(shards(path)) == 1
    assert index.stat().st_mtime_ns == written, "a sound index is left alone"
    write_tar(path, {"0.png": encoded(0), "1.png": encoded(1)})
    assert len(shards(path)) == 2
    index.write_text(index.read_text()[:-20])
    assert len(shards(path)) == 2
    document = json.loads(index.read_text())
    index.write_text(json.dumps({**document, "offsets": [512, 10**12]}))
    assert shards(path).read(1) == encoded(1)


def test_a_shard_that_shrank_or_moved_since_it_was_indexed(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": encoded(number) for number in range(4)})
    source = shards(path)
    os.truncate(path, path.stat().st_size // 2)
    batch = SlotDataset(source, lambda epoch, positions: positions, 32, "squash")[Slots(0, 0, 4, 4)]
    assert batch.weights.tolist()[0] == 1
    assert batch.weights.tolist()[-1] == 0
    assert "too soon" in dict(batch.failures)[3]
    other = write_tar(tmp_path / "b.tar", {f"{number}.png": encoded(number) for number in (9, 8, 7, 6, 5)})
    stale = shards(other)
    write_tar(tmp_path / "c.tar", {"first.txt": b"x", **{f"{number}.png": encoded(number) for number in range(5)}})
    other.write_bytes((tmp_path / "c.tar").read_bytes())
    batch = SlotDataset(stale, lambda epoch, positions: positions, 32, "squash")[Slots(0, 0, 5, 5)]
    assert batch.weights.sum() == 0
    assert all("has changed since it was indexed" in reason or "too soon" in reason for _, reason in batch.failures)


def test_members_of_one_size_that_changed_places_are_not_mixed_up(tmp_path):
    """Neither where a job is running nor with an index that was uploaded with the shard before."""
    members = {f"{number:04d}.bmp": encoded(number, "BMP") for number in (12, 21)}
    path = write_tar(tmp_path / "tars" / "a.tar", members)
    source = shards(tmp_path / "tars")
    assert source.read(0) == encoded(12, "BMP")
    write_tar(path, reversed(members.items()))
    with pytest.raises(OSError, match="has changed since it was indexed"):
        source.read(0)
    assert shards(tmp_path / "tars").read(0) == encoded(21, "BMP")


def test_an_index_goes_to_the_cache_where_the_shard_may_not_be_touched(tmp_path, monkeypatch):
    from trajdist.data import shard_index
    from trajdist.errors import ArtifactError

    write = shard_index.write_bytes

    def refuse(path, content):
        if path.parent == tmp_path / "tars":
            raise ArtifactError("a read-only file system")
        write(path, content)

    monkeypatch.setattr(shard_index, "write_bytes", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": encoded(0)})
    assert len(shards(tmp_path / "tars")) == 1
    assert len(list((tmp_path / ".cache" / "trajdist").glob("*-a.tar.index.json"))) == 1
    monkeypatch.setattr("trajdist.data.shard_index.scan", lambda *_: pytest.fail("it was indexed already"))
    assert len(shards(tmp_path / "tars")) == 1


def test_an_index_that_can_be_kept_nowhere_is_made_each_time(tmp_path, monkeypatch):
    from trajdist.data import shard_index
    from trajdist.errors import ArtifactError

    def refuse(path, content):
        raise ArtifactError("a read-only file system")

    monkeypatch.setattr(shard_index, "write_bytes", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": encoded(0)})
    for _ in range(2):
        assert shards(tmp_path / "tars").read(0) == encoded(0)
    assert not list(tmp_path.rglob("*.json"))


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(sum),
    st.integers(1, 13),
    st.integers(0, 2**32),
    st.randoms(),
)
def test_windows_are_a_bijection_that_keeps_shards_together(sizes, window, key, random):
    sizes = np.array(sizes)
    total = int(sizes.sum())
    places = permute_windows(np.arange(total), sizes, window, key)
    assert sorted(places.tolist()) == list(range(total))
    some = np.array(random.sample(range(total), min(total, 5)))
    assert permute_windows(some, sizes, window, key).tolist() == places[some].tolist()
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[places]
    for shard in np.unique(shard_of):
        when = np.flatnonzero(shard_of == shard)
        assert len(np.unique(shard_of[when[0] : when[-1] + 1])) <= window


def test_order_by_shards():
    order = Order([50] * 8, window=2)
    selection = Selection.draw(400, -1, 0.1, 3, 1, order)
    epochs = [selection.train(epoch, np.arange(selection.num_train)) for epoch in range(2)]
    assert epochs[0].tolist() != epochs[1].tolist()
    held_out = selection.holdout(0, np.arange(selection.num_holdout))
    for epoch in epochs:
        assert sorted([*epoch.tolist(), *held_out.tolist()]) == list(range(400))
        assert max(len(np.unique(epoch[start : start + 40] // 50)) for start in range(0, 320, 40)) <= 4
    plain = Selection.draw(400, -1, 0.1, 3, 1)
    assert np.array_equal(plain.holdout(0, np.arange(40)), held_out)
    for window in (0, 8, 9):
        assert Selection.draw(400, -1, 0.1, 3, 1, Order([50] * 8, window)) == plain, "as a folder"


def test_a_sample_comes_from_all_shards():
    """The first images of an epoch come from few."""
    selection = Selection.draw(2000, -1, 0.1, 3, 1, Order([50] * 40, window=2))
    trained = set(selection.train(0, np.arange(selection.num_train)).tolist())
    sample = selection.sample(400)(0, np.arange(400))
    assert len(set(sample.tolist())) == 400
    assert trained.issuperset(sample.tolist())
    assert sample.tolist() == sorted(sample.tolist()), "each shard is visited once"
    assert len(np.unique(sample // 50)) == 40
    assert len(np.unique(selection.train(0, np.arange(400)) // 50)) < 20
    everything = selection.sample(selection.num_train)(0, np.arange(selection.num_train))
    assert set(everything.tolist()) == trained
    plain = Selection.draw(2000, -1, 0.1, 3, 1)
    assert np.array_equal(plain.sample(400)(0, np.arange(400)), plain.train(0, np.arange(400)))


def test_the_order_by_shards_never_changes():
    selection = Selection.draw(40, -1, 0.1, 5, 1, Order([10] * 4, 2))
    assert selection.train(1, np.arange(12)).tolist() == GOLDEN
    assert permute_windows(np.arange(8), np.array([3, 3, 2]), 1, key64(7)).tolist() == GOLDEN_WINDOWS


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.floats(0.01, 1), st.integers(0, 99))
def test_a_subset_has_its_share_of_each_class(classes, share, seed):
    classes = np.array(classes)
    count = max(1, round(share * len(classes)))
    selection = Selection.draw(len(classes), count, 0.0, seed, 1, Order(classes=classes))
    chosen = selection.train(0, np.arange(count))
    assert len(set(chosen.tolist())) == count == selection.num_train
    for name in range(5):
        wanted = count * (classes == name).mean()
        assert abs((classes[chosen] == name).sum() - wanted) < 1
    other = Selection.draw(len(classes), count, 0.0, seed + 1, 1, Order(classes=classes))
    assert count < 8 or count > len(classes) - 8 or set(other.train(0, np.arange(count))) != set(chosen)


@pytest.mark.parametrize("sizes", [[], [20] * 3])
def test_a_subset_by_class_has_no_image_that_is_held_out(sizes):
    selection = Selection.draw(60, 42, 0.25, 5, 1, Order(sizes, 1, np.arange(60) % 3))
    trained, held_out = selection.train(0, np.arange(42)), selection.holdout(0, np.arange(15))
    assert len({*trained.tolist(), *held_out.tolist()}) == 42 + 15
    assert np.bincount(trained % 3).min() >= 12


def test_a_subset_smaller_than_the_number_of_classes_is_not_always_of_the_first():
    """Each image is equally likely: of 10 classes alike, and of a large one beside 20 small ones."""
    alike, tail = np.repeat(np.arange(10), 5), np.repeat(np.arange(21), [30] + [2] * 20)
    drawn, rare = np.zeros(50), []
    for seed in range(400):
        drawn += np.isin(np.arange(50), Selection.draw(50, 8, 0.0, seed, 1, Order(classes=alike)).members)
        chosen = Selection.draw(70, 14, 0.0, seed, 1, Order(classes=tail)).members
        rare.append((tail[chosen] > 0).mean())
    # Of 400 draws, each with a chance of 8 / 50, 64 are expected, with a standard deviation of 7.3.
    assert 30 < drawn.min() <= drawn.max() < 100
    assert np.mean(rare) == pytest.approx(40 / 70, abs=0.02)
    alone = [tail[Selection.draw(70, 1, 0.0, seed, 1, Order(classes=tail)).members[0]] for seed in range(100)]
    # With a standard deviation of 0.05. The first of the line would be rare 20 times of 21.
    assert np.mean(np.array(alone) > 0) == pytest.approx(40 / 70, abs=0.15)


def losses(run_dir) -> list[float]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def run(path, run_dir, *overrides: str) -> list[float]:
    common = [f"data.imagenet.path={path}", f"run_dir={run_dir}", "data.imagenet.batch_size=4", "logging.every_steps=1"]
    assert main(["train", "debug", *common, *PIXELS, *overrides]) == 0
    found = audit(run_dir)
    assert (found.status, found.problems) == ("done", [])
    return losses(run_dir)


def test_training_on_shards_is_training_on_the_folder(tmp_path, fresh_accelerate):
    images = write_images(tmp_path / "images", 21)
    write_shards(tmp_path / "tars", images, 4)
    folder = run(images, tmp_path / "folder")
    assert len(folder) > 3
    assert run(tmp_path / "tars", tmp_path / "mixed") == folder
    assert run(tmp_path / "tars", tmp_path / "blocks", "data.shuffle_window=2") != folder
    assert json.loads((tmp_path / "blocks" / "run.json").read_text())["imagenet"]["shard_sizes"] == [4, 4, 4, 4, 4, 1]


def test_a_subset_by_class_trains_resumes_and_is_audited(tmp_path, fresh_accelerate):
    for name in ("cat", "dog", "eel"):
        write_images(tmp_path / "images" / name, 8)
    write_shards(tmp_path / "tars", tmp_path / "images", 5)
    folder = run(tmp_path / "images", tmp_path / "folder", "data.imagenet.num_samples=9")
    members = np.load(tmp_path / "folder" / "subset-imagenet.npy")
    assert len(members) == 9
    assert run(tmp_path / "tars", tmp_path / "mixed", "data.imagenet.num_samples=9") == folder
    run(tmp_path / "tars", tmp_path / "blocks", "data.imagenet.num_samples=9", "data.shuffle_window=2")
    np.save(tmp_path / "folder" / "subset-imagenet.npy", members[::-1])
    assert main(["audit", str(tmp_path / "folder")]) == 4


def test_a_run_goes_on_with_the_subset_that_it_began_with(tmp_path, fresh_accelerate, monkeypatch):
    """Another version may have drawn another."""
    for name in ("cat", "dog", "eel"):
        write_images(tmp_path / "images" / name, 8)
    subset, epochs = "data.imagenet.num_samples=9", "data.imagenet.num_epochs=2"
    with monkeypatch.context() as patch:
        patch.setattr("trajdist.sharding._shares", lambda classes, count, key: np.arange(count))
        run(tmp_path / "images", tmp_path / "run", subset)
    members = (tmp_path / "run" / "subset-imagenet.npy").read_bytes()
    run(tmp_path / "images", tmp_path / "run", subset, epochs)
    assert (tmp_path / "run" / "subset-imagenet.npy").read_bytes() == members
    run(tmp_path / "images", tmp_path / "anew", subset)
    assert (tmp_path / "anew" / "subset-imagenet.npy").read_bytes() != members


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_each_image_once_while_the_number_of_processes_changes(tmp_path, window):
    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 23, side=32), 4)
    run_at_one_three_and_two_processes(tmp_path / "tars", tmp_path / "run", f"data.shuffle_window={window}")


def run_at_one_three_and_two_processes(path, run_dir, *overrides: str) -> None:
    """A run that is stopped twice and goes on at another size; it is clean in the end."""
    command = ["train", "debug", f"data.imagenet.path={path}", f"run_dir={run_dir}", *PIXELS, *overrides]
    command += ["data.imagenet.batch_size=2", "data.num_workers=1"]
    for world in (1, 3):
        stop_after_lines(start([*command, "data.imagenet.num_epochs=500"], world), run_dir, 5)
    epochs = int(audit(run_dir).facts[0].split(" epoch")[0].split(": ")[1])
    last = launch([*command, f"data.imagenet.num_epochs={epochs + 2}"], 2)
    assert last.returncode == 0, last.stderr
    found = audit(run_dir)
    assert (found.status, found.problems, found.replaced) == ("done", [], [])
    assert "1, then 3, then 2 processes" in found.facts[0]


def test_memory_is_flat_over_many_images(tmp_path):
    """Beyond an image's name and place, nothing grows with the number of images."""
    image = encoded(0)
    for number in range(10):
        members = ((f"class{index % 50:03d}/{index:06d}.png", image) for index in range(5000))
        write_tar(tmp_path / f"set-{number:03d}.tar", members)
    source = shards(tmp_path)
    selection = Selection.draw(len(source), -1, 0.1, 0, 1, Order(source.shard_sizes(), 4))
    dataset = SlotDataset(source, selection.train, 32, "squash")
    assert len(source) == 50_000

    def peak_of(start: int, stop: int) -> int:
        tracemalloc.reset_peak()
        for first in range(start, stop, 50):
            dataset[Slots(0, first, first + 50, 50)]
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    peak_of(0, 500)
    few, many = peak_of(500, 1000), peak_of(1000, 5000)
    tracemalloc.stop()
    assert many < 1.05 * few + 2**16
    shutil.rmtree(tmp_path)


def test_threads_read_from_more_files_than_are_kept_open(tmp_path):
    """A file that falls out of the list of open ones is not closed, nor its number given to another, in a read."""
    names = [str(tmp_path / f"{number:03d}") for number in range(4 * storage.OPEN_FILES)]
    for number, name in enumerate(names):
        with open(name, "wb") as file:
            file.write(bytes([number]) * 64)
    order = [number * 7 % len(names) for number in range(20_000)]
    assert in_threads(lambda number: storage.read(names[number], 8, 1)[0], order, 8) == order
