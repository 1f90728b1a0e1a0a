"""The trajectory cache: later epochs without the backbone, the same training, and nothing false after any accident."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from images import noise, write_images
from jobs import launch
from outcome import assert_done
from test_loop import arguments, assert_same_training, batches, losses

from trajdist.cli import main
from trajdist.data.trajectory_cache import CacheWriter, TrajectoryCache, look_up, padded
from trajdist.errors import ConfigError
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.training import caching
from trajdist.training.caching import open_writer

SHAPE = (4, 3, 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 21)


@pytest.fixture
def cache(tmp_path) -> TrajectoryCache:
    made = TrajectoryCache(tmp_path / "cache", {"images": "abc"}, 10, SHAPE)
    made.create()
    return made


def some(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def fill(cache: TrajectoryCache, numbers: list[int], room: int = 100, version: int = 1) -> tuple[torch.Tensor, str]:
    writer, trajectories = CacheWriter(cache, room), some(len(numbers), seed=version)
    writer.add(torch.tensor(numbers), torch.full((len(numbers),), version), trajectories)
    return trajectories, writer.close()


def found_in(cache: TrajectoryCache, numbers, places=None, version: int = 1):
    return look_up(cache, numbers, np.full(len(numbers), version), places)


def present(folder: Path) -> list[bool]:
    return (np.fromfile(folder / "versions", np.int64) != 0).tolist()


def test_what_was_written_is_read(cache):
    trajectories, why = fill(cache, [7, 2, -1, 5])
    assert why == ""
    assert len(cache) == 3
    found = found_in(cache, np.array([2, 3, 5, 7]))
    assert found.hits.tolist() == [0, 2, 3]
    assert found.misses.tolist() == [1]
    assert found.numbers.tolist() == [3]
    assert torch.equal(found.trajectories, trajectories[[1, 3, 0]])


def test_a_gpus_copies_are_awaited_on_that_gpu(cache, monkeypatch):
    """Threads begin on the first one."""
    current = ["cuda:0"]

    @contextmanager
    def chosen(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", chosen)
    waited = []
    copied = SimpleNamespace(device="cuda:3", synchronize=lambda: waited.append(current[-1]))
    writer = CacheWriter(cache, 100)
    writer._waiting.put(([(4, 1)], some(1), copied))
    assert writer.close() == ""
    assert waited == ["cuda:3"]
    assert len(cache) == 1


def test_chosen_places_of_each_image(cache):
    trajectories, _ = fill(cache, [0, 1])
    places = torch.tensor([[0, 3], [0, 1], [1, 2]])
    found = look_up(cache, np.array([0, 8, 1]), np.array([1, 5, 1]), places)
    assert (found.numbers.tolist(), found.versions.tolist()) == ([8], [5])
    assert torch.equal(found.trajectories, torch.stack([trajectories[0, [0, 3]], trajectories[1, [1, 2]]]))


def test_nothing_is_found_in_an_empty_cache(cache):
    found = found_in(cache, np.array([0, 9]))
    assert found.trajectories.shape == (0, *SHAPE)
    assert found.misses.tolist() == [0, 1]


def test_a_record_counts_only_once_it_is_committed(cache):
    """A kill between the two leaves a record that nobody sees."""
    cache.write(4, some(1).view(torch.uint16).numpy()[0])
    assert len(cache) == 0
    assert found_in(cache, np.array([4])).misses.tolist() == [0]
    cache.commit([(4, 1)])
    assert found_in(cache, np.array([4])).hits.tolist() == [0]


def write_until_killed(cache: TrajectoryCache, started) -> None:
    writer = CacheWriter(cache, 10**9)
    while True:
        for number in range(cache.num_images):
            writer.add(torch.tensor([number]), torch.ones(1, dtype=torch.int64), some(1, seed=number))
            started.set()


def test_killed_while_writing(tmp_path):
    """SIGKILL at some moment: whatever is said to be there is what was to be there."""
    cache = TrajectoryCache(tmp_path, {}, 5000, SHAPE)
    cache.create()
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=write_until_killed, args=(cache, started))
    process.start()
    assert started.wait(30)
    while len(cache) < 5:
        assert process.is_alive()
    process.kill()
    process.join()
    found = found_in(cache, np.arange(5000))
    assert len(found.hits) >= 5
    for slot, record in zip(found.hits.tolist(), found.trajectories, strict=True):
        assert torch.equal(record, some(1, seed=slot)[0])


def test_its_room_is_kept_and_said(cache):
    _, why = fill(cache, [1, 2, 3], room=2)
    assert "is full (cache.max_gib)" in why
    assert len(cache) == 2


def test_a_record_of_another_version_is_none(cache):
    """Of which there is none, and a version that cannot be told is any."""
    of_first, _ = fill(cache, [1, 2], version=5)
    assert found_in(cache, np.array([1, 2]), version=6).misses.tolist() == [0, 1]
    assert found_in(cache, np.array([1, 2]), version=6).versions.tolist() == [6, 6]
    for known in (5, 0):
        assert torch.equal(found_in(cache, np.array([1, 2]), version=known).trajectories, of_first)
    # It takes the place of the other, also where there is no room for more.
    of_second, why = fill(cache, [1, 7], room=0, version=6)
    assert "is full (cache.max_gib)" in why
    assert len(cache) == 2
    assert torch.equal(found_in(cache, np.array([1]), version=6).trajectories, of_second[:1])
    assert found_in(cache, np.array([1, 2]), version=5).hits.tolist() == [1]


def test_a_record_of_an_image_without_a_version_is_kept(cache):
    """As of one whose time and size could not be asked for."""
    trajectories, _ = fill(cache, [4], version=0)
    assert len(cache) == 1
    assert torch.equal(found_in(cache, np.array([4]), version=0).trajectories, trajectories)


def test_records_beyond_the_first_mebibyte_of_versions_are_counted(tmp_path):
    cache = TrajectoryCache(tmp_path, {}, 300_000, (1, 1, 1))
    cache.create()
    cache.commit([(number, 1) for number in (0, 2**17 - 1, 2**17, 299_999)])
    assert len(cache) == 4


def test_while_batches_are_queued_records_are_committed_now_and_then(cache, monkeypatch):
    """What a kill costs is bounded."""
    commits: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(TrajectoryCache, "commit", lambda self, written: commits.append(list(written)))
    monkeypatch.setattr("trajdist.data.trajectory_cache.SYNC_BYTES", cache.stride)
    writer = CacheWriter(cache, 100)
    monkeypatch.setattr(writer._waiting, "empty", lambda: False)
    for number in range(5):
        writer.add(torch.tensor([number]), torch.tensor([1]), some(1))
    assert writer.close() == ""
    assert commits == [[(0, 1), (1, 1)], [(2, 1), (3, 1)], [(4, 1)]]


def test_while_a_record_is_replaced_there_is_none(cache, monkeypatch):
    fill(cache, [1], version=5)
    monkeypatch.setattr(TrajectoryCache, "write", lambda *_: 1 / 0)
    _, why = fill(cache, [1], version=6)
    assert "cannot be written" in why
    for version in (0, 5, 6):
        assert found_in(cache, np.array([1]), version=version).hits.tolist() == []


def test_a_full_disk_ends_the_caching_and_nothing_else(cache, monkeypatch):
    def full(self, number, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TrajectoryCache, "write", full)
    writer = CacheWriter(cache, 100)
    for _ in range(10):  # More than the queue holds: nobody may wait for ever.
        writer.add(torch.tensor([1]), torch.tensor([1]), some(1))
    assert "cannot be written (No space left on device)" in writer.close()
    assert len(cache) == 0


def test_a_last_sync_that_fails_ends_the_caching_and_nothing_else(cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = TrajectoryCache.write

    def write_while_it_is_closed(*args):
        while writer._waiting.empty():
            time.sleep(0.01)
        write(*args)

    monkeypatch.setattr("trajdist.data.trajectory_cache.sync_contents", full)
    monkeypatch.setattr(TrajectoryCache, "write", write_while_it_is_closed)
    writer, closed = CacheWriter(cache, 100), []
    writer.add(torch.tensor([1]), torch.tensor([1]), some(1))
    closing = threading.Thread(target=lambda: closed.append(writer.close()), daemon=True)
    closing.start()
    closing.join(30)
    assert closed
    assert "cannot be written (No space left on device)" in closed[0]
    assert len(cache) == 0


@pytest.fixture
def nearly_full_disk(monkeypatch):
    """The kernel takes what fits and says how much that was."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: whole(file, bytes(data)[: len(data) // 2], offset))


def test_a_record_that_fits_in_part_does_not_count(cache, nearly_full_disk):
    _, why = fill(cache, [1, 2])
    assert "cannot be written (No space left on device)" in why
    assert len(cache) == 0


def test_whatever_ends_the_writer_nobody_waits_for_it(cache, monkeypatch):
    monkeypatch.delattr(TrajectoryCache, "write")
    writer = CacheWriter(cache, 100)
    for _ in range(10):
        writer.add(torch.tensor([1]), torch.tensor([1]), some(1))
    assert "cannot be written" in writer.close()


def test_the_first_record_of_an_image_stays(cache):
    """Whether it is committed or not, it takes room once."""
    writer, (one, other) = CacheWriter(cache, 1), (some(1), some(1) + 1)
    for trajectories in (one, other):
        writer.add(torch.tensor([3]), torch.tensor([1]), trajectories)
    assert writer.close() == ""
    writer = CacheWriter(cache, 1)
    for number in (3, 5):
        writer.add(torch.tensor([number]), torch.tensor([1]), other)
    assert writer.close() == ""
    assert torch.equal(found_in(cache, np.array([3, 5])).trajectories, torch.cat([one, other]))


def test_files_cut_short_are_misses(cache):
    fill(cache, [0, 1, 2])
    os.truncate(cache.folder / "records", cache.stride + 10)
    assert found_in(cache, np.array([0, 1, 2])).hits.tolist() == [0]
    os.truncate(cache.folder / "versions", 0)
    assert found_in(cache, np.array([0, 1, 2])).hits.tolist() == []
    cache.create()
    assert len(cache) == 0


def test_another_key_is_another_cache(tmp_path):
    folders = {
        TrajectoryCache(tmp_path, key, count, shape).folder
        for key in ({"fit": "crop"}, {"fit": "squash"})
        for count in (10, 11)
        for shape in ((4, 3, 8), (4, 8, 3))
    }
    assert len(folders) == 8


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_another_version_left_is_told_of(images, tmp_path, monkeypatch, capsys):
    for transform in (1, 2):
        monkeypatch.setattr(caching, "TRANSFORM", transform)
        cached_run(images, tmp_path, str(transform), f"seed={transform}")  # With it, other projections.
        told = capsys.readouterr().out.replace("\n", "")
        assert ("is of another version of trajdist" in told) == (transform == 2)
    left = [folder.name for folder in (tmp_path / "cache").iterdir() if f"{folder.name} is of another" in told]
    keys = {name: json.loads((tmp_path / "cache" / name / "key.json").read_text()) for name in left}
    assert [key["transform"] for key in keys.values()] == [1, 1]


def test_it_travels_to_workers(cache):
    unopened = pickle.dumps(cache)
    fill(cache, [3])
    assert pickle.dumps(cache) == unopened, "the numbers of open files are those of this process"
    assert len(pickle.loads(unopened)) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cache\.dir='.*file' cannot be written \(Not a directory\): name another"):
        TrajectoryCache(tmp_path / "file", {}, 1, SHAPE).create()


def test_all_processes_make_it_at_once(tmp_path):
    """On different machines they may have the same number, as threads have here."""
    caches = [TrajectoryCache(tmp_path / "cache", {"round": number // 4}, 3, SHAPE) for number in range(200)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(TrajectoryCache.create, caches))
    assert all(len(cache) == 0 for cache in caches)


def test_few_sizes_of_batches():
    assert {padded(count, 32) for count in range(33)} == {0, 8, 16, 24, 32}
    assert [padded(count, 3) for count in range(4)] == [0, 1, 2, 3]
    assert padded(1, 1) == 1


def cached_run(images: Path, folder: Path, name: str, *overrides: str) -> Path:
    run_dir = folder / name
    fixed = [*batches(4, 1), "data.num_workers=0", f"cache.dir={folder / 'cache'}", *overrides]
    assert main(arguments("run", images, run_dir, *fixed)) == 0
    return run_dir


@pytest.fixture
def backbone_images(monkeypatch) -> Counter:
    """How many images went through the backbone while training, by batch size."""
    seen: Counter = Counter()
    whole = TrajectoryExtractor.__call__

    def counting(self, images):
        seen[len(images)] += 1
        return whole(self, images)

    monkeypatch.setattr(TrajectoryExtractor, "__call__", counting)
    return seen


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("fraction", [1, 0.5])
def test_training_is_the_same_and_needs_no_backbone(images, tmp_path, backbone_images, fraction):
    share = f"train.cell_fraction={fraction}"
    assert main(arguments("run", images, tmp_path / "plain", *batches(4, 1), share)) == 0
    first = cached_run(images, tmp_path, "first", share)
    before = backbone_images.copy()
    second = cached_run(images, tmp_path, "second", share)
    torch.testing.assert_close(losses(first), losses(tmp_path / "plain"), rtol=1e-2, atol=1e-3)
    assert_same_training(second, first)
    # All that is left are the calibrations of the two phases: three passes of six batches each.
    assert (backbone_images - before).total() == 2 * 3 * 6


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_cache_with_room_for_a_part(images, tmp_path, capsys):
    whole = cached_run(images, tmp_path / "whole", "run")
    part = cached_run(images, tmp_path / "part", "run", "cache.max_gib=4e-5")
    assert "is full (cache.max_gib)" in capsys.readouterr().out
    caches = list((tmp_path / "part" / "cache").iterdir())
    for folder in caches:
        assert 0 < sum(present(folder)) < 21
    assert_same_training(part, whole)


@pytest.mark.usefixtures("fresh_accelerate")
def test_two_processes_share_it(images, tmp_path):
    """Two processes fill it, one process finds all; losses, ledger and audit are those of one."""
    overrides = [*batches(2, 1), "data.num_workers=1", f"cache.dir={tmp_path / 'cache'}"]
    done = launch(arguments("run", images, tmp_path / "two", *overrides), num_processes=2, timeout_s=150)
    assert done.returncode == 0, done.stderr
    assert_done(tmp_path / "two")
    for folder in (tmp_path / "cache").iterdir():
        assert present(folder) == [True] * 21
    assert_same_training(cached_run(images, tmp_path, "one"), tmp_path / "two")


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_image_that_cannot_be_read_is_not_kept(tmp_path):
    folder = write_images(tmp_path / "images", 8)
    (folder / "0003.png").write_bytes(b"spoilt")
    cached_run(folder, tmp_path, "run", "data.max_bad_fraction=1")
    for cache in (tmp_path / "cache").iterdir():
        assert present(cache) == [number != 3 for number in range(8)]
    named = [json.loads(line)["image"] for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    assert set(named) == {"0003.png"}


@pytest.mark.usefixtures("fresh_accelerate")
def test_two_folders_with_the_same_names_have_a_cache_each(images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for number, path in enumerate(sorted(images.iterdir())):
        noise(1000 + number).save(other / path.name)
    cached_run(images, tmp_path, "first")
    second = cached_run(other, tmp_path, "second")
    assert main(arguments("run", other, tmp_path / "plain", *batches(4, 1), "data.num_workers=0")) == 0
    torch.testing.assert_close(losses(second), losses(tmp_path / "plain"), rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_image_that_was_replaced_is_computed_anew(tmp_path, backbone_images):
    """Phase 2 on a folder in which some files have other contents under their names now."""
    folder = write_images(tmp_path / "images", 8)
    phase1 = tmp_path / "phase1"
    assert main(arguments("train", folder, phase1, *batches(4, 1), "data.num_workers=0")) == 0
    adapt = ["data.domain.num_epochs=1", f"phase1={phase1}"]

    def adapted(name: str, *overrides: str) -> Path:
        fixed = [*batches(4, 1), "data.num_workers=0", *adapt, *overrides]
        assert main(arguments("adapt", folder, tmp_path / name, *fixed)) == 0
        return tmp_path / name

    cache = f"cache.dir={tmp_path / 'cache'}"
    adapted("before", cache)
    for number in (2, 5):
        noise(2000 + number).save(folder / f"{number:04}.png")
    torch.testing.assert_close(losses(adapted("after", cache)), losses(adapted("plain")), rtol=1e-2, atol=1e-3)
    seen = backbone_images.copy()
    again = adapted("again", cache)
    assert_same_training(again, tmp_path / "after")
    # By then all are kept: what the backbone sees is the calibration of one phase, three passes of two batches.
    assert (backbone_images - seen).total() == 3 * 2


def test_who_shares_a_folder(tmp_path):
    """Two machines with a local disk each do not, though the path is the same."""
    folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "other machine"]
    caches = [TrajectoryCache(folder, {"images": "abc"}, 10, SHAPE) for folder in folders]
    for cache in caches:
        cache.create()
    first, again, other = (cache.identity() for cache in caches)
    fill(caches[0], [1, 2])
    assert first == again == caches[1].identity() != other


@pytest.mark.parametrize(("of_others", "share"), [(["this"], 5), (["another machine's"] * 2, 10)])
def test_who_shares_a_folder_shares_its_room(cache, of_others, share):
    """Processes of other machines with local disks have as much room of their own."""
    own = cache.identity()
    gathered = [own, *(own if name == "this" else name for name in of_others)]
    processes = SimpleNamespace(world=len(gathered), gather=lambda items: gathered)
    config = SimpleNamespace(cache=SimpleNamespace(max_gib=10 * cache.stride / 2**30))
    writer = open_writer(SimpleNamespace(processes=processes, config=config, say=print), cache)
    assert writer._room == share
    writer.close()
