"""The machine: Accelerate set-up, the process group, signals and memory readings."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    send_to_device,
)

from trajdist import launcher
from trajdist.errors import ConfigError, TrainingError, UserError, one_line
from trajdist.runtime.allocator import keep_freed_memory

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
Batch = TypeVar("Batch")
Answer = TypeVar("Answer")


def start_accelerator(
    mixed_precision: str, timeout_s: float, deterministic: bool, init_method: str | None = None
) -> Accelerator:
    """Set up Accelerate for this job: precision, process group with a timeout, no random state of its own.

    Raises:
        ConfigError: a precision that this machine does not support.
        TrainingError: processes that cannot reach each other.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device_type() == "cpu":
        keep_freed_memory()
    try:
        return Accelerator(
            mixed_precision=supported_precision(mixed_precision),
            # The last micro-batch of a step is recognised by counting, never by the end of the loader.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            # Random numbers are keyed by seed, phase, step and rank (see loop.py); there is nothing to synchronise.
            rng_types=[],
            kwargs_handlers=[
                InitProcessGroupKwargs(init_method=init_method, timeout=timedelta(seconds=timeout_s)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except torch.distributed.DistError as error:
        reason = one_line(error)
        raise TrainingError(f"the processes did not find each other ({reason}): run the same command again.") from error
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        reason = one_line(error)
        raise ConfigError(
            f"runtime.mixed_precision={mixed_precision!r} does not work here ({reason}): use no or bf16."
        ) from None


def precision(setting: str, device: str | None = None) -> str:
    """Resolve ``runtime.mixed_precision`` for a device type, by default this machine's: ``no``, ``bf16`` or ``fp16``.

    A CUDA device that is not present is assumed to support bfloat16.
    """
    if setting != "auto":
        return setting
    device = device or device_type()
    on_cuda = device == "cuda"
    chosen = launcher.mixed_precision() or ("bf16" if on_cuda else "no")
    # Older GPUs only emulate bfloat16, which is slow. A launcher is set up once, for all kinds of devices.
    emulated = on_cuda and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "no" if (chosen == "bf16" and emulated) or (chosen == "fp16" and device == "cpu") else chosen


def supported_precision(setting: str, device: str | None = None) -> str:
    """As :func:`precision`, but refuses fp16 on CPUs, where Accelerate silently computes in float32.

    Raises:
        ConfigError: it is fp16 on a CPU.
    """
    device, chosen = device or device_type(), precision(setting, device)
    if (chosen, device) == ("fp16", "cpu"):
        raise ConfigError("runtime.mixed_precision='fp16' is for GPUs, CPUs would compute in float32: use no.")
    return chosen


def device_type() -> str:
    """The device type that Accelerate will use: ``cpu``, ``cuda`` or ``mps``."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Processes:
    """The processes of the job, as the rest of trajdist sees them: rank, reductions, gathering, barriers."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.local_world = launcher.local_world()
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a CPU tensor over processes, via their devices: NCCL, for one, cannot reduce CPU tensors."""
        # A single process skips the device, which may not support the data type: MPS has no float64.
        return tensor if self.world == 1 else self.sum(tensor.to(self.device)).cpu()

    def minimum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Minimum over processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Waits for the device."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def gather(self, items: list[Any]) -> list[Any]:
        """The concatenated lists of all processes, on every process. For rare, small data, not for use in a step."""
        if self.world == 1:
            return items
        lists: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def broadcast(self, item: Any) -> Any:
        """The main process's object, on every process."""
        if self.world == 1:
            return item
        box = [item]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def main_knows(self, question: Callable[[], Answer]) -> Answer:
        """The main process's answer, on every process. For questions about a folder that the main process writes to.

        On a network file system, another machine may see the folder's old contents for half a minute.

        Raises:
            UserError: on the main process, if the question does.
            SystemExit: with its exit code, on the others.
        """
        answers: list[Answer] = []
        self.main_does(lambda: answers.append(question()))
        answer: Answer = self.broadcast(answers[0] if answers else None)
        return answer

    def main_does(self, work: Callable[[], None]) -> None:
        """The main process does ``work`` while the others wait; a user error ends all of them and is reported once.

        Raises:
            UserError: on the main process.
            SystemExit: with its exit code, on the others.
        """
        failure: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                failure = error
        code = self.broadcast(failure.exit_code if failure else 0)
        if failure:
            raise failure
        if code:
            raise SystemExit(code)

    def all_do(self, work: Callable[[], None]) -> None:
        """Every process does ``work``; a user error on any of them ends all. The failing process reports it.

        Raises:
            UserError: on the process where it happened.
            SystemExit: with its exit code, on the others.
        """
        failure: UserError | None = None
        try:
            work()
        except UserError as error:
            failure = error
        codes = self.gather([failure.exit_code] if failure else [])
        if failure:
            raise failure
        if codes:
            raise SystemExit(codes[0])

    def wait(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def leave(self) -> None:
        """Destroy the process group together once all are done, before the interpreter tears its threads down.

        A process that simply exits may lose its connection to one that was quicker, and be aborted on its way out.
        """
        if self.world > 1 and torch.distributed.is_initialized():
            self.wait()
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the main process before the others, so they find what it downloaded.

        Raises:
            SystemExit: on the others, with the main process's exit code, if the block fails there.
        """
        if self.is_main:
            code = 1
            try:
                yield
                code = 0
            except UserError as error:
                code = error.exit_code
                raise
            finally:
                self.broadcast(code)
        else:
            if code := self.broadcast(None):
                raise SystemExit(code)
            yield


def open_store() -> Any:
    """The rendezvous key-value store; on a connection of its own if this torch can clone the store."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def named(ranks: list[int]) -> str:
    """``process 3``, or ``processes 3, 4``."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"


class StopFlag:
    """Records a request to stop the run: SIGTERM, SIGINT, SIGUSR1, or the STOP file.

    Handlers only set a flag, which the loop checks between steps. A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self, stop_file: Path, watches_file: bool) -> None:
        self._file, self._watches_file = stop_file, watches_file
        self.why = ""
        self._interrupted = self._heard = False
        self._heard_from: int | None = None

    def __bool__(self) -> bool:
        if not self.why and self._watches_file and os.path.exists(self._file):
            self.why = f"the file {self._file.name} was created"
        return bool(self.why)

    def ask(self, why: str) -> None:
        """Request a stop; the first reason is kept."""
        self.why = self.why or why

    def heard(self) -> bool:
        """Whether a signal has arrived, even if the main thread is in code that keeps it from running handlers."""
        if self._heard_from is not None:
            # Python writes the number of every handled signal there, such as SIGCHLD when a worker ends.
            with contextlib.suppress(OSError):
                self._heard |= not STOP_SIGNALS.isdisjoint(os.read(self._heard_from, 2**16))
        return self._heard

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle signals while the block runs, then restore the previous handlers."""
        self._heard_from, write = os.pipe()
        for end in (self._heard_from, write):
            os.set_blocking(end, False)
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            for end in (self._heard_from, write):
                os.close(end)
            self._heard_from = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self._interrupted:
            raise KeyboardInterrupt("received SIGINT twice")
        self._interrupted = self._interrupted or name == "SIGINT"
        self.ask(f"received {name}")


@functools.cache
def _this_process() -> psutil.Process:
    return psutil.Process()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a tuple's tensors to the device; its other items stay. On CUDA it does not wait for the copies."""
    # On MPS an asynchronous copy may read memory that has been freed meanwhile.
    moved: Batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
    return moved


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
        if not _lacks_memory(error):
            raise
        # A process that trains on a GPU decodes images in host memory.
        on_host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        device = torch.device("cpu") if on_host else processes.device
        what = one_line(error) or type(error).__name__
        raise TrainingError(
            f"process {processes.rank} ran out of memory on {device} ({what}): {fix(device.type)}."
        ) from error


def _lacks_memory(error: Exception) -> bool:
    """CUDA has an exception type for it; MPS, CUDA's libraries and torch's CPU allocator only have messages."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def empty_cache(device: torch.device) -> None:
    """Return the allocator's free blocks to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
