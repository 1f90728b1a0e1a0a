"""The C heap: freed memory stays with the process, so that no step pays for fresh pages.

A training step on a CPU allocates and frees the same large blocks again and again. By default glibc returns each of
them to the system and requests it again, and the kernel zeroes every page: a fifth to a third of the time of a
backbone's forward (docs/LOG.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# The same settings as glibc tunables. If the user set any of these, leave the heap alone.
TUNABLES = ("glibc.malloc.mmap_max", "glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold")


def keep_freed_memory() -> bool:
    """Serve blocks of any size from the heap and keep them. False if the user or the C library does not allow it."""
    if _chosen():
        return False
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, NEVER))
    return False


def _chosen() -> bool:
    """Whether the environment already configures the heap."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in SETTINGS) or any(name in tunables for name in TUNABLES)


def trim() -> None:
    """Return free memory to the system once: what comes next needs blocks of other sizes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
