"""Bytes of one process on its device, for any batch size: what ``footprint`` counts, plus the overhead around it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

from trajdist.config import Config
from trajdist.planning.footprint import Peaks, Rehearsal, build_modules, bytes_of
from trajdist.runtime.allocator import trim
from trajdist.runtime.memory import memory_bytes
from trajdist.training.optimization import make_optimizer

CPU = torch.device("cpu")
FLOAT = 4
# Accelerate's loader fetches the next batch before it yields the current one.
BATCHES_HELD = 2
# CUDA memory outside torch's allocator: context, kernels, NCCL. torch does not count it, so it is not in the peaks.
CUDA_RESERVE = 2**30
# Measured overhead factor of the C heap, which keeps freed memory: a step's blocks of many sizes leave unusable gaps.
FRAGMENTATION = 1.7
# Heap used by oneDNN, file I/O, decoding and the loader in a CPU run, measured.
HEAP_RESIDUE = 64 * 2**20
# In a checkpoint, in multiples of the trained weights: the weights and both Adam moments.
WEIGHTS_AND_MOMENTS = 3
LARGEST_BATCH = 2**16


def measure_bases(config: Config, phases: list[int]) -> dict[int, int]:
    """Resident bytes of a training process without weights and batches, by phase: Python and the libraries.

    Measured on this process, which imports what a run imports; so call it before anything large is allocated.

    Raises:
        UserError: see :func:`trajdist.planning.footprint.build_modules`.
    """
    # Imported for the memory that it takes.
    import trajdist.training.phases  # noqa: F401

    modules = build_modules(config, phases[0])
    extractor, model = modules.extractor, modules.model
    # The first step of an optimizer imports torch's compiler.
    tiny = nn.Linear(2, 2)
    optimizer = make_optimizer(tiny, 1e-3, 0.0, CPU)
    tiny(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights = sum(bytes_of(module) for module in (extractor.backbone, extractor.projection, model))
    gc.collect()
    # Building the backbone left free memory in the heap: batches will reuse it, and they are counted separately.
    trim()
    bases = {phases[0]: memory_bytes(CPU) - weights}
    for phase in phases[1:]:
        before = memory_bytes(CPU)
        import trajdist.saved.lora  # noqa: F401

        bases[phase] = bases[phases[0]] + memory_bytes(CPU) - before
    return bases


def saved_copies(config: Config) -> int:
    """Size of a checkpoint in multiples of the trained weights, including their moving average and the best ones."""
    return WEIGHTS_AND_MOMENTS + (config.ema.decay > 0) + _keeps_best(config)


def _keeps_best(config: Config) -> bool:
    return config.validation.every_epochs > 0 and config.validation.keep == "best"


class Budget:
    """Bytes of one process on its device, from the counted parts.

    On an accelerator the figure is that of torch's allocator. On a CPU it is the resident set size, which adds the
    interpreter with its libraries and heap fragmentation.

    Args:
        base_bytes: of the interpreter and its libraries, from :func:`measure_bases`; 0 on an accelerator.
        device: ``cpu`` or ``cuda``.
        saves_between: whether checkpoints are written while training goes on.
    """

    def __init__(self, rehearsal: Rehearsal, base_bytes: int, device: str, saves_between: bool = False) -> None:
        self._rehearsal, self._saves_between, self._config = rehearsal, saves_between, rehearsal.config
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

    @property
    def _kept_bytes(self) -> int:
        """The moving average, the best weights (on the host), and the copy of the model that is validated or drawn."""
        config = self._config
        weights = (config.ema.decay > 0) + (self._on_cpu and _keeps_best(config))
        examined = config.validation.every_epochs > 0 or bool(config.logging.trackers)
        return weights * self._gradients_bytes + (self._rehearsal.sizes.model_bytes if examined else 0)

    def _rest(self, peaks: Peaks) -> int:
        """Bytes held between two steps."""
        sizes = self._rehearsal.sizes
        batches = (BATCHES_HELD - 1) * peaks.images_bytes
        # On an accelerator the next batch is extracted before the current one is trained on.
        batches += 0 if self._on_cpu else peaks.trajectories_bytes
        return self._frozen + sizes.model_bytes + self._optimizer_bytes + self._kept_bytes + batches

    def _moment(self, rest: int, live: int, copies: int = 0) -> int:
        """Peak of one part of the run: bytes held before, made live by it, and copies of weights, which leave no gaps.

        The heap is trimmed between parts.
        """
        return rest + copies + (HEAP_RESIDUE + int(FRAGMENTATION * live) if self._on_cpu else live)

    def _saving(self) -> int:
        """Bytes of a checkpoint while it is written. They are on the host: 0 on an accelerator."""
        return saved_copies(self._config) * self._gradients_bytes if self._on_cpu else 0

    def statistics(self, peaks: Peaks) -> int:
        """Peak bytes of the statistics pass before Phase 1; 0 in Phase 2."""
        if self._rehearsal.phase != 1:
            return 0
        return self._moment(self._frozen + (BATCHES_HELD - 1) * peaks.images_bytes, peaks.statistics)

    def training(self, peaks: Peaks) -> int:
        """Peak bytes of training itself: the figure in summary.json."""
        # At the optimizer step all gradients exist; the fused optimizer works in place.
        rest, step, saving = self._rest(peaks), max(peaks.step, self._gradients_bytes), self._saving()
        # The last checkpoint is written after the last step, the others while the next steps run.
        stepping = self._moment(rest, step, saving if self._saves_between else 0)
        return max(stepping, self._moment(rest, 0, saving), self._moment(rest, self._validating(peaks)))

    def _validating(self, peaks: Peaks) -> int:
        """Live bytes of a validation; on labelled images it calibrates as at the end of the phase."""
        validation = self._config.validation
        if not validation.every_epochs:
            return 0
        return max(peaks.residuals, self._fit if validation.path else 0)

    def calibration(self, peaks: Peaks) -> int:
        """Peak bytes of the calibration passes after training."""
        return self._moment(self._rest(peaks), max(peaks.residuals, self._fit))

    def required(self, peaks: Peaks) -> int:
        """Peak bytes of the whole phase."""
        # Extraction and training each have a CUDA stream, and memory freed by one reaches the other only after a stall
        # in which the allocator returns everything.
        training = self.training(peaks) + (0 if self._on_cpu else min(peaks.backbone, peaks.model))
        return max(self.statistics(peaks), training, self.calibration(peaks))

    def parts(self, peaks: Peaks) -> dict[str, int]:
        """Breakdown in bytes. It does not add up to the peak: backbone and model are never active at the same time."""
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
            "kept_bytes": self._kept_bytes,
            "saving_bytes": self._saving(),
            "statistics_bytes": peaks.statistics,
            "calibration_bytes": max(peaks.residuals, self._fit),
        }

    def largest_batch(self, batch_size: int, memory_bytes: int | None) -> int | None:
        """The largest batch size whose whole phase fits into ``memory_bytes``; 0 if none does, None without a limit.

        ``batch_size`` is a first guess.
        """
        if memory_bytes is None:
            return None
        available = memory_bytes - (0 if self._on_cpu else CUDA_RESERVE)

        def needed(size: int) -> int:
            return self.required(self._rehearsal.peaks(size))

        return largest_within(needed, available, batch_size)


def largest_within(needed: Callable[[int], int], available: int, start: int) -> int:
    """The largest argument, at most :data:`LARGEST_BATCH`, for which the increasing ``needed`` is within ``available``.

    0 if not even 1 is. ``needed`` is expensive and nearly linear: each guess is where the line through two known
    points meets the limit.
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
        # Where the slope changes, guesses would creep: every third one bisects the interval instead.
        highest = above[0] - 1 if above else LARGEST_BATCH
        proposal = (below[0] + highest + 1) // 2 if turn % 3 == 0 else _meeting(above or first, below, available)
        guess = min(max(proposal, below[0] + 1), highest)
    return below[0]


def _meeting(one: tuple[int, int], other: tuple[int, int], available: int) -> int:
    """Where the line through two points reaches ``available``."""
    slope = (one[1] - other[1]) / (one[0] - other[0]) if one[0] != other[0] else 0.0
    return other[0] + int((available - other[1]) / slope) if slope > 0 else LARGEST_BATCH
