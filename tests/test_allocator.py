"""Freed memory stays with the process: the same blocks again cost no fresh pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from trajdist.allocator import SETTINGS

PAGE = 4096
BYTES = 64 * 2**20
# Page faults of allocating a large tensor for the second time, and what the allocator said of itself.
SECOND_TIME = f"""
import resource, torch
from trajdist.allocator import keep_freed_memory, trim
print(keep_freed_memory())
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({BYTES}, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
held = int(open("/proc/self/statm").read().split()[1])
trim()
print(held - int(open("/proc/self/statm").read().split()[1]))
"""


def second_time(**environment: str) -> tuple[str, int, int]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", SECOND_TIME], env=clean | environment, capture_output=True, text=True, check=True
    )
    said, faults, trimmed = done.stdout.split()
    return said, int(faults), int(trimmed)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_are_kept_until_they_are_given_back():
    said, faults, trimmed = second_time()
    assert said == "True"
    assert faults < BYTES / PAGE / 10
    assert trimmed > BYTES / PAGE / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_who_has_chosen_keeps_what_they_chose():
    assert second_time(MALLOC_MMAP_THRESHOLD_=str(2**20))[0] == "False"
