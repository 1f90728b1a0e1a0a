"""Freed memory stays with the process: the same blocks again cost, after a while, no fresh pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from trajdist.runtime.allocator import SETTINGS

PAGE = 4096
BYTES = 64 * 2**20
# Page faults of allocating a large tensor again, and what the allocator said of itself. Small objects take a bite of
# the first blocks that are freed, so that the next one does not fit there: a dozen times at most.
AGAIN = f"""
import resource, torch
from trajdist.runtime.allocator import keep_freed_memory, trim
print(keep_freed_memory())
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({BYTES}, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
held = int(open("/proc/self/statm").read().split()[1])
trim()
print(held - int(open("/proc/self/statm").read().split()[1]))
"""
ONCE = "from trajdist.runtime.allocator import keep_freed_memory; print(keep_freed_memory())"


def said(code: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_are_kept_until_they_are_given_back():
    kept, faults, trimmed = said(AGAIN)
    assert kept == "True"
    assert int(faults) < BYTES / PAGE / 10
    assert int(trimmed) > BYTES / PAGE / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_who_has_chosen_keeps_what_they_chose():
    assert said(ONCE, MALLOC_MMAP_THRESHOLD_=str(2**20)) == ["False"]
    assert said(ONCE, GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576") == ["False"]
    assert said(ONCE, GLIBC_TUNABLES="glibc.malloc.perturb=0") == ["True"]
