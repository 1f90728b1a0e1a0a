"""Bytes of one process on its device, for any batch: what ``footprint`` counts, and what lies around it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import psutil
import torch
from torch import nn

from trajdist.config import Config
from trajdist.planning.footprint import Peaks, Rehearsal, build_modules, bytes_of
from trajdist.runtime.allocator import trim
from trajdist.training.optimizer import make_optimizer

FLOAT = 4
# The loader of Accelerate fetches the next batch before it hands out this one.
BATCHES_HELD = 2
# What a CUDA device holds beside the allocator's bytes: context, kernels, NCCL. Not counted by torch, so not in peaks.
CUDA_RESERVE = 2**30
# Of the C library's heap, which keeps what is freed, measured: blocks of many sizes do not fit into each other's gaps.
FRAGMENTATION = 1.7
# What oneDNN, reading, writing, decoding and the loader take there in a CPU run, measured.
HEAP_RESIDUE = 64 * 2**20
# A checkpoint being written, in units of the weights: copies of weights and moments.
SAVING_COPIES = 3
LARGEST_BATCH = 2**16


def measure_bases(config: Config, phases: list[int]) -> dict[int, int]:
    """Resident bytes of a training process without weights and batches, by phase: Python and the libraries.

    They are those of this process, which imports what a run imports; so it comes before anything large.
    """
    # Imported for what they import.
    import trajdist.training.phases  # noqa: F401

    modules = build_modules(config, phases[0])
    extractor, model = modules.extractor, modules.model
    # The first step of an optimizer imports torch's compiler.
    tiny = nn.Linear(2, 2)
    optimizer = make_optimizer(tiny, 1e-3, 0.0, torch.device("cpu"))
    tiny(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights = sum(bytes_of(module) for module in (extractor.backbone, extractor.projection, model))
    gc.collect()
    # What building the backbone left in the heap: batches will find it and are counted by themselves.
    trim()
    bases = {phases[0]: _resident_bytes() - weights}
    for phase in phases[1:]:
        before = _resident_bytes()
        import trajdist.saved.lora  # noqa: F401

        bases[phase] = bases[phases[0]] + _resident_bytes() - before
    return bases


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


class Budget:
    """Bytes of one process on its device, from the counted parts.

    On CUDA and its kin the figure is that of torch's allocator. On a CPU it is the resident set: the base of the
    interpreter and its libraries comes on top, and gaps in the heap.
    """

    def __init__(self, rehearsal: Rehearsal, base_bytes: int, device: str, saves_between: bool = False) -> None:
        self._rehearsal, self._saves_between = rehearsal, saves_between
        self._on_cpu = device == "cpu"
        self._base_bytes = base_bytes
        self._fit = rehearsal.fit_peak() if self._on_cpu else 0

    @property
    def _gradients_bytes(self) -> int:
        return FLOAT * self._rehearsal.sizes.trained_parameters

    @property
    def _optimizer_bytes(self) -> int:
        return 2 * self._gradients_bytes

    @property
    def _frozen(self) -> int:
        sizes = self._rehearsal.sizes
        return self._base_bytes + sizes.backbone_bytes + sizes.projection_bytes

    def _rest(self, peaks: Peaks) -> int:
        """What is there between two steps."""
        sizes = self._rehearsal.sizes
        batches = (BATCHES_HELD - 1) * peaks.images_bytes
        return self._frozen + sizes.model_bytes + self._optimizer_bytes + batches

    def _moment(self, rest: int, live: int) -> int:
        """The peak of one part. Between two parts the heap is trimmed."""
        return rest + HEAP_RESIDUE + int(FRAGMENTATION * live) if self._on_cpu else rest + live

    def _saving(self) -> int:
        """Bytes of a checkpoint on its way to the disk. On the host: of an accelerator's memory it takes nothing."""
        return SAVING_COPIES * self._gradients_bytes if self._on_cpu else 0

    def statistics(self, peaks: Peaks) -> int:
        """Peak of the pass before Phase 1; 0 in Phase 2."""
        if self._rehearsal.phase != 1:
            return 0
        return self._moment(self._frozen + (BATCHES_HELD - 1) * peaks.images_bytes, peaks.statistics)

    def training(self, peaks: Peaks) -> int:
        """Peak of the training itself: the figure in summary.json."""
        # Of the optimizer's step every gradient is there; the fused optimizer works in place.
        step, saving = max(peaks.step, self._gradients_bytes), self._saving()
        # The last checkpoint is written when the last step is done, the others while the next steps run.
        return self._moment(self._rest(peaks), step + saving if self._saves_between else max(step, saving))

    def calibration(self, peaks: Peaks) -> int:
        """Peak of the passes after the training."""
        return self._moment(self._rest(peaks), max(peaks.residuals, self._fit))

    def required(self, peaks: Peaks) -> int:
        """Peak of the whole phase."""
        return max(self.statistics(peaks), self.training(peaks), self.calibration(peaks))

    def parts(self, peaks: Peaks) -> dict[str, int]:
        """What the memory is made of. Activations of backbone and model do not live at the same time."""
        sizes = self._rehearsal.sizes
        return {
            "base_bytes": self._base_bytes,
            "backbone_bytes": sizes.backbone_bytes,
            "projection_bytes": sizes.projection_bytes,
            "images_bytes": BATCHES_HELD * peaks.images_bytes,
            "activations_bytes": peaks.backbone - peaks.images_bytes - peaks.trajectories_bytes,
            "trajectories_bytes": peaks.trajectories_bytes,
            "model_bytes": sizes.model_bytes,
            "model_activations_bytes": max(0, peaks.model - peaks.images_bytes - peaks.trajectories_bytes),
            "gradients_bytes": self._gradients_bytes,
            "optimizer_bytes": self._optimizer_bytes,
            "saving_bytes": self._saving(),
            "statistics_bytes": peaks.statistics,
            "calibration_bytes": max(peaks.residuals, self._fit),
        }

    def largest_batch(self, batch_size: int, memory_bytes: int | None) -> int | None:
        """The largest batch whose whole phase fits, 0 if none does; None without a limit. ``batch_size`` is a guess."""
        if memory_bytes is None:
            return None
        available = memory_bytes - (0 if self._on_cpu else CUDA_RESERVE)

        def needed(size: int) -> int:
            return self.required(self._rehearsal.peaks(size))

        return largest_within(needed, available, batch_size)


def largest_within(needed: Callable[[int], int], available: int, start: int) -> int:
    """The largest argument, at most :data:`LARGEST_BATCH`, for which ``needed``, which grows, is within ``available``.

    0 if not even 1 is. ``needed`` is dear and nearly a straight line: each guess is where the line meets the limit.
    """
    first = below = (1, needed(1))
    above: tuple[int, int] | None = None
    guess, turn = max(2, start), 0
    if below[1] > available:
        return 0
    while below[0] < LARGEST_BATCH and (above is None or above[0] - below[0] > 1):
        point = (guess, needed(guess))
        if point[1] <= available:
            below = point
        else:
            above = point
        turn += 1
        # A bend in the line would have the guesses creep: every third one halves what is left.
        highest = above[0] - 1 if above else LARGEST_BATCH
        proposal = (below[0] + highest + 1) // 2 if turn % 3 == 0 else _meeting(above or first, below, available)
        guess = min(max(proposal, below[0] + 1), highest)
    return below[0]


def _meeting(one: tuple[int, int], other: tuple[int, int], available: int) -> int:
    """Where the line through two points reaches ``available``."""
    slope = (one[1] - other[1]) / (one[0] - other[0]) if one[0] != other[0] else 0.0
    return other[0] + int((available - other[1]) / slope) if slope > 0 else LARGEST_BATCH
