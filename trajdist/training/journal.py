"""Running totals of a phase: losses, the ledger of images, unreadable images.

They are summed on the device and read back only when a log line is due. All sums are integers (losses in fixed point),
so they do not depend on the order of summation: a restart or a different number of processes gives the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from trajdist.config import SETS
from trajdist.data.loader import ImageBatch
from trajdist.errors import DataError, TrainingError
from trajdist.files import exists
from trajdist.models.losses import Losses
from trajdist.runtime.processes import Processes
from trajdist.saved.checkpoint import Books, Totals
from trajdist.saved.rundir import RunDir
from trajdist.sharding import Plan, Selection, Step
from trajdist.training.session import Session

FIXED_POINT = float(2**24)
# Losses are clamped to this, so that sums of up to 2**22 images between two flushes fit into 63 bits.
LARGEST_LOSS = float(2**16)
NEVER = 2**62

# In a pass over fewer images, data.max_bad_fraction is a share of this many, or of the set if that is smaller.
FEW_IMAGES = 200

# fp16 skips a step whose gradient is not finite and halves the gradient scale, which starts at 2**16. After this many
# in a row the scale is so small that it cannot be to blame.
MOST_SKIPPED = 30

NameOf = Callable[[int], str]


def means(totals: Totals) -> dict[str, float]:
    """Mean loss, recon and kl per image."""
    count = max(1, totals.images)
    return {name: getattr(totals, name) / FIXED_POINT / count for name in ("loss", "recon", "kl")}


def check_bad(session: Session, set_name: str, num_images: int, failures: int) -> None:
    """Check how many images of a pass or an epoch over ``num_images`` of a set could not be used.

    Raises:
        DataError: more than ``data.max_bad_fraction`` allows, or all; names the file that lists them.
    """
    fraction, listed = session.config.data.max_bad_fraction, str(session.rundir.bad_images)
    # By chance, a small sample may hold a larger share of bad images than the set.
    of_images = max(num_images, min(len(session.sources[set_name]), FEW_IMAGES))
    if failures == num_images:
        raise DataError(f"none of {num_images} images could be used: see {listed!r}, and fix them.")
    if failures > fraction * of_images:
        raise DataError(
            f"{failures} of {num_images} images could not be used, more than data.max_bad_fraction={fraction:g} "
            f"allows: see {listed!r}, fix them or raise the fraction."
        )


class BadImages:
    """``bad_images.jsonl``: every image that could not be used, listed once, with the reason.

    Every pass over images has its own; in the midst of a phase, validation lists images as well.
    """

    def __init__(self, rundir: RunDir, processes: Processes) -> None:
        self._rundir, self._processes = rundir, processes
        self._listed: set[tuple[str, str]] = set()
        self._bytes_read = 0
        self._new: list[tuple[int, str]] = []

    def note(self, failures: list[tuple[int, str]]) -> None:
        self._new += failures

    def write(self, set_name: str, name_of: NameOf) -> list[int]:
        """Gather what was noted on all processes and append it. All processes must call it.

        Returns:
            The indices of the images noted since the last call, on every process.
        """
        found = sorted(self._processes.gather(self._new))
        self._new = []
        if self._processes.is_main and found:
            self._rundir.append(self._rundir.bad_images, *self._unlisted(found, set_name, name_of))
        return [index for index, _ in found]

    def _unlisted(self, found: list[tuple[int, str]], set_name: str, name_of: NameOf) -> Iterator[dict[str, Any]]:
        self._read_on()
        for index, reason in found:
            image = name_of(index)
            if (set_name, image) not in self._listed:
                self._listed.add((set_name, image))
                yield {"set": set_name, "index": index, "image": image, "reason": reason}

    def _read_on(self) -> None:
        """Read what has been listed since the last call."""
        if not exists(self._rundir.bad_images):
            return
        with open(self._rundir.bad_images, "rb") as file:
            file.seek(self._bytes_read)
            lines = file.read()
        self._bytes_read += len(lines)
        for line in lines.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # Not a line of ours.
                record = json.loads(line)
                self._listed.add((record["set"], record["image"]))


class Journal:
    """Running totals of one phase. ``add``, called per micro-batch, never waits for the device; ``flush`` does."""

    def __init__(self, session: Session, plan: Plan, selection: Selection) -> None:
        self._session, self._plan, self._selection = session, plan, selection
        self._set_name = SETS[selection.phase]
        self._source = session.sources[self._set_name]
        self._bad_images = BadImages(session.rundir, session.processes)
        device = session.processes.device
        self._device_sums = torch.zeros(len(Totals.model_fields), dtype=torch.int64, device=device)
        # First step with a non-finite loss, and with a non-finite gradient.
        self._first_bad_steps = torch.full((2,), NEVER, dtype=torch.int64, device=device)
        # Consecutive steps whose gradient need not be finite, and how many there have been.
        self._may_skip = 0 if session.accelerator.scaler is None else min(MOST_SKIPPED, plan.total_steps) - 1
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.line, self.epoch, self.total = Totals.zero(), Totals.zero(), Totals.zero()
        self.first_loss: float | None = None
        self.final_loss: float | None = None
        self.epoch_memory: list[float] = []
        self._memory_sum, self._memory_readings = 0, 0
        self._stretch_start: int | None = None

    def add(self, step: Step, batch: ImageBatch, losses: Losses) -> None:
        """Add a micro-batch that was trained on; ``losses`` are per image, ``[B]``."""
        self._bad_images.note(batch.failures)
        weights, counted = batch.weights, batch.weights > 0
        bad = counted & ~losses.loss.detach().isfinite()
        fixed = [fixed_point(part, weights) for part in losses]
        failures = torch.full((), len(batch.failures), dtype=torch.int64, device=weights.device)
        self._device_sums += torch.stack([counted.sum(), *fixed, batch.digest, failures, bad.sum()])
        self._note_bad(0, step, bad.any())

    def check_gradient(self, step: Step, norm: torch.Tensor) -> None:
        """Count a gradient that is not finite: even a finite loss may have one, and it would spoil the weights.

        Args:
            norm: scalar, the norm of the gradient.
        """
        self._skipped = torch.where(norm.isfinite(), 0, self._skipped + 1)
        bad = self._skipped > self._may_skip
        self._device_sums[-1] += bad
        self._note_bad(1, step, bad)

    def _note_bad(self, which: int, step: Step, bad: torch.Tensor) -> None:
        at = torch.where(bad, step.index, NEVER)
        self._first_bad_steps[which] = torch.minimum(self._first_bad_steps[which], at)

    def flush(self, step: Step) -> None:
        """Sum the totals over all processes and write the ledger up to ``step``. All processes must call it.

        Raises:
            TrainingError: a loss or a gradient was not finite.
            DataError: too many images could not be read.
        """
        summed = self._session.processes.sum(self._device_sums).tolist()
        sums = Totals(**dict(zip(Totals.model_fields, summed, strict=True)))
        self._device_sums.zero_()
        missing = self._bad_images.write(self._set_name, self._source.name) if sums.failures else []
        for totals in (self.line, self.epoch, self.total):
            totals.add(sums)
        if self._session.processes.is_main and self._stretch_start is not None:
            record = self._ledger_record(step, self._stretch_start, sums, missing)
            self._session.rundir.append(self._session.rundir.ledger, record)
        self._stretch_start = None
        if sums.not_finite:
            raise TrainingError(self._explain_not_finite())
        check_bad(self._session, self._set_name, self._plan.num_images, self.epoch.failures)

    def begin(self, step: Step) -> None:
        """Note the start of a step; the first one after a flush starts the next ledger record."""
        if self._stretch_start is None:
            self._stretch_start = step.start

    def read_memory(self, memory_bytes: int) -> None:
        """Include a reading, in bytes, in the epoch's mean."""
        self._memory_sum += memory_bytes
        self._memory_readings += 1

    def end_epoch(self) -> Totals:
        """Return the epoch's totals and start new ones."""
        if self._memory_readings:
            self.epoch_memory.append(self._memory_sum / self._memory_readings)
        self._memory_sum, self._memory_readings = 0, 0
        closed, self.epoch = self.epoch, Totals.zero()
        return closed

    def take_line(self) -> Totals:
        """Return the totals since the last line of metrics.jsonl and start new ones."""
        line, self.line = self.line, Totals.zero()
        self.final_loss = means(line)["loss"]
        if self.first_loss is None:
            self.first_loss = self.final_loss
        return line

    def state(self) -> Books:
        """All totals. To be called right after a flush."""
        return Books(
            line=self.line,
            epoch=self.epoch,
            total=self.total,
            first_loss=self.first_loss,
            final_loss=self.final_loss,
            skipped=int(self._skipped),
        )

    def restore(self, state: Books) -> None:
        """Continue from what :meth:`state` returned."""
        self.line, self.epoch, self.total = state.line, state.epoch, state.total
        self.first_loss, self.final_loss = state.first_loss, state.final_loss
        self._skipped.fill_(state.skipped)

    def _ledger_record(self, step: Step, start: int, sums: Totals, missing: list[int]) -> dict[str, Any]:
        return {
            "phase": self._selection.phase,
            "epoch": step.epoch,
            "start": start,
            "stop": step.stop,
            "images": sums.images,
            "digest": sums.digest,
            "missing": missing,
            "num_processes": self._session.processes.world,
        }

    def _explain_not_finite(self) -> str:
        phase = self._selection.phase
        loss_at, gradient_at = self._session.processes.minimum(self._first_bad_steps).tolist()
        # A loss that is not finite has such a gradient too, so it is reported as the loss.
        what, index = ("gradient", gradient_at) if gradient_at < loss_at else ("loss", loss_at)
        skipped = f" (fp16 has skipped {self._may_skip} before it)" if what == "gradient" and self._may_skip else ""
        files = self._files_of(self._plan.step(index))
        named = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
        return (
            f"the {what} of phase {phase} was no longer finite at step {index + 1}{skipped}, on the images "
            f"{named}: look at them, or lower the learning rate; the last checkpoint is from before that step."
        )

    def _files_of(self, step: Step) -> list[str]:
        images = self._selection.train(step.epoch, np.arange(step.start, step.stop))
        return [self._source.name(image) for image in images.tolist()]


def fixed_point(values_B: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
    """Weighted sum of per-image losses as an int64 scalar, in units of ``1 / FIXED_POINT``.

    Values that are not finite count as 0; callers count them separately.
    """
    finite = torch.nan_to_num(values_B.detach().float(), nan=0.0, posinf=0.0, neginf=0.0).clamp(
        -LARGEST_LOSS, LARGEST_LOSS
    )
    return (finite * weights_B * FIXED_POINT).round().long().sum()
