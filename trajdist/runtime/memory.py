"""Memory: how much a process and its device use, and what is said when there is not enough."""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from trajdist.errors import TrainingError
from trajdist.runtime.processes import Processes, why_it_failed


@functools.cache
def _this_process() -> psutil.Process:
    return psutil.Process()


def memory_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on a CUDA or MPS device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return int(_this_process().memory_info().rss)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of :func:`peak_memory_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes in use since the reset: allocated on CUDA, else resident (without /proc: since the process started).

    MPS records no peak: there it is what Metal holds for this process now, free blocks included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def naming_memory(processes: Processes, fix: Callable[[str], str]) -> Iterator[None]:
    """Turn an out-of-memory error in the block into one sentence that ends with ``fix`` of the device type.

    Raises:
        TrainingError: there was not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        # A process that trains on a GPU decodes images in host memory.
        on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        device = torch.device("cpu") if on_host else processes.device
        what = why_it_failed(error) or type(error).__name__
        raise TrainingError(
            f"process {processes.rank} ran out of memory on {device} ({what}): {fix(device.type)}."
        ) from error


def lacks_memory(error: Exception) -> bool:
    """Whether memory ran out.

    CUDA has an exception type for it; MPS, CUDA's libraries and torch's CPU allocator only have messages.
    """
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def empty_cache(device: torch.device) -> None:
    """Return the allocator's free blocks to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
