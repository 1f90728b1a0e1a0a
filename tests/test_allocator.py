"""Freed memory stays with the process: the same blocks again cost, after a while, no fresh pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from trajdist.allocator import HUGE_PAGES, SETTINGS

PAGE = 4096
BYTES = 64 * 2**20
# Page faults of allocating a large tensor again, and what the allocator said of itself. Small objects take a bite of
# the first blocks that are freed, so that the next one does not fit there: a dozen times at most.
AGAIN = f"""
import resource, torch
from trajdist.allocator import keep_freed_memory, trim
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


# Bytes in huge pages after a large tensor; everything that a run imports is there already.
HUGE = f"""
import torch, torchvision, accelerate
from trajdist import training
from trajdist.allocator import keep_freed_memory
keep_freed_memory()
tensor = torch.ones({BYTES}, dtype=torch.uint8)
print(*(1024 * int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def printed(program: str, **environment: str) -> list[str]:
    ours = (*SETTINGS, "GLIBC_TUNABLES", HUGE_PAGES)
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()


def again(**environment: str) -> tuple[str, int, int]:
    said, faults, trimmed = printed(AGAIN, **environment)
    return said, int(faults), int(trimmed)


@pytest.mark.skipif(
    not KERNEL.is_file() or "[madvise]" not in KERNEL.read_text(), reason="huge pages are not asked for"
)
def test_large_tensors_are_in_huge_pages():
    assert int(*printed(HUGE)) > BYTES / 2
    assert int(*printed(HUGE, **{HUGE_PAGES: "0"})) < BYTES / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_are_kept_until_they_are_given_back():
    said, faults, trimmed = again()
    assert said == "True"
    assert faults < BYTES / PAGE / 10
    assert trimmed > BYTES / PAGE / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_who_has_chosen_keeps_what_they_chose():
    assert again(MALLOC_MMAP_THRESHOLD_=str(2**20))[0] == "False"
    assert again(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576")[0] == "False"
    assert again(GLIBC_TUNABLES="glibc.malloc.perturb=0")[0] == "True"
