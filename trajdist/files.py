"""Files written atomically, and JSON read in bounded memory. Does not import torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trajdist.errors import ArtifactError, os_errors

GIB = 2**30

# Far more than trajdist writes; a malicious file must not fill the memory.
LARGEST_JSON = 2**26


def user_path(path: str | Path) -> Path:
    """A path as the user wrote it, with ``~`` and ``~name`` replaced by home folders; an unknown ``~name`` stays."""
    return Path(os.path.expanduser(path))


def exists(path: Path) -> bool:
    """Whether there is a file or folder of that name.

    Python's own methods raise where the system does not say, or, since Python 3.14, say no: what is only out of reach
    would be reported as gone, or made anew.

    Raises:
        ArtifactError: the system does not say.
    """
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Whether it is a file; see :func:`exists`."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether it is a folder; see :func:`exists`."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """The kind and permissions of what has that name; 0 if nothing has."""
    with os_errors(f"{str(path)!r} cannot be reached", fix="make its folder accessible or name another"):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have such a name.
            return 0


def open_regular(path: str, flags: int) -> int:
    """``os.open`` for regular files alone: a pipe could block, and a device may have no end.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        os.set_blocking(descriptor, True)  # Hierarchical storage recalls a file only for a blocking read.
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file for the block to write, which then replaces ``path``: it is either complete or as it was before.

    Raises:
        OSError: the file cannot be written.
    """
    # A random name: process ids may coincide on machines that share a network folder.
    temporary = path.with_name(_unfinished(path, uuid.uuid4().hex))
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of :func:`replacing`; called where no other replaces the file."""
    for left in path.parent.glob(_unfinished(path, "*")):
        left.unlink()


def _unfinished(path: Path, mark: str) -> str:
    return f".{path.name}.{mark}.tmp"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically; see :func:`replacing`.

    Raises:
        ArtifactError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise ArtifactError(
            f"{str(path)!r} cannot be written ({error.strerror}): free some space or make the folder writable; "
            "what was there before is untouched."
        ) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal, read in constant memory.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    digest = hashlib.sha256()
    with open(path, "rb", opener=open_regular) as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file.

    Raises:
        OSError: the write failed, or was short: a disk that fills up may accept part of the data without an error.
    """
    if os.pwrite(descriptor, data, offset) < data.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hold(path: Path) -> int | None:
    """Open a lock file and hold it until its descriptor is closed or the process ends, where the file system can lock.

    Returns:
        The descriptor, or None if another process holds the lock.

    Raises:
        OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        # A POSIX record lock belongs to the process: forked workers that outlive the trainer must not keep it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except OSError:
        pass  # Some network file systems do not support locks.
    return descriptor


def is_held(path: Path) -> bool | None:
    """Whether another process holds a lock file (:func:`hold`); None if that cannot be determined.

    Not for the process that holds it: closing the file again drops its lock.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def sync_contents(descriptor: int) -> None:
    """Make what was written to an open file survive a power cut.

    Raises:
        OSError: the file system reports that it could not be written.
    """
    getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has no fdatasync.


def sync_file(path: Path) -> None:
    """Make the contents of a file survive a power cut."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, if the file system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # Some network file systems cannot sync folders; the files themselves are synced.
    finally:
        os.close(handle)


def copy_mode(source: Path, target: Path) -> None:
    """Give a file the permissions of another: safetensors makes its files readable only by the owner."""
    with contextlib.suppress(OSError):  # Not every file system has modes.
        shutil.copymode(source, target)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically.

    Raises:
        ArtifactError: the file cannot be written.
    """
    write_bytes(path, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ArtifactError: see :func:`read_json`, or the document is something else.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise ArtifactError(f"{str(path)!r} is damaged: it is not a JSON object.")
    return document


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        ArtifactError: the file is missing, is not a regular file or not JSON, or is too large to be one of trajdist's.
    """
    try:
        with open(path, "rb", opener=open_regular) as handle:
            raw = handle.read(LARGEST_JSON + 1)
    except OSError as error:
        raise ArtifactError(f"{str(path)!r} cannot be read ({error.strerror}).") from None
    if len(raw) > LARGEST_JSON:
        raise ArtifactError(f"{str(path)!r} is damaged: it has more than {LARGEST_JSON:,} bytes.")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{str(path)!r} is damaged: it is not JSON.") from None
