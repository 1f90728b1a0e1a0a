"""Images/s per core by storage format and by decoder. Measurements are interleaved in one run.

    python benchmarks/data.py --images DIR [--count 200] [--rounds 5] [--size 224] [--json FILE]

Reading: the same photographs as a folder, as tar shards of the unchanged files ("tar"), and as tar shards written with
``trajdist pack --short-side 256`` ("packed"); the packed shards also from an S3 server on this machine, directly and
through the local cache; and WebDataset's own loader on the same shards with the same decoding. Everything is in the
page cache. Decoding: bytes in memory to a square uint8 image, by several libraries (``pip install simplejpeg``; the
others come with the extra ``dev``).

Photographs are saved as JPEG at quality 95 first. Those smaller than twice ``--size`` are scaled up, because the images
of ImageNet are usually larger than those in samples of it; ``--as-they-are`` keeps their size.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ratio
from PIL import Image
from rich.console import Console
from rich.table import Table

from trajdist.data.base import EncodedSource
from trajdist.data.decode import decode, to_rgb, to_square
from trajdist.data.sources import open_source
from trajdist.data.storage import Access
from trajdist.tools.pack import pack
from trajdist.tools.preparation import Options

Work = Callable[[], int]


def enlarge(images: str, folder: Path, count: int, short_side: int) -> Path:
    """Save up to ``count`` images as JPEGs whose short side is at least ``short_side`` pixels."""
    source = open_source(images, "--images")
    folder.mkdir()
    for index in range(min(count, len(source))):
        image = source.load(index, None)
        factor = max(1.0, short_side / min(image.size))
        size = (round(image.width * factor), round(image.height * factor))
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:06d}.jpg", quality=95)
    return folder


def read_all(source: EncodedSource, size: int, order: list[int]) -> Work:
    def work() -> int:
        for index in order:
            to_square(source.load(index, size), size, "crop")
        return len(order)

    return work


def webdataset_reads(folder: Path, size: int) -> Work:
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))

    def work() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        return sum(to_square(decode(sample["jpg"], size), size, "crop").shape[0] > 0 for sample in samples)

    return work


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Serve a folder's shards from moto's S3 server; yields their URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client("s3")
    client.create_bucket(Bucket="benchmark")
    for path in folder.glob("shard-*"):
        client.upload_file(str(path), "benchmark", path.name)
    yield "s3://benchmark/"
    server.stop()


def decoders(files: list[bytes], size: int) -> dict[str, Work]:
    """Decoders by name; each decodes every file to a square."""

    def with_pillow(draft: bool) -> Work:
        return lambda: sum(to_square(decode(raw, size if draft else None), size, "crop").ndim == 3 for raw in files)

    def with_torchvision() -> int:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2.functional import center_crop, resize

        for raw in files:
            image = decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8), ImageReadMode.RGB)
            center_crop(resize(image, [size], antialias=True), [size, size])
        return len(files)

    def with_simplejpeg() -> int:
        import simplejpeg

        for raw in files:
            pixels = simplejpeg.decode_jpeg(raw, min_height=2 * size, min_width=2 * size, min_factor=1)
            to_square(Image.fromarray(pixels), size, "crop")
        return len(files)

    return {
        "Pillow, draft (the product)": with_pillow(True),
        "Pillow, whole": with_pillow(False),
        "torchvision.io": with_torchvision,
        "simplejpeg, scaled": with_simplejpeg,
    }


def interleaved(ways: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Images/s of each workload in each round, after a warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn, (name, work) in itertools.product(range(rounds + 1), ways.items()):
        started = time.perf_counter()
        count = work()
        if turn:
            rates[name].append(count / (time.perf_counter() - started))
    return rates


def summary(rates: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Median images/s, and the ratio to ``base`` within each round."""
    return {
        name: {"images_per_s": statistics.median(values), "ratio": ratio(values, rates[base])}
        for name, values in rates.items()
    }


def table(title: str, results: dict[str, Any], base: str) -> Table:
    drawn = Table(title=title, title_justify="left")
    for column in ("", "images/s", f"times {base}", "spread"):
        drawn.add_column(column, justify="left" if not column else "right")
    for name, one in results.items():
        times = one["ratio"]
        spread = f"{times['least']:.2f}-{times['greatest']:.2f}"
        drawn.add_row(name, f"{one['images_per_s']:.0f}", f"{times['median']:.2f}", spread)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--as-they-are", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, size = Console(), arguments.size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = 1 if arguments.as_they_are else 2 * size
        images = open_source(str(enlarge(arguments.images, folder / "images", arguments.count, side)), "--images")
        assert isinstance(images, EncodedSource)
        quiet = Console(quiet=True)
        pack(images, "", folder / "tar", Options(2**23), 1, quiet)
        pack(images, "", folder / "packed", Options(2**23, 256), 1, quiet)
        order = np.random.default_rng(0).permutation(len(images)).tolist()
        with s3_server(folder / "packed") as url:
            near = Access(cache_dir=str(folder / "cache"), cache_gib=1.0)
            ways = {
                "folder": read_all(images, size, order),
                "tar": read_all(_opened(folder / "tar"), size, order),
                "tar, in order": read_all(_opened(folder / "tar"), size, sorted(order)),
                "tar, WebDataset": webdataset_reads(folder / "tar", size),
                "packed": read_all(_opened(folder / "packed"), size, order),
                "packed, WebDataset": webdataset_reads(folder / "packed", size),
                "packed, S3 on this machine": read_all(_opened(url), size, order),
                "packed, S3, cached": read_all(_opened(url, near), size, order),
            }
            reading = summary(interleaved(ways, arguments.rounds), "folder")
            pairs = {"tar": "tar, WebDataset", "tar, in order": "tar, WebDataset", "packed": "packed, WebDataset"}
            rates = interleaved(
                {way: ways[way] for way in {**pairs, **dict.fromkeys(pairs.values())}}, arguments.rounds
            )
        files = [images.read(index) for index in range(len(images))]
        shape = to_rgb(Image.open(io.BytesIO(files[0]))).size
        decoding = summary(interleaved(decoders(files, size), arguments.rounds), "Pillow, draft (the product)")
    against = {way: summary({way: rates[way], base: rates[base]}, base)[way] for way, base in pairs.items()}
    console.print(f"{len(files)} photographs, the first has {shape[0]} x {shape[1]} pixels, one core\n")
    console.print(table("read, decoded, made square", reading, "folder"))
    console.print(table("the same shards and decoding", against, "WebDataset"))
    console.print(table("decoded and made square", decoding, "the product"))
    if arguments.json:
        document = {"reading": reading, "against_webdataset": against, "decoding": decoding}
        arguments.json.write_text(json.dumps(document, indent=2))


def _opened(path: Path | str, access: Access | None = None) -> EncodedSource:
    source = open_source(str(path), "--images", access)
    assert isinstance(source, EncodedSource)
    return source


if __name__ == "__main__":
    main()
