"""Member index of a tar shard in WebDataset's layout: ``KEY.jpg``, optionally with ``KEY.cls``.

A shard is scanned once. The index is saved next to it as ``SHARD.index.json``, or in a cache folder if that location is
not writable, and is rebuilt when the shard's size or modification time (or ETag) changes.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
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
LARGEST = 2**28  # bytes of an index; an image takes about 80
LARGEST_CLASS = 256  # bytes; larger .cls members are ignored
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


class ShardIndex(BaseModel):
    """The images of one shard, in archive order.

    Attributes:
        version: size in bytes and tag of the shard when it was scanned.
        names: member names.
        offsets: of each member's first content byte, from the start of the shard.
        sizes: of the contents, in bytes.
        headers: CRC-32 of the header blocks that precede the contents, to detect changes since indexing.
        classes: the content of ``KEY.cls``, or else the member's folder within the shard.
        left_out: image members that are skipped, by name, and why.
    """

    FORMAT: ClassVar[int] = 2
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
    format: int = FORMAT
    version: tuple[int, str]
    names: list[str]
    offsets: list[int]
    sizes: list[int]
    headers: list[int]
    classes: list[str]
    left_out: dict[str, str]

    @property
    def is_whole(self) -> bool:
        """Whether it is well-formed: the known format, equal lists, no NUL in a name, no member outside the shard."""
        lists = self.offsets, self.sizes, self.headers, self.classes
        same = all(len(values) == len(self.names) for values in lists)
        pairs = zip(self.offsets, self.sizes, strict=False)
        return (
            self.format == self.FORMAT
            and same
            and not any("\0" in name for name in self.names)
            and all(0 <= header < 2**32 for header in self.headers)
            and all(at >= BLOCK and 0 <= size <= self.version[0] - at for at, size in pairs)
        )


def split_key(name: str) -> tuple[str, str]:
    """Split a member name into WebDataset's key (up to the first dot of the base name) and lower-case extension.

    >>> split_key("cats/0001.mask.PNG")
    ('cats/0001', 'mask.png')
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def load_index(shard: str, folder: Path) -> ShardIndex:
    """The index of a shard: the one saved next to it or in ``folder`` if still valid, else built and saved now.

    Raises:
        DataError: the shard is damaged, compressed or truncated.
        Exception: whatever the file system or the store raises.
    """
    version = storage.version(shard)
    locations = [_beside(shard), lambda: (folder / _cached_name(shard)).read_bytes()]
    for location in locations:
        index = _parse(location)
        if index is not None and _is_of(index, shard, version):
            return index
    with storage.open_file(shard) as file:
        index = scan(file, shard, version)
    keep_index(index, shard, folder)
    return index


def _beside(shard: str) -> Callable[[], bytes]:
    if not storage.is_url(shard):
        return Path(shard + SUFFIX).read_bytes
    address, mark, query = shard.partition("?")
    return lambda: storage.read_whole(address + SUFFIX + mark + query, LARGEST)


def _cached_name(shard: str) -> str:
    return f"{hashlib.sha256(os.fsencode(shard)).hexdigest()[:16]}-{os.path.basename(shard)[-100:]}{SUFFIX}"


def _parse(read: Callable[[], bytes]) -> ShardIndex | None:
    try:
        index = ShardIndex.model_validate_json(read())
    except Exception:  # Missing, unreadable (every store has its own errors), or not an index.
        return None
    return index if index.is_whole else None


def _is_of(index: ShardIndex, shard: str, version: Version) -> bool:
    """Whether an index belongs to this version of the shard.

    An index uploaded along with its shard has no ETag, so only the size is compared: every read checks the member's
    header anyway.
    """
    size, tag = index.version
    uploaded = storage.is_url(shard) and tag.startswith(storage.LOCAL_TAG)
    return size == version.size and (uploaded or tag == version.tag)


def keep_index(index: ShardIndex, shard: str, folder: Path) -> None:
    """Save the index next to the shard, else in ``folder``; if neither works, the next process has to scan again."""
    content = index.model_dump_json().encode()
    locations = [] if storage.is_url(shard) else [Path(shard + SUFFIX)]
    for location in (*locations, folder / _cached_name(shard)):
        with suppress(OSError, ArtifactError):
            location.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(location, content)
            return


def scan(file: IO[bytes], shard: str, version: Version) -> ShardIndex:
    """Scan all member headers of a shard.

    Args:
        file: the shard, opened at its start; must be seekable.
        shard: its path or URL, for error messages.
        version: recorded in the index.

    Raises:
        DataError: it is damaged, compressed or truncated.
    """
    start = file.read(BLOCK)
    file.seek(0)
    kind = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if kind:
        raise DataError(f"{shard!r} is compressed ({kind}), which allows no random access: unpack it to a plain tar.")
    found = _Walk(file)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                found.add(tar, member)
                tar.members = []  # type: ignore[attr-defined]  # Or it keeps them all.
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard!r} is damaged or cut short ({error}): copy or pack it again.") from None
    _check_end(file, end, shard, version)
    return found.index(version)


def _check_end(file: IO[bytes], end: int, shard: str, version: Version) -> None:
    """Check the end-of-archive marker: tarfile mistakes damage in the middle for the end.

    Raises:
        DataError: the marker is missing, or more data follows it.
    """
    file.seek(end)
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise DataError(f"{shard!r} is cut short: it ends at byte {version.size:,} without an end mark: copy it again.")
    if any(mark):
        raise DataError(f"{shard!r} is damaged at byte {end:,} of {version.size:,}: copy or pack it again.")
    while rest := file.read(storage.PIECE):
        if any(rest):
            raise DataError(f"{shard!r} continues after its end at byte {end:,}: split the two archives in it.")


class _Image(NamedTuple):
    name: str
    offset: int
    size: int
    header: int


class _Walk:
    """Collects an index while the members are scanned."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._images: dict[str, _Image] = {}
        self._classes: dict[str, str] = {}
        self._left_out: dict[str, str] = {}

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Record a member as an image or a class label; ignore any other."""
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
            header = zlib.crc32(self._block(member.offset_data - BLOCK))
            self._images[key] = _Image(printable(member.name), member.offset_data, member.size, header)
        else:
            # The offset keeps duplicates of a name apart, so that each one is reported.
            self._left_out[f"{member.name} at byte {member.offset}"] = reason

    def _block(self, offset: int) -> bytes:
        # tarfile has no public way to see a block as it reads it; it seeks before the next one.
        self._file.seek(offset)
        return self._file.read(BLOCK)

    def index(self, version: Version) -> ShardIndex:
        return ShardIndex(
            version=(version.size, version.tag),
            names=[image.name for image in self._images.values()],
            offsets=[image.offset for image in self._images.values()],
            sizes=[image.size for image in self._images.values()],
            headers=[image.header for image in self._images.values()],
            classes=[self._classes.get(key) or printable(os.path.dirname(key)) for key in self._images],
            left_out={printable(name): reason for name, reason in self._left_out.items()},
        )


def printable(name: str) -> str:
    """A name for an index and for files: JSON holds no invalid UTF-8, file names no NUL, which tar's may."""
    return name.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
