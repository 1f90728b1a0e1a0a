"""Which weights a phase ends with: the last, their moving average, or those that validated best; and when to stop.

All of this state is in the checkpoint, so that a resumed run makes the same decisions as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trajdist.saved.checkpoint import Tensors, Validated, check_shapes

Found = dict[str, Any]


class Keeper:
    """Tracks the weights of a phase through its steps and validations. Its state is the same on every process.

    Attributes:
        epoch: epochs completed at the last validation.
        stale: validations since the best one.
        best, last: the metrics.jsonl records of the best and of the last validation; None before the first.
    """

    def __init__(self, weights: Tensors, decay: float, patience: int, keeps_best: bool) -> None:
        """
        Args:
            weights: the initial weights, from which the moving average starts.
            decay: of the moving average; 0 turns it off.
            patience: validations without improvement after which to stop; 0 never stops.
            keeps_best: whether the phase ends with the weights that validated best rather than the last ones.
        """
        self._decay, self._patience, self._keeps_best = decay, patience, keeps_best
        self._average = {name: weight.detach().clone() for name, weight in weights.items()} if decay else {}
        self._best_weights: Tensors = {}
        self.epoch, self.stale = 0, 0
        self.best: Found | None = None
        self.last: Found | None = None

    @property
    def averages(self) -> bool:
        return self._decay > 0

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self._patience <= self.stale

    @property
    def best_epoch(self) -> int:
        """Epochs completed at the best validation; 0 before the first."""
        return int(self.best["epoch"]) if self.best else 0

    @torch.no_grad()
    def follow(self, weights: Tensors, step: int) -> None:
        """Move the average after step number ``step`` (from 0): ``decay * average + (1 - decay) * weights``.

        The decay rises to its value, as in TensorFlow's ``ExponentialMovingAverage``: otherwise short phases would end
        with much of the initial weights.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(weights[name], 1 - decay)

    def judged(self, weights: Tensors) -> Tensors:
        """The weights to validate: the moving average if there is one."""
        return self._average or weights

    def judge(self, found: Found, weights: Tensors) -> None:
        """Record a validation of the :meth:`judged` weights; ``found`` is its record in metrics.jsonl."""
        self.epoch, self.last = found["epoch"], found
        if self.best is not None and not is_better(found, self.best):
            self.stale += 1
            return
        self.best, self.stale = found, 0
        if self._keeps_best:
            # Kept on the host: they are needed only once, at the end.
            self._best_weights = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}

    def final(self, weights: Tensors) -> Tensors:
        """The weights that the phase ends with."""
        return self._best_weights or self.judged(weights)

    def summary(self) -> Found | None:
        """The validation's entry in summary.json; None without a validation."""
        if self.best is None:
            return None
        kept = "best" if self._best_weights else "last"
        return {"best": self.best, "last": self.last, "kept": kept, "stopped_early": self.exhausted}

    def state(self) -> Validated:
        """Everything but the tensors."""
        return Validated(epoch=self.epoch, stale=self.stale, best=self.best, last=self.last)

    def tensors(self) -> Tensors:
        """The average and the best weights, as ``average.NAME`` and ``best.NAME``."""
        kinds = {"average": self._average, "best": self._best_weights}
        return {f"{kind}.{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}

    def restore(self, state: Validated | None, tensors: Mapping[str, torch.Tensor], weights: Tensors) -> None:
        """Continue from what :meth:`state` and :meth:`tensors` returned; a ``state`` of None resets it.

        Raises:
            ArtifactError: the tensors belong to another model.
        """
        state = state or Validated(epoch=0, stale=0, best=None, last=None)
        self.epoch, self.stale, self.best, self.last = state.epoch, state.stale, state.best, state.last
        kinds = ["average"] * self.averages + ["best"] * (self._keeps_best and self.best is not None)
        expected = {f"{kind}.{name}": weight.shape for kind in kinds for name, weight in weights.items()}
        check_shapes(tensors, expected, "what this run keeps")
        for name, average in self._average.items():
            average.copy_(tensors[f"average.{name}"])
        if "best" in kinds:
            self._best_weights = {name: tensors[f"best.{name}"] for name in weights}

    def forget(self) -> None:
        """Compare no later validation with those so far."""
        self.best, self.stale, self._best_weights = None, 0, {}


def is_better(found: Found, best: Found) -> bool:
    """Compare by the image AUROC on labelled images, of equal ones by the pixel AUROC, then by the held-out loss.

    Image AUROCs of few images are often equal. Without labelled, or held-out, images these figures are missing.
    """
    return _rank(found) > _rank(best)


def _rank(found: Found) -> tuple[float, ...]:
    loss = found.get("loss")
    figures = found.get("image_auroc"), found.get("pixel_auroc"), None if loss is None else -loss
    return tuple(-math.inf if figure is None else figure for figure in figures)
