"""Where the time of a run goes, stage by stage."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

# "sync" is waiting for other processes, "projection" projects the blocks' pooled activations.
STAGES = ("data", "transfer", "backbone", "projection", "model", "sync", "optimizer", "validation", "checkpoint")
# On CUDA these stages are timed on the host, the others on the device.
HOST_STAGES = ("data", "validation", "checkpoint")
# Fewer looks are mostly of the first steps, which warm the device up.
ENOUGH_LOOKS = 20

# No "from __future__ import annotations" here: DistributedDataParallel inspects the annotations of its hook.
Moment: TypeAlias = float | torch.cuda.Event


class Clock:
    """Splits the time of a run into stages, in seconds. On CUDA it records events and reads them later."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._last: dict[str, torch.cuda.Event] = {}
        self._looks = self._found_idle = 0
        self._has_waited = False
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._turn: tuple[str, Moment] | None = None
        self._open: list[str] = []

    def look(self) -> None:
        """To be called before batches are fetched: notes whether a CUDA device has done all its work."""
        if self._last and not self._has_waited:
            self._looks += 1
            self._found_idle += all(event.query() for event in self._last.values())
        self._has_waited = False

    def waited(self) -> None:
        """The host has waited for the device, or for a disk, so the next :meth:`look` says nothing: it is skipped."""
        self._has_waited = True

    @property
    def idle_share(self) -> float:
        """Fraction of the looks that found a CUDA device idle; 0 after few looks, and on other devices.

        Near 1, the device does its work faster than the host launches it, whatever the stages say.
        """
        return self._found_idle / self._looks if self._looks >= ENOUGH_LOOKS else 0.0

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = self._now(stage)
        self._open.append(stage)
        try:
            yield
        finally:
            self._open.pop()
        end = self._now(stage)
        if not isinstance(end, float):
            self._last[stage] = end
        turn, self._turn = self._turn, None
        if turn is None:
            self._add(stage, begin, end)
        else:
            self._add(stage, begin, turn[1])
            self._add(turn[0], turn[1], end)

    def turn(self, stage: str) -> None:
        """Count the rest of the current stage as ``stage``; of several calls, the last one wins."""
        self._turn = (stage, self._now(stage))

    @contextlib.contextmanager
    def watching(self, module: nn.Module, stage: str, within: str) -> Iterator[None]:
        """While the block runs, time spent in ``module`` during the stage ``within`` counts as ``stage`` instead."""
        begun: list[Moment] = []

        def begin(*_: Any) -> None:
            # Validation calls the module too.
            if within in self._open:
                begun.append(self._now(stage))

        def end(*_: Any) -> None:
            if begun:
                span = begun.pop(), self._now(stage)
                self._add(stage, *span)
                self._add(within, *span, sign=-1)

        handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _now(self, stage: str) -> Moment:
        if not self._cuda or stage in HOST_STAGES:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, stage: str, begin: Moment, end: Moment, sign: int = 1) -> None:
        if isinstance(begin, float):
            assert isinstance(end, float)
            self._seconds[stage] += sign * (end - begin)
        else:
            assert not isinstance(end, float)
            self._pending.append((stage, sign, begin, end))

    def settle(self) -> None:
        """Add up what the device has finished so far. Does not wait for it; called when a log line is due."""
        waiting = []
        for stage, sign, begin, end in self._pending:
            if end.query():
                self._seconds[stage] += sign * begin.elapsed_time(end) / 1000.0
            else:
                waiting.append((stage, sign, begin, end))
        self._pending = waiting

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far. Waits for the device, so it is called only for a checkpoint or at the end."""
        if self._pending:
            torch.cuda.synchronize()
            self.waited()
        self.settle()
        return {stage: self._seconds[stage] for stage in STAGES}

    def restore(self, seconds: dict[str, float]) -> None:
        """Add the seconds per stage of an earlier process."""
        for stage, value in seconds.items():
            self._seconds[stage] += value


def sum_gradients(
    clock: Clock,
    bucket: torch.distributed.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """DistributedDataParallel's all-reduce of a bucket of gradients, timed from the end of the backward pass.

    Earlier buckets are sent while the backward pass still runs; after the last one, all that remains is waiting for
    the other processes.
    """
    clock.turn("sync")
    # None: the default process group.
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]
