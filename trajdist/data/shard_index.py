"""What is where in a tar shard, as WebDataset lays one out: ``KEY.jpg``, and perhaps ``KEY.cls`` beside it.

A shard is walked once. Its index is kept beside it as ``SHARD.index.json``, or in a cache folder where nobody may write
there, and is made anew when size or time (or ETag) of the shard change.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from trajdist.data import storage
from trajdist.data.base import EXTENSIONS
from trajdist.data.storage import Version
from trajdist.errors import ArtifactError, DataError
from trajdist.files import write_bytes

BLOCK = tarfile.BLOCKSIZE
SUFFIX = ".index.json"
LARGEST_CLASS = 256  # bytes of a .cls member
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


class ShardIndex(BaseModel):
    """The images of one shard, in its order.

    Attributes:
        version: of the shard when it was walked.
        names: the members' names.
        offsets: of their first byte, in bytes from the shard's beginning.
        sizes: in bytes.
        classes: what ``KEY.cls`` says of each, or else its folder within the shard.
        left_out: by name, image members that are not used, and why.
    """

    FORMAT: ClassVar[int] = 1
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
    format: int = FORMAT
    version: tuple[int, str]
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    classes: list[str]
    left_out: dict[str, str]

    @property
    def is_whole(self) -> bool:
        """Whether it can be what :func:`walk` wrote: a list for each fact, and no member beyond the shard."""
        same = len(self.names) == len(self.offsets) == len(self.sizes) == len(self.classes)
        pairs = zip(self.offsets, self.sizes, strict=False)
        return (
            self.format == self.FORMAT
            and same
            and all(at >= BLOCK and 0 <= size <= self.version[0] - at for at, size in pairs)
        )


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's key, the name up to the first dot of its last part, and the rest in lower case.

    >>> split_key("cats/0001.mask.PNG")
    ('cats/0001', 'mask.png')
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def load_index(shard: str, folder: Path) -> ShardIndex:
    """The index of a shard: as it lies beside it or in ``folder``, or made now and left there.

    Raises:
        DataError: a shard that is damaged, compressed or cut short.
        Exception: whatever the file system or the store raises.
    """
    version = storage.version(shard)
    places = [_beside(shard), lambda: (folder / _cached_name(shard)).read_bytes()]
    for place in places:
        index = _parse(place)
        if index is not None and _is_of(index, shard, version):
            return index
    with storage.open_file(shard) as file:
        index = walk(file, shard, version)
    keep_index(index, shard, folder)
    return index


def _beside(shard: str) -> Callable[[], bytes]:
    name = shard + SUFFIX
    return lambda: storage.read_whole(name) if storage.is_url(shard) else Path(name).read_bytes()


def _cached_name(shard: str) -> str:
    return f"{hashlib.sha256(os.fsencode(shard)).hexdigest()[:16]}-{os.path.basename(shard)[-100:]}{SUFFIX}"


def _parse(read: Callable[[], bytes]) -> ShardIndex | None:
    try:
        index = ShardIndex.model_validate_json(read())
    except Exception:  # Not there, not to be read (each store has errors of its own), or not an index.
        return None
    return index if index.is_whole else None


def _is_of(index: ShardIndex, shard: str, version: Version) -> bool:
    """An index that was uploaded with its shard knows no ETag; each read checks the member's header in any case."""
    size, tag = index.version
    uploaded = storage.is_url(shard) and tag.startswith(storage.LOCAL_TAG)
    return size == version.size and (uploaded or tag == version.tag)


def keep_index(index: ShardIndex, shard: str, folder: Path) -> None:
    """Where it can be kept: beside the shard, else in the folder. Without either, the next process walks the shard."""
    content = index.model_dump_json().encode()
    places = [] if storage.is_url(shard) else [Path(shard + SUFFIX)]
    for place in (*places, folder / _cached_name(shard)):
        with suppress(OSError, ArtifactError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(place, content)
            return


def walk(file: IO[bytes], shard: str, version: Version) -> ShardIndex:
    """Read all headers of a shard.

    Raises:
        DataError: it is damaged, compressed or cut short.
    """
    start = file.read(BLOCK)
    file.seek(0)
    kind = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if kind:
        raise DataError(f"{shard!r} is compressed ({kind}), which allows no random access: unpack it to a plain tar.")
    found = _Walk()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                found.add(tar, member)
                tar.members = []  # type: ignore[attr-defined]  # It would keep them all.
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard!r} is damaged or cut short ({error}): copy or pack it again.") from None
    _check_end(file, end, shard, version)
    return found.index(version)


def _check_end(file: IO[bytes], end: int, shard: str, version: Version) -> None:
    """tarfile takes damage in the middle for the end."""
    file.seek(end)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise DataError(f"{shard!r} is cut short: it ends at byte {version.size:,} without a mark. Copy it again.")
    if any(mark):
        raise DataError(f"{shard!r} is damaged at byte {end:,} of {version.size:,}: copy or pack it again.")
    while rest := file.read(storage.PIECE):
        if any(rest):
            raise DataError(f"{shard!r} goes on after its end at byte {end:,}: two archives in one file; split them.")


class _Image(NamedTuple):
    name: str
    offset: int
    size: int


class _Walk:
    """Members as they come."""

    def __init__(self) -> None:
        self._images: dict[str, _Image] = {}
        self._classes: dict[str, str] = {}
        self._left_out: dict[str, str] = {}

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Take a member for an image, a class, or neither."""
        key, extension = split_key(member.name)
        if os.path.basename(member.name).startswith("."):
            return
        if extension == "cls" and member.isreg() and member.size <= LARGEST_CLASS:
            content = tar.extractfile(member)
            self._classes[key] = content.read().decode(errors="replace").strip() if content else ""
        elif member.name.lower().endswith(EXTENSIONS) and not member.isdir():
            self._add_image(key, member)

    def _add_image(self, key: str, member: tarfile.TarInfo) -> None:
        reason = None
        if not member.isreg():
            reason = "it is a link or a device"
        elif member.issparse():
            reason = "it is a sparse file"
        elif key in self._images:
            reason = f"its key {key!r} is that of {self._images[key].name!r}"
        if reason is None:
            self._images[key] = _Image(_printable(member.name), member.offset_data, member.size)
        else:
            # A name that comes again must not hide the first complaint.
            self._left_out[f"{member.name} at byte {member.offset}"] = reason

    def index(self, version: Version) -> ShardIndex:
        return ShardIndex(
            version=(version.size, version.tag),
            names=[image.name for image in self._images.values()],
            offsets=[image.offset for image in self._images.values()],
            sizes=[image.size for image in self._images.values()],
            classes=[self._classes.get(key) or os.path.dirname(key) for key in self._images],
            left_out={_printable(name): reason for name, reason in self._left_out.items()},
        )


def _printable(name: str) -> str:
    """JSON takes no names that are no UTF-8."""
    return name.encode(errors="backslashreplace").decode()
