"""What clean images score, and what follows for a new one: conformal p-values and thresholds, in constant memory.

Guarantee: if a new clean image and the n calibration images are exchangeable (drawn alike, in no telling order; none
of them trained on), then P(p <= alpha) <= alpha for every alpha, whatever the model and however few the images (Vovk,
Gammerman & Shafer 2005; Bates et al. 2023). It holds on average over calibration sets, per image or per cell, not for
the largest of many cells. Nothing is promised for clean images of another kind.

Shape suffixes: N rows, F features, C channels of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from trajdist.histogram import ScoreHistogram, bins_of, lower_edges
from trajdist.trajectory import BlockMoments, Reduce


class QuantileSketch:
    """The scores of clean images, or of their cells: filled first, then asked.

    Asked in bins of :mod:`trajdist.histogram`; all of the bin that a score is in counts as at least that score. So a
    p-value is never smaller than the exact one and never larger than the exact one of a score 0.1 % lower.

    Attributes:
        histogram: holds the counts; add to it and reduce it over the processes before the first question.
    """

    def __init__(self, histogram: ScoreHistogram) -> None:
        self.histogram = histogram

    @cached_property
    def count(self) -> int:
        """n, the number of clean scores."""
        return int(self._at_least_K[0])

    @cached_property
    def _at_least_K(self) -> torch.Tensor:
        """float64 ``[K]``: how many clean scores are in a bin or above it, on the CPU."""
        return self.histogram.counts_K.cpu().flip(0).cumsum(0).flip(0)

    @cached_property
    def _p_values_K(self) -> torch.Tensor:
        return (1 + self._at_least_K) / (self.count + 1)

    def p_values(self, scores: torch.Tensor) -> torch.Tensor:
        """float64, in the shape of ``scores``, on the CPU: ``(1 + #{clean >= score}) / (n + 1)``, falling in the score.

        No p-value is smaller than ``1 / (n + 1)``. NaN counts as the largest score.
        """
        return self._p_values_K[bins_of(scores).cpu()]

    def threshold(self, false_alarm_rate: float) -> float:
        """The smallest threshold whose p-value is at most ``false_alarm_rate`` (0 to 1).

        ``score >= threshold`` and ``p_value <= false_alarm_rate`` are the same decision for every finite score.
        Infinite where ``false_alarm_rate < 1 / (n + 1)``: n clean scores are too few to declare anything at this rate;
        it takes ``1 / false_alarm_rate - 1``.
        """
        passing = (self._p_values_K <= false_alarm_rate).nonzero()
        # Scores never reach the bin that begins at infinity: it passes where only that many are too few.
        return float(lower_edges(passing[0])) if len(passing) else float("inf")


class ResidualMoments:
    """Streaming count, mean and covariance of residuals, rows ``[N, F]``, in consecutive groups of entries.

    Between groups the covariance is left out: one group per block costs ``L D^2`` numbers, a single group ``(L D)^2``.

    Args:
        widths: the sizes of the groups; they add up to F.
    """

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        self._widths = list(widths)
        self.groups = [BlockMoments(width, device) for width in widths]

    def update(self, rows_NF: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Add float32 rows; a row of weight 0 does not count."""
        for group, rows_NC in zip(self.groups, rows_NF.split(self._widths, dim=1), strict=True):
            group.update(rows_NC, weights_N)

    def all_reduce(self, sum_over_processes: Reduce) -> None:
        """Make these the moments of all processes' rows."""
        for group in self.groups:
            group.all_reduce(sum_over_processes)

    @property
    def count(self) -> torch.Tensor:
        """The summed weight of the rows, a scalar."""
        return self.groups[0].count

    @property
    def mean_F(self) -> torch.Tensor:
        return torch.cat([group.mean_C for group in self.groups])

    @property
    def variance_F(self) -> torch.Tensor:
        """With divisor N."""
        return torch.cat([group.covariance_CC.diagonal() for group in self.groups])
