"""Conformal p-values and thresholds from the scores of clean images, in constant memory.

Guarantee: if a new clean image and the n calibration images are exchangeable (drawn from the same distribution, none of
them trained on), then P(p <= alpha) <= alpha for every alpha, for any model and any n (Vovk, Gammerman & Shafer 2005;
Bates et al. 2023). It is marginal over calibration sets and holds for images. Cells of one image are alike, so the same
figure for a cell, of which there are many in each of n images, can be smaller. It does not extend to clean images from
another distribution.

Shape suffixes: K bins.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal
from functools import cached_property

import torch

from trajdist.scoring.histogram import ScoreHistogram, bins_of, lower_edges


class QuantileSketch:
    """The distribution of scores of clean images, or of their cells. Fill first, then query: results are cached.

    Resolution is that of the bins of :mod:`trajdist.scoring.histogram`: every clean score in the same bin as a score
    counts as >= it. So p-values are conservative: never smaller than the exact one, and never larger than the exact
    one of a score 0.1 % lower.

    Attributes:
        histogram: the counts; update and all-reduce it before the first query.
    """

    def __init__(self, histogram: ScoreHistogram) -> None:
        self.histogram = histogram

    @cached_property
    def count(self) -> int:
        """n, the number of clean scores."""
        return int(self._at_least_K[0])

    @property
    def least_p_value(self) -> float:
        """1 / (n + 1): the smallest p-value, so the smallest false-alarm rate that n scores support."""
        return 1 / (self.count + 1)

    @property
    def least_rate(self) -> Decimal:
        """:attr:`least_p_value` to tell to users, rounded up to two significant digits."""
        return Context(prec=2, rounding=ROUND_CEILING).divide(Decimal(1), Decimal(self.count + 1))

    @cached_property
    def _at_least_K(self) -> torch.Tensor:
        """Number of clean scores in each bin or above it, float64 ``[K]`` on the CPU."""
        return self.histogram.counts_K.flip(0).cumsum(0).flip(0)

    @cached_property
    def _p_values_K(self) -> torch.Tensor:
        return (1 + self._at_least_K) / (self.count + 1)

    def p_values(self, scores: torch.Tensor) -> torch.Tensor:
        """Conformal p-values ``(1 + #{clean >= score}) / (n + 1)``, float64 on the CPU, same shape as ``scores``.

        Non-increasing in the score, and at least :attr:`least_p_value`. NaN counts as the largest score.
        """
        return self._p_values_K[bins_of(scores).cpu()]

    def threshold(self, false_alarm_rate: float) -> float:
        """The smallest threshold whose p-value is at most ``false_alarm_rate`` (0 to 1).

        ``score >= threshold`` and ``p_value <= false_alarm_rate`` are the same decision for every finite score.
        Infinite for a rate below :attr:`least_p_value`: n clean scores are too few to flag anything at this rate; it
        takes at least ``1 / false_alarm_rate - 1``. Minus infinity for a rate of 1: everything is flagged.
        """
        passing = (self._p_values_K <= false_alarm_rate).nonzero()
        # The bin that starts at infinity is always empty: it is the first to pass only if n is too small for the rate.
        edge = float(lower_edges(passing[0])) if len(passing) else math.inf
        return -math.inf if math.isnan(edge) else edge
