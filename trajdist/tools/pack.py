"""``trajdist pack``: pack image files into tar shards in WebDataset's layout; each shard is written atomically.

The order of images is kept: image 17 of the shards is image 17 of the folder. A shard is written to a temporary file,
read back and compared with memory, then renamed. Rerunning the same command resumes after the last complete shard.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console

from trajdist.data.base import EncodedSource
from trajdist.data.decode import to_square
from trajdist.data.shard_index import BLOCK, ShardIndex, keep_index, printable, scan, split_key
from trajdist.data.storage import version
from trajdist.errors import ArtifactError, ConfigError, first_problem, os_errors
from trajdist.files import read_json, sha256, sync_file, sync_folder, write_bytes, write_json
from trajdist.runtime.progress import Progress
from trajdist.tables import counted
from trajdist.tools.preparation import Options, Packed, prepared

TRIAL = 64  # images in the speed comparison
TRIAL_SIZE = 224  # pixels


class Shard(BaseModel):
    """A complete shard, as ``pack.json`` notes it."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    # What it names may be removed, so it must be in the folder.
    name: str = Field(pattern=r"^shard-[0-9]{6,}\.tar$")
    images: int = Field(gt=0)
    bytes: int
    sha256: str
    source_bytes: int
    renamed: int
    not_decoded: int = Field(ge=0)


def pack(source: EncodedSource, title: str, out: Path, options: Options, workers: int, console: Console) -> None:
    """Write the images of a source to shards, or resume where an earlier command stopped.

    Args:
        source: the images.
        title: the source's name in the report.
        out: output folder, created if missing; also gets ``pack.json`` and ``bad_images.jsonl``.
        options: how shards are written.
        workers: processes that read and scale; below 2, the calling process does.
        console: where to report.

    Raises:
        ConfigError: the folder contains something else.
        ArtifactError: the folder cannot be written, ``pack.json`` is damaged, or a shard does not read back as written.
        DataError: a file cannot be read.
        TrainingError: a worker process was killed.
    """
    if os.path.realpath(os.path.expanduser(title)) == os.path.realpath(out):
        raise ConfigError(f"OUT={str(out)!r} is SOURCE, and would hold images as well as shards: name another.")
    packing = Packing(out, source, options)
    fix = "free some space or make it writable and run the same command again; it resumes after the last complete shard"
    with os_errors(f"{str(out)!r} cannot be written", fix):
        packing.begin()
        with Progress(console, "packing", len(source), packing.done) as progress:
            for shard in packing.shards_to_write(prepared(source, options, packing.done, len(source), workers)):
                packing.write(shard)
                progress.advance(packing.done)
    console.print(packing.describe(title))
    console.print(_compare_speed(source, packing))


class Packing:
    """The state of the output folder, as recorded in ``pack.json``."""

    def __init__(self, out: Path, source: EncodedSource, options: Options) -> None:
        self.out, self._options = out, options
        self._source, self._classes = source, source.classes()
        self._plan = {
            "format": 1,
            "fingerprint": source.fingerprint,
            "contents": source.stamp(),
            "num_images": len(source),
            **asdict(options),
        }
        self.shards: list[Shard] = []

    @property
    def done(self) -> int:
        """Number of images in complete shards."""
        return sum(shard.images for shard in self.shards)

    def begin(self) -> None:
        """Prepare the folder, keeping complete shards that were written from the same images with the same options.

        Raises:
            ConfigError: it contains shards of other images or options, or unrelated tar files.
            ArtifactError: ``pack.json`` is damaged.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        noted = self._noted()
        # A killed command may leave one shard more than it has recorded.
        own = set() if noted is None else {*(shard.name for shard in noted), _shard_name(len(noted))}
        # Training on the folder would read any other archive in it as well.
        if foreign := sorted(path.name for path in self.out.glob("[!.]*.tar") if path.name not in own):
            raise ConfigError(f"OUT={str(self.out)!r} holds {foreign[0]!r}, none of its shards: name another folder.")
        self.shards = list(takewhile(self._is_whole, noted or []))
        whole = {shard.name for shard in self.shards}
        for path in (*self.out.glob(".shard-*.part"), *(self.out / name for name in own - whole)):
            path.unlink(missing_ok=True)
        self._keep_bad(sum(shard.not_decoded for shard in self.shards))
        self._note()

    def _noted(self) -> list[Shard] | None:
        """The shards that ``pack.json`` notes; None if there is no such file."""
        path = self.out / "pack.json"
        if not path.exists():
            return None
        known = read_json(path)
        if not isinstance(known, dict) or known.get("plan") != self._plan:
            raise ConfigError(f"OUT={str(self.out)!r} holds shards of other images or options: name another folder.")
        try:
            return TypeAdapter(list[Shard]).validate_python(known.get("shards"))
        except ValidationError as error:
            field, why = first_problem(error)
            where = f"shards.{field}".rstrip(".")
            raise ArtifactError(
                f"{str(path)!r} is damaged ({where}: {why}): restore it, or name another folder."
            ) from None

    def _keep_bad(self, count: int) -> None:
        """Keep ``count`` lines of ``bad_images.jsonl``: a killed command may have added those of another shard."""
        path = self.out / "bad_images.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            write_bytes(path, b"".join(lines[:count]))

    def _is_whole(self, shard: Shard) -> bool:
        path = self.out / shard.name
        return path.is_file() and path.stat().st_size == shard.bytes

    def _note(self) -> None:
        shards = [shard.model_dump() for shard in self.shards]
        write_json(self.out / "pack.json", {"plan": self._plan, "shards": shards})

    def shards_to_write(self, images: Iterator[Packed]) -> Iterator[list[tuple[Packed, str | None]]]:
        """Group images with their class labels (None without classes) into shards."""
        shard: list[tuple[Packed, str | None]] = []
        taken = 2 * BLOCK  # The end-of-archive marker.
        for number, image in enumerate(images, start=self.done):
            label = self._label(number)
            size = _taken_by(image.content) + (0 if label is None else _taken_by(label.encode()))
            if shard and taken + size > self._options.shard_bytes:
                yield shard
                shard, taken = [], 2 * BLOCK
            shard.append((image, label))
            taken += size
        if shard:
            yield shard

    def _label(self, number: int) -> str | None:
        """The content of an image's ``.cls`` member: its own label, or the number of its class."""
        label = self._source.label(number)
        return str(self._classes[number]) if label is None and self._classes is not None else label

    def write(self, images: list[tuple[Packed, str | None]]) -> None:
        """Write the next shard and verify it.

        Raises:
            ArtifactError: it does not read back as written.
            OSError: it cannot be written.
        """
        path = self.out / _shard_name(len(self.shards))
        part = path.with_name(f".{path.name}.part")
        named = _with_member_names(images)
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, image, label in named:
                _add(tar, name, image.content)
                if label is not None:
                    _add(tar, f"{split_key(name)[0]}.cls", label.encode())
        sync_file(part)
        index = _checked(part, named)
        os.replace(part, path)
        keep_index(index, str(path), self.out)
        sync_folder(self.out)
        self._note_shard(path, named)

    def _note_shard(self, path: Path, named: list[tuple[str, Packed, str | None]]) -> None:
        problems = [image for _, image, _ in named if image.problem]
        with open(self.out / "bad_images.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"image": bad.name, "reason": bad.problem}) + "\n" for bad in problems)
        self.shards.append(
            Shard(
                name=path.name,
                images=len(named),
                bytes=path.stat().st_size,
                sha256=sha256(path),
                source_bytes=sum(image.source_bytes for _, image, _ in named),
                renamed=sum(image.name != name for name, image, _ in named),
                not_decoded=len(problems),
            )
        )
        self._note()

    def describe(self, title: str) -> str:
        """A summary of the folder's contents."""
        size, before = (sum(getattr(shard, key) for shard in self.shards) for key in ("bytes", "source_bytes"))
        renamed, bad = (sum(getattr(shard, key) for shard in self.shards) for key in ("renamed", "not_decoded"))
        text = (
            f"{self.done:,} images of {title} are in {counted(len(self.shards), 'shard')} in {str(self.out)!r}: "
            f"{size / 2**20:,.2f} MiB, the files had {before / 2**20:,.2f} MiB."
        )
        if renamed:
            text += f" {renamed} names changed, as WebDataset's extensions start at the first dot."
        if bad:
            text += f" {bad} could not be decoded and are packed as they are; bad_images.jsonl names them."
        return text


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _taken_by(content: bytes) -> int:
    return BLOCK + -(-len(content) // BLOCK) * BLOCK


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _checked(part: Path, named: list[tuple[str, Packed, str | None]]) -> ShardIndex:
    """Read a shard back as training will, and compare it with memory; returns its index.

    Raises:
        ArtifactError: it differs.
    """
    with open(part, "rb") as file:
        index = scan(file, str(part), version(str(part)))
        same = index.names == [printable(name) for name, _, _ in named]
        for offset, (_, image, _) in zip(index.offsets, named, strict=False):
            file.seek(offset)
            same = same and file.read(len(image.content)) == image.content
    if not same:
        part.unlink()
        raise ArtifactError(f"{str(part)!r} does not read back as it was written: check the disk.")
    return index


def _with_member_names(images: list[tuple[Packed, str | None]]) -> list[tuple[str, Packed, str | None]]:
    """Member names with unique WebDataset keys: a key ends at the first dot, so further dots become underscores."""
    taken: set[str] = set()
    found = []
    for image, label in images:
        folder, slash, last = image.name.rpartition("/")
        stem, _, ending = last.rpartition(".")
        key = choice = folder + slash + stem.replace(".", "_")
        number = 1
        while choice in taken:
            number += 1
            choice = f"{key}_{number}"
        taken.add(choice)
        found.append((f"{choice}.{ending}", image, label))
    return found


def _compare_speed(source: EncodedSource, packing: Packing) -> str:
    """Compare the reading speed of the same images from source and shards, on one core."""
    from trajdist.data.shards import TarShards
    from trajdist.data.storage import Access

    packed = TarShards([str(packing.out / shard.name) for shard in packing.shards], "OUT", Access())
    chosen = np.random.default_rng(0).permutation(len(source))[:TRIAL].tolist()
    before, after = _rate(source, chosen), _rate(packed, chosen)
    if not before or not after:
        return "no image could be decoded to compare the speed."
    return (
        f"one core decodes {after:.0f} images/s from the shards, {before:.0f} from the source "
        f"({after / before:.2f} times as many; {len(chosen)} images, {TRIAL_SIZE} pixels)."
    )


def _rate(source: EncodedSource, chosen: list[int]) -> float:
    """Images read, decoded and resized per second; the second pass counts, when all is in the page cache."""
    seconds, good = 0.0, 0
    for _ in range(2):
        good, begun = 0, time.perf_counter()
        for index in chosen:
            try:
                to_square(source.load(index, TRIAL_SIZE), TRIAL_SIZE, "crop")
            except Exception:  # Reported during packing.
                continue
            good += 1
        seconds = time.perf_counter() - begun
    return good / seconds
