"""Shards in an object store: moto's S3 server behind a proxy that fails now and then, and plain HTTP."""

from __future__ import annotations

import http.client
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from images import write_images
from jobs import launch
from tars import encoded, write_shards, write_tar
from test_shards import losses, run_at_one_three_and_two_processes

from trajdist.cli import main
from trajdist.data import storage
from trajdist.data.shard_cache import ShardCache
from trajdist.data.shards import TarShards
from trajdist.data.sources import open_source
from trajdist.data.storage import Access
from trajdist.errors import DataError
from trajdist.sharding import Order, Plan, Selection
from trajdist.tools.audit import audit

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

BUCKET = "bucket"


class Proxy(ThreadingHTTPServer):
    """Hands requests on to the store, and does to some of them what networks do.

    Attributes:
        fault: asked for each GET, by its number and path: None, "503", "403" or "cut" (in mid-body).
        requests: paths of the GETs.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.fault: Callable[[int, str], str | None] = lambda number, path: None
        self.requests: list[str] = []
        self.sent = 0
        self.count = itertools.count()

    def handle_error(self, request, client_address) -> None:
        """A client may hang up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        fault = self.server.fault(next(self.server.count), self.path)
        if fault in ("503", "403"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._forward(cut=fault == "cut")

    def do_HEAD(self) -> None:
        if self.server.fault(-1, self.path) == "403":
            self.send_response(403)
            self.end_headers()
            return
        self._forward()

    def do_PUT(self) -> None:
        self._forward()

    def _forward(self, cut: bool = False) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        length = int(self.headers.get("Content-Length") or 0)
        connection.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.server.sent += len(body)
        if cut:
            self.close_connection = True
            self.connection.close()
        connection.close()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()
    yield port
    server.stop()


@pytest.fixture
def store(moto_port, monkeypatch, tmp_path) -> Iterator[Proxy]:
    proxy = Proxy(moto_port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    settings = {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "HOME": str(tmp_path),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield proxy
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()


def upload(folder: Path, prefix: str, pattern: str = "*.tar", acl: str = "private") -> str:
    """The files of a folder, put into the bucket; the URL that names its shards."""
    client = boto3.client("s3")
    for path in sorted(folder.glob(pattern)):
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}", ExtraArgs={"ACL": acl})
    client.close()
    return f"s3://{BUCKET}/{prefix}/"


def contents(source) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


def test_shards_of_a_store(store, tmp_path):
    images = write_images(tmp_path / "images", 10)
    write_shards(tmp_path / "tars", images, 4)
    url = upload(tmp_path / "tars", "whole")
    folder = open_source(str(images), "key")
    for pattern in (url, f"{url}*.tar", url + "set-{000000..000002}.tar"):
        source = open_source(pattern, "key", Access(retries=2))
        assert isinstance(source, TarShards)
        assert source.shard_sizes() == [4, 4, 2]
        assert contents(source) == contents(folder)
    assert source.fingerprint == open_source(str(tmp_path / "tars"), "key").fingerprint


def test_plain_http(store, tmp_path):
    pytest.importorskip("aiohttp")
    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 6), 4)
    upload(tmp_path / "tars", "http", acl="public-read")
    source = open_source(f"{store.url}/{BUCKET}/http/set-{{000000..000001}}.tar", "key", Access(retries=2))
    assert contents(source) == contents(open_source(str(tmp_path / "images"), "key"))


def test_an_index_that_lies_beside_the_shard_saves_reading_it(store, tmp_path):
    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 30, side=200), 10)
    assert main(["pack", str(tmp_path / "images"), str(tmp_path / "packed"), "--shard-size", "1MiB"]) == 0
    url = upload(tmp_path / "packed", "indexed", "shard-*")
    size = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.tar"))
    store.sent = 0
    source = open_source(url, "key")
    assert store.sent < size / 10
    assert len(source) == 30
    assert contents(source) == contents(open_source(str(tmp_path / "packed"), "key"))


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_with_faults_is_training_on_the_folder(store, tmp_path, cached):
    images = write_images(tmp_path / "images", 21)
    write_shards(tmp_path / "tars", images, 4)
    url = upload(tmp_path / "tars", f"faults-{cached}")
    common = ["train", "debug", "data.image_size=32", "runtime.mixed_precision=no", "data.num_workers=1"]
    common += ["data.imagenet.batch_size=4", "logging.every_steps=1"]
    folder = launch([*common, f"data.imagenet.path={images}", f"run_dir={tmp_path / 'folder'}"], 2)
    assert folder.returncode == 0, folder.stderr
    faults = {3: "503", 5: "cut", 9: "503", 10: "cut", 11: "503", 20: "cut", 25: "503"}
    store.fault = lambda number, path: faults.get(number % 30)
    remote = [f"data.imagenet.path={url}", f"run_dir={tmp_path / 'remote'}"]
    remote += [f"data.cache_dir={tmp_path / 'cache'}"] if cached else []
    finished = launch([*common, *remote], 2, timeout_s=240)
    assert finished.returncode == 0, finished.stderr
    assert store.requests
    assert losses(tmp_path / "remote") == losses(tmp_path / "folder")
    found = audit(tmp_path / "remote")
    assert (found.problems, found.replaced) == ([], [])


def refused(capsys, url: str, *overrides: str) -> str:
    assert main(["run", "debug", f"data.imagenet.path={url}", "data.read_retries=0", *overrides]) in (3, 4)
    told = capsys.readouterr().err
    assert told.count("\n") == 1, "one sentence"
    return told


def test_what_cannot_be_read_is_one_sentence(store, tmp_path, capsys):
    path = write_tar(tmp_path / "tars" / "a.tar", {f"{number}.png": encoded(number) for number in range(9)})
    url = upload(tmp_path / "tars", "refused")
    assert "a.tar' does not exist" in refused(capsys, f"s3://{BUCKET}/nothing/a.tar")
    assert "names no shards" in refused(capsys, f"s3://{BUCKET}/nothing/")
    path.write_bytes(path.read_bytes()[:4096])
    upload(tmp_path / "tars", "short")
    assert "cut short" in refused(capsys, f"s3://{BUCKET}/short/a.tar")
    store.fault = lambda number, path: "403"
    told = refused(capsys, f"{url}a.tar")
    assert "may not be read" in told
    assert "credentials" in told
    assert "may not be read" in refused(capsys, f"{store.url}/{BUCKET}/refused/a.tar")
    if not _installed("gcsfs"):
        assert "pip install 'trajdist[gs]'" in refused(capsys, "gs://bucket/a.tar")


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def test_a_store_that_answers_again(store, tmp_path, monkeypatch):
    write_tar(tmp_path / "tars" / "a.tar", {f"{number}.png": encoded(number) for number in range(3)})
    source = open_source(upload(tmp_path / "tars", "again"), "key", Access(retries=3))
    begin = next(store.count)
    store.fault = lambda number, path: "503" if number < begin + 4 else None
    assert source.read(0) == encoded(0)
    monkeypatch.setattr(source, "_access", Access(retries=0))
    store.fault = lambda number, path: "503"
    with pytest.raises(OSError, match="Service Unavailable"):
        source.read(0)


def test_a_listing_that_fails_for_a_moment(store, tmp_path, monkeypatch):
    write_tar(tmp_path / "tars" / "a.tar", {f"{number}.png": encoded(number) for number in range(3)})
    url, listing, failures = upload(tmp_path / "tars", "listed"), storage._remote_glob, [1, 1]

    def at_last(name: str) -> list[str]:
        if failures and failures.pop():
            raise OSError("Service Unavailable")
        return listing(name)

    monkeypatch.setattr(storage, "_remote_glob", at_last)
    with pytest.raises(DataError, match="Service Unavailable"):
        open_source(url, "key", Access(retries=0))
    assert len(open_source(url, "key", Access(retries=3))) == 3
    assert not failures


def cache_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix != ".json")


def test_the_cache_is_bounded_and_drops_what_was_not_used(store, tmp_path):
    raw = {f"{number}.png": encoded(number) for number in range(3)}
    for name in "abcd":
        write_tar(tmp_path / "tars" / f"{name}.tar", raw)
    size = (tmp_path / "tars" / "a.tar").stat().st_size
    url = upload(tmp_path / "tars", "bounded")
    cache = ShardCache(tmp_path / "cache", 2.5 * size / 2**30)
    copies, fetched = {}, []
    for name in "abacadc":
        shard = f"{url}{name}.tar"
        before = len(store.requests)
        copies[name] = cache.path_of(shard, storage.version(shard), 0)
        fetched.append(len(store.requests) > before)
        assert copies[name].read_bytes() == (tmp_path / "tars" / f"{name}.tar").read_bytes()
        assert sum(path.stat().st_size for path in cache_files(tmp_path / "cache")) <= 2.5 * size
        time.sleep(0.01)  # The times of their last use differ.
    assert fetched == [True, True, False, True, False, True, True]
    assert [copies[name].exists() for name in "abcd"] == [False, False, True, True]


def test_files_of_others_in_the_cache_folder_stay(store, tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": encoded(0)})
    shard = upload(tmp_path / "tars", "others") + "a.tar"
    version = storage.version(shard)
    cache = ShardCache(tmp_path / "cache", 1.5 * version.size / 2**30)
    mine = [tmp_path / "cache" / name for name in ("mine.tar", "download.iso.part")]
    for path in mine:
        path.write_bytes(b"x" * version.size)
    assert cache.path_of(shard, version, 0).stat().st_size == version.size
    assert all(path.stat().st_size == version.size for path in mine)


def test_many_at_once_fetch_a_shard_once(store, tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", {f"{number}.png": encoded(number) for number in range(3)})
    shard = upload(tmp_path / "tars", "once") + "a.tar"
    version = storage.version(shard)
    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(ShardCache(tmp_path / "cache", 1.0).path_of, shard, version, 0) for _ in range(8)]
        paths = {job.result() for job in jobs}
    assert len(paths) == 1
    assert len([path for path in store.requests if path.endswith("a.tar")]) == 1


def test_a_download_that_was_killed_makes_way(store, tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": encoded(0)})
    shard = upload(tmp_path / "tars", "killed") + "a.tar"
    version = storage.version(shard)
    cache = ShardCache(tmp_path / "cache", 1.5 * version.size / 2**30)
    other = tmp_path / "cache" / f"{'0a' * 12}.part"
    same = cache._copy_of(shard, version).with_suffix(".part")
    for dead in (other, same):
        dead.write_bytes(b"x" * version.size)
        assert cache.path_of(shard, version, 0).read_bytes() == (tmp_path / "tars" / "a.tar").read_bytes()
        assert not dead.exists()
        cache._copy_of(shard, version).unlink()


def test_a_cache_that_cannot_hold_the_window_is_refused(store, tmp_path, capsys):
    for name in "abc":
        write_tar(tmp_path / "tars" / f"{name}.tar", {"0.png": encoded(0)})
    url = upload(tmp_path / "tars", "small")
    told = refused(capsys, url, f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gib=0.00001")
    assert "data.cache_gib=1e-05 is less than" in told
    (tmp_path / "file").write_text("")
    assert "data.cache_dir" in refused(capsys, url, f"data.cache_dir={tmp_path / 'file'}")


def test_a_full_disk_makes_the_cache_slow_not_wrong(store, tmp_path, monkeypatch):
    """And the room is asked for before anything is fetched."""
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": encoded(0)})
    url = upload(tmp_path / "tars", "full")
    source = open_source(url, "key", Access(cache_dir=str(tmp_path / "cache")))
    fetched = []
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda name, at, length: fetched.append(length) or read(name, at, length))
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert source.read(0) == encoded(0)
    assert fetched == [512 + len(encoded(0))]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_few_images_of_each_shard_fetch_no_whole_ones(store, tmp_path):
    for name in "ab":
        write_tar(tmp_path / "tars" / f"{name}.tar", {f"{number}.png": encoded(number) for number in range(3)})
    source = open_source(upload(tmp_path / "tars", "few"), "key", Access(cache_dir=str(tmp_path / "cache")))
    assert source.read(0) == encoded(0)
    assert len(cache_files(tmp_path / "cache")) == 1
    few = source.scattered()
    assert [few.read(index) for index in (1, 3, 5)] == [encoded(1), encoded(0), encoded(2)]
    assert len(cache_files(tmp_path / "cache")) == 1
    assert source.read(3) == encoded(0)
    assert len(cache_files(tmp_path / "cache")) == 2


@pytest.mark.slow
def test_each_image_once_while_the_number_of_processes_changes(store, tmp_path):
    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 23, side=32), 4)
    url = upload(tmp_path / "tars", "sizes")
    options = ("data.shuffle_window=2", f"data.cache_dir={tmp_path / 'cache'}")
    run_at_one_three_and_two_processes(url, tmp_path / "run", *options)


def test_memory_urls(tmp_path):
    import fsspec

    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 6), 4)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "tars").glob("*.tar"):
        memory.pipe(f"/set/{path.name}", path.read_bytes())
    source = open_source("memory://set/*.tar", "key", Access(cache_dir=str(tmp_path / "cache")))
    assert contents(source) == contents(open_source(str(tmp_path / "images"), "key"))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_once_over_processes(store, tmp_path, world):
    """The union over the processes' shares of an epoch, read from the store, is the data set."""
    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 17), 3)
    source = open_source(
        upload(tmp_path / "tars", f"world{world}"), "key", Access(cache_dir=str(tmp_path / "c"), window=2)
    )

    selection = Selection.draw(len(source), -1, 0.0, 0, 1, Order(source.shard_sizes(), 2))
    plan = Plan(17, 1, 6, world, 2)
    read = [
        source.read(int(index))
        for share in plan.shares()
        for index in selection.train(share.epoch, np.arange(share.start, share.stop))
    ]
    assert sorted(read) == sorted(contents(open_source(str(tmp_path / "images"), "key")))


class _Careless(BaseHTTPRequestHandler):
    """Serves one file under its path, whatever stands behind the question mark, as download links do."""

    content = b""
    ranges: ClassVar[list[tuple[str, str | None]]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.ranges.append((self.path, self.headers["Range"]))
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        served = self.path.partition("?")[0] == "/a.tar"
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "") if served else None
        content = self.content[int(span[1]) : int(span[2]) + 1] if span else self.content if served else b""
        self.send_response(206 if span else 200 if served else 404)
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(self.content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_download_link_is_not_read_whole_in_search_of_its_index(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {f"{number}.png": encoded(number) for number in range(3)})
    monkeypatch.setattr(_Careless, "content", (tmp_path / "a.tar").read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), _Careless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = open_source(f"http://127.0.0.1:{server.server_address[1]}/a.tar?download=true", "key", Access())
        assert [source.read(number) for number in range(3)] == [encoded(number) for number in range(3)]
        server.shutdown()
    assert [path for path, span in _Careless.ranges if span is None and path.startswith("/a.tar?")] == []


def test_a_server_that_sends_only_whole_files_is_named(monkeypatch):
    monkeypatch.setattr(storage, "read", lambda name, start, length: bytes(length + 1))
    with pytest.raises(OSError, match="its server sends whole files where parts are asked for"):
        storage.read_exactly("https://host/a.tar", 0, 512, retries=3)


def test_an_index_that_is_too_large_is_none(tmp_path):
    write_shards(tmp_path / "tars", write_images(tmp_path / "images", 3), 3)
    url = "memory://large"
    filesystem = storage._filesystem(url)
    filesystem.pipe(f"{url}/a.tar", (tmp_path / "tars" / "set-000000.tar").read_bytes())
    filesystem.pipe(f"{url}/a.tar.index.json", b" " * 200)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        storage.read_whole(f"{url}/a.tar.index.json", 100)
    assert storage.read_whole(f"{url}/a.tar.index.json", 200) == b" " * 200
    assert len(open_source(f"{url}/a.tar", "key")) == 3
