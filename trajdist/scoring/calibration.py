"""What clean images score, and what follows for a new one: conformal p-values and thresholds, in constant memory.

Guarantee: if a new clean image and the n calibration images are exchangeable (drawn alike, in no telling order; none
of them trained on), then P(p <= alpha) <= alpha for every alpha, whatever the model and however few the images (Vovk,
Gammerman & Shafer 2005; Bates et al. 2023). It holds on average over calibration sets, per image or per cell, not for
the largest of many cells. Nothing is promised for clean images of another kind.

Shape suffixes: K bins.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal
from functools import cached_property

import torch

from trajdist.scoring.histogram import ScoreHistogram, bins_of, lower_edges


class QuantileSketch:
    """The scores of clean images, or of their cells: filled first, then asked.

    Asked in bins of :mod:`trajdist.scoring.histogram`; all of the bin that a score is in counts as at least that
    score. So a p-value is never smaller than the exact one and never larger than the exact one of a score 0.1 % lower.

    Attributes:
        histogram: holds the counts; add to it and reduce it over the processes before the first question.
    """

    def __init__(self, histogram: ScoreHistogram) -> None:
        self.histogram = histogram

    @cached_property
    def count(self) -> int:
        """n, the number of clean scores."""
        return int(self._at_least_K[0])

    @property
    def least_rate(self) -> Decimal:
        """The smallest false-alarm rate that n scores can answer for, 1 / (n + 1), rounded up to two digits."""
        return Context(prec=2, rounding=ROUND_CEILING).divide(Decimal(1), Decimal(self.count + 1))

    @cached_property
    def _at_least_K(self) -> torch.Tensor:
        """float64 ``[K]``: how many clean scores are in a bin or above it, on the CPU."""
        return self.histogram.counts_K.flip(0).cumsum(0).flip(0)

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
        # The bin that begins at infinity is empty: it is the first to pass only where n is too small for this rate.
        return float(lower_edges(passing[0])) if len(passing) else float("inf")
