"""Bytes of one process on its device, for any batch: what :mod:`trajdist.footprint` counts, and what lies around it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable

import psutil
import torch
from torch import nn

from trajdist.config import Config
from trajdist.footprint import HEAP_LIMIT, Live, Peaks, Rehearsal, build_modules, bytes_of
from trajdist.optimizer import make_optimizer

FLOAT = 4
# The loader of Accelerate fetches the next batch before it hands out this one.
BATCHES_HELD = 2
# What a CUDA device holds beside the allocator's bytes: context, kernels, NCCL. Not counted by torch, so not in peaks.
CUDA_RESERVE = 2**30
# Of the C library's heap, measured: blocks of many sizes do not fit into each other's gaps.
FRAGMENTATION = 1.25
# What reading, writing, decoding and the loader leave there in a CPU run, measured.
HEAP_RESIDUE = 32 * 2**20
# A checkpoint being written, in units of the weights: copies of weights and moments (1 + 2), the file of the weights,
# and the moments once more as bytes by tensor and as a file (2 + 2).
SAVING_COPIES = 8
LARGEST_BATCH = 2**16


def measure_bases(config: Config, phases: list[int]) -> dict[int, int]:
    """Resident bytes of a training process without weights and batches, by phase: Python and the libraries.

    They are those of this process, which imports what a run imports; so it comes before anything large.
    """
    # Imported for what they import.
    import trajdist.phases  # noqa: F401

    modules = build_modules(config, phases[0])
    extractor, model = modules.extractor, modules.model
    # The first step of an optimizer imports torch's compiler.
    tiny = nn.Linear(2, 2)
    optimizer = make_optimizer(tiny, 1e-3, 0.0, torch.device("cpu"))
    tiny(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights = sum(bytes_of(module) for module in (extractor.backbone, extractor.projection, model))
    _trim_heap()
    bases = {phases[0]: _resident_bytes() - weights}
    for phase in phases[1:]:
        before = _resident_bytes()
        import trajdist.lora  # noqa: F401

        bases[phase] = bases[phases[0]] + _resident_bytes() - before
    return bases


def _trim_heap() -> None:
    """Give back what building the backbone left in the heap: batches will find it and are counted by themselves."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


class Budget:
    """Bytes of one process on its device, from the counted parts.

    On CUDA and its kin the figure is that of torch's allocator. On a CPU it is the resident set: the base of the
    interpreter and its libraries comes on top, and small blocks that were freed, which the C library keeps.
    """

    def __init__(
        self, rehearsal: Rehearsal, base_bytes: int, device: str, earlier: Live, saves_between: bool = False
    ) -> None:
        self._saves_between = saves_between
        self._rehearsal, self._earlier = rehearsal, earlier | rehearsal.left
        self._on_cpu = device == "cpu"
        self._base_bytes = base_bytes
        self._fit = rehearsal.fit_peak() if self._on_cpu else Live()

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

    def _moment(self, rest: int, live: Live, before: Live) -> int:
        """The peak of one part: what ``before`` left in the heap is there too."""
        if not self._on_cpu:
            return rest + live.total
        return rest + live.large + HEAP_RESIDUE + int(FRAGMENTATION * max(live.small, before.small))

    def _update(self) -> Live:
        """The optimizer's step: every gradient is there; the fused optimizer works in place."""
        return Live(self._gradients_bytes, 0, self._gradients_bytes)

    def _checkpoint(self) -> Live:
        """A checkpoint on its way to the disk: a copy of weights and optimizer, their tensors and files as bytes.

        On the host: of an accelerator's memory it takes nothing.
        """
        if not self._on_cpu:
            return Live()
        size = SAVING_COPIES * self._gradients_bytes
        large = size if self._gradients_bytes >= HEAP_LIMIT else 0
        return Live(size, large, size - large)

    def left_in_heap(self, peaks: Peaks) -> Live:
        """What the phase after this one finds in the heap."""
        return self._earlier | peaks.statistics | peaks.step | peaks.residuals | self._fit

    def statistics(self, peaks: Peaks) -> int:
        """Peak of the pass before Phase 1; 0 in Phase 2."""
        if self._rehearsal.phase != 1:
            return 0
        return self._moment(self._frozen + (BATCHES_HELD - 1) * peaks.images_bytes, peaks.statistics, Live())

    def training(self, peaks: Peaks) -> int:
        """Peak of the training itself: the figure in summary.json."""
        step, saving = peaks.step | self._update(), self._checkpoint()
        # The last checkpoint is written when the last step is done, the others while the next steps run.
        together = step + saving if self._saves_between else step | saving
        return self._moment(self._rest(peaks), together, self._earlier | peaks.statistics)

    def calibration(self, peaks: Peaks) -> int:
        """Peak of the passes after the training."""
        return self._moment(self._rest(peaks), peaks.residuals | self._fit, self._earlier | peaks.statistics)

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
            "activations_bytes": peaks.backbone.total - peaks.images_bytes - peaks.trajectories_bytes,
            "trajectories_bytes": peaks.trajectories_bytes,
            "model_bytes": sizes.model_bytes,
            "model_activations_bytes": max(0, peaks.model.total - peaks.images_bytes - peaks.trajectories_bytes),
            "gradients_bytes": self._gradients_bytes,
            "optimizer_bytes": self._optimizer_bytes,
            "saving_bytes": self._checkpoint().total,
            "statistics_bytes": peaks.statistics.total,
            "calibration_bytes": (peaks.residuals | self._fit).total,
        }

    def largest_batch(self, batch_size: int, peaks: Peaks, memory_bytes: int | None) -> int | None:
        """The largest batch whose whole phase fits, 0 if none does; None without a limit."""
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
