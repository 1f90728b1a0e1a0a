"""Accelerate set-up, and the processes of a job as the rest of trajdist sees them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    send_to_device,
)
from torch.utils.data import DataLoader

from trajdist import launcher
from trajdist.data.loader import processors
from trajdist.errors import ConfigError, TrainingError, one_line
from trajdist.runtime.allocator import keep_freed_memory

Batch = TypeVar("Batch")
Answer = TypeVar("Answer")
Loader = TypeVar("Loader", bound=DataLoader[Any])

PRECISIONS = ("no", "bf16", "fp16")
CHOOSING_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
ONE_EACH = "start one process for each GPU (--num_processes)"


def start_accelerator(
    mixed_precision: str, timeout_s: float, deterministic: bool, init_method: str | None = None
) -> Accelerator:
    """Set up Accelerate for this job: precision, process group with a timeout. :meth:`Processes.shard` is for loaders.

    Raises:
        ConfigError: a precision that this machine does not support, or a launcher's setting that trajdist does not, or
            more processes than GPUs.
        TrainingError: processes that cannot reach each other.
    """
    # Training has asked before, so that one process says it for all; scoring has not.
    if sentence := launcher.unsupported() or crowd():
        raise ConfigError(sentence)
    processors()  # Counted before Accelerate binds this process to a part of them (--enable_cpu_affinity).
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device_type() == "cpu":
        keep_freed_memory()
    # Else DistributedDataParallel is told to use GPU LOCAL_RANK, which a process that sees only its own does not have.
    os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")
    try:
        return Accelerator(
            mixed_precision=supported_precision(mixed_precision),
            # The last micro-batch of a step is recognised by counting, never by the end of the loader.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
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
        ConfigError: it is fp16 on a CPU, or one of the launcher's that trajdist does not have, such as fp8.
    """
    device, chosen = device or device_type(), precision(setting, device)
    if chosen not in PRECISIONS:
        raise ConfigError(
            f"accelerate launch is set to mixed_precision={chosen!r}: set it, or runtime.mixed_precision, to "
            f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}."
        )
    if (chosen, device) == ("fp16", "cpu"):
        raise ConfigError("runtime.mixed_precision='fp16' is for GPUs, CPUs would compute in float32: use no.")
    return chosen


def device_type() -> str:
    """The device type that Accelerate will use: ``cpu``, ``cuda`` or ``mps``."""
    if chosen := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return chosen.partition(":")[0]
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def crowd() -> str:
    """What is wrong if the processes of this machine see fewer GPUs than they are; usually empty.

    Where a process sees a single GPU that was chosen for it, the others may have another.
    """
    if launcher.world() == 1 or device_type() != "cuda":
        return ""
    gpus, processes = torch.cuda.device_count(), launcher.local_world()
    own = gpus == 1 and any(name in os.environ for name in CHOOSING_GPUS)
    if own or not 0 < gpus < processes:
        return ""
    return (
        f"{processes} processes were started on {socket.gethostname()}, where they see {gpus} GPU{'s' * (gpus > 1)}: "
        f"{ONE_EACH}."
    )


def why_it_failed(error: Exception) -> str:
    """The reason in a library's error, on one line. NCCL gives it after some 200 characters about itself."""
    return one_line(str(error).rpartition("Last error:")[2]) or one_line(error)


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
        """Whether the flag is set on any process. With several processes, waits for the device."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

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
            Exception, SystemExit: as :meth:`main_does`.
        """
        answers: list[Answer] = []
        self.main_does(lambda: answers.append(question()))
        answer: Answer = self.broadcast(answers[0] if answers else None)
        return answer

    def main_does(self, work: Callable[[], None]) -> None:
        """The main process does ``work`` while the others wait; an error there ends all of them.

        Raises:
            Exception: on the main process, whatever ``work`` raises; it alone reports it.
            SystemExit: with its exit code, on the others.
        """
        self._end_together(work if self.is_main else lambda: None, self.broadcast)

    def main_first(self, make: Callable[[], Answer]) -> Answer:
        """What each process makes for itself, the main process before the others: they find what it downloaded.

        Raises:
            Exception, SystemExit: as :meth:`all_do`, if it fails on any process.
        """
        made: list[Answer] = []

        def make_it() -> None:
            if not made:
                made.append(make())

        self.main_does(make_it)
        self.all_do(make_it)
        return made[0]

    def all_do(self, work: Callable[[], None]) -> None:
        """Every process does ``work``; an error on any of them ends all.

        Raises:
            Exception: on the process where it happened, which reports it.
            SystemExit: with its exit code, on the others.
        """
        self._end_together(work, lambda code: max(self.gather([code])))

    def _end_together(self, work: Callable[[], None], agree: Callable[[int], int]) -> None:
        """Do ``work``; end if it fails, here or on a process whose exit code ``agree`` returns in exchange for ours."""
        failure: Exception | SystemExit | None = None
        try:
            work()
        except (Exception, SystemExit) as error:  # An interrupt ends this process at once, without the others.
            failure = error
        code = getattr(failure, "exit_code", 1) if failure else 0
        try:
            code = agree(code)
        finally:
            # Even if the others can no longer be told: it is why this process ends.
            if failure:
                raise failure
        if code:
            raise SystemExit(code)

    def shard(self, loader: Loader) -> Loader:
        """The loader with this process's share of its batches, which stay on the host.

        As the accelerator's own method does it, which would keep every loader until the end of a phase. Random numbers
        are keyed by seed, phase, step and rank (see loop.py), so there is nothing to synchronise.
        """
        sharded: Loader = prepare_data_loader(loader)
        return sharded

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


def open_store() -> Any:
    """The rendezvous key-value store; on a connection of its own if this torch can clone the store."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def named(ranks: list[int]) -> str:
    """``process 3``, or ``processes 3, 4``."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a tuple's tensors to the device; its other items stay. On CUDA it does not wait for the copies."""
    # On MPS an asynchronous copy may read memory that has been freed meanwhile.
    moved: Batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
    return moved
