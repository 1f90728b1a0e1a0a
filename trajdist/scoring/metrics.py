"""Detection metrics computed from score histograms: constant memory, and additive over processes.

Scores in the same bin of :mod:`trajdist.scoring.histogram` count as tied; the order of bins is exact. So every
confusion matrix used here is exact for its threshold, and only thresholds inside a bin are missing: the best F1 is
never overstated, AUROC is off by at most half of :attr:`Curve.tied_share`, a partial area by at most that divided by
its limit (AUPRO with the tied share of its own curve).

Shape suffixes: S pixels per side, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from trajdist.data.regions import Mask
from trajdist.extraction.projection import Reduce
from trajdist.scoring.histogram import Doubles, ScoreHistogram

Points = list[tuple[float, float]]

AUPRO_LIMIT = 0.3
# A stricter limit, of MVTec AD 2.
STRICT_LIMIT = 0.05
# Of a plotted curve, at most.
POINTS = 200
# By its key in metrics.json, what the report calls a metric, in the order in which they are shown.
TITLES = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1, best",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1, best",
    "aupro": f"AUPRO to {AUPRO_LIMIT:g}",
}


@dataclass(frozen=True)
class Curve:
    """Weight of both classes at each threshold, from the strictest to the loosest.

    Attributes:
        anomalous_T: float64, anomalous weight from this threshold up to the previous one.
        clean_T: float64, likewise for clean weight.
    """

    anomalous_T: Doubles
    clean_T: Doubles

    @property
    def recall_T(self) -> Doubles:
        """The true positive rate; NaN without anomalous scores."""
        return _running_share(self.anomalous_T)

    @property
    def false_positive_rate_T(self) -> Doubles:
        """The fraction of clean scores classified as anomalous; NaN without clean scores."""
        return _running_share(self.clean_T)

    @property
    def precision_T(self) -> Doubles:
        """The fraction of scores classified as anomalous that are truly anomalous; 0 if none are classified so."""
        found_T = self.anomalous_T.cumsum()
        called_T = found_T + self.clean_T.cumsum()
        return np.divide(found_T, called_T, out=np.zeros_like(found_T), where=called_T > 0)

    @property
    def tied_share(self) -> float:
        """The fraction of (anomalous, clean) pairs whose scores share a bin."""
        pairs = self.anomalous_T.sum() * self.clean_T.sum()
        return float(self.anomalous_T @ self.clean_T / pairs) if pairs else 0.0

    def area(self, limit: float = 1.0) -> float | None:
        """Area under the ROC curve for false positive rates from 0 to ``limit``, divided by ``limit``; ties count half.

        None without both classes.
        """
        if not self.anomalous_T.any() or not self.clean_T.any():
            return None
        rate_T = np.concatenate([[0.0], self.false_positive_rate_T])
        recall_T = np.concatenate([[0.0], self.recall_T])
        kept_T = rate_T <= limit
        rates = np.append(rate_T[kept_T], limit)
        recalls = np.append(recall_T[kept_T], np.interp(limit, rate_T, recall_T))
        return float((np.diff(rates) * (recalls[1:] + recalls[:-1])).sum() / 2 / limit)

    def average_precision(self) -> float | None:
        """Precision at each threshold weighted by the increase in recall; None without anomalous scores."""
        if not self.anomalous_T.any():
            return None
        return float(self.precision_T @ self.anomalous_T / self.anomalous_T.sum())

    def best_f1(self) -> float | None:
        """The largest F1 of all thresholds; None without anomalous scores."""
        if not self.anomalous_T.any():
            return None
        called_T = (self.anomalous_T + self.clean_T).cumsum()
        return float((2 * self.anomalous_T.cumsum() / (called_T + self.anomalous_T.sum())).max())

    def roc_points(self) -> Points:
        """Up to :data:`POINTS` (false positive rate, recall) from (0, 0) to (1, 1); empty without both classes."""
        if not self.anomalous_T.any() or not self.clean_T.any():
            return []
        return [(0.0, 0.0), *_thin(self.false_positive_rate_T, self.recall_T)]

    def pr_points(self) -> Points:
        """Up to :data:`POINTS` (recall, precision); empty without anomalous scores.

        From recall 0 on, with the precision of the strictest threshold, as :meth:`average_precision` counts it.
        """
        if not self.anomalous_T.any():
            return []
        return [(0.0, float(self.precision_T[0])), *_thin(self.recall_T, self.precision_T)]


def curve(anomalous: ScoreHistogram, clean: ScoreHistogram) -> Curve:
    """The curve of two histograms, one threshold per non-empty bin."""
    bins_T = (anomalous + clean).counts_K.nonzero().flatten().flip(0)
    return Curve(anomalous.counts_K[bins_T].numpy(), clean.counts_K[bins_T].numpy())


def _running_share(weights_T: Doubles) -> Doubles:
    running_T = weights_T.cumsum()
    # Divided by its own last value, not by a sum in another order, so that it ends at exactly 1.
    return running_T / running_T[-1] if running_T.any() else np.full_like(running_T, np.nan)


def _thin(across_T: Doubles, up_T: Doubles) -> Points:
    """Fewer than :data:`POINTS` points spaced evenly along a curve, including both ends."""
    steps = np.abs(np.diff(across_T)) + np.abs(np.diff(up_T))
    length_T = np.concatenate([[0.0], steps.cumsum()])
    kept = np.unique(np.searchsorted(length_T, np.linspace(0, length_T[-1], POINTS - 1)))
    return list(zip(across_T[kept].tolist(), up_T[kept].tolist(), strict=True))


class PixelScores:
    """Histograms of pixel scores of labelled images: clean, anomalous, and anomalous with equal weight per region."""

    def __init__(self) -> None:
        self.clean, self.anomalous, self.regions = (ScoreHistogram() for _ in range(3))

    def update(self, map_SS: torch.Tensor, mask_SS: Mask, regions_SS: Doubles | None = None) -> None:
        """Add the anomaly map of an image, float ``[S, S]``, and its ground truth, of the same shape.

        Args:
            regions_SS: as :func:`trajdist.data.regions.region_shares` gives them; only :meth:`aupro` needs them.
        """
        mask = torch.from_numpy(mask_SS)
        self.clean.update(map_SS, ~mask)
        self.anomalous.update(map_SS, mask)
        if regions_SS is not None:
            self.regions.update(map_SS, torch.from_numpy(regions_SS))

    def __add__(self, other: PixelScores) -> PixelScores:
        total = PixelScores()
        total.clean, total.anomalous = self.clean + other.clean, self.anomalous + other.anomalous
        total.regions = self.regions + other.regions
        return total

    def all_reduce(self, sum_over_processes: Reduce) -> None:
        """Sum the histograms of all processes, in place."""
        for histogram in (self.clean, self.anomalous, self.regions):
            histogram.all_reduce(sum_over_processes)

    def curve(self) -> Curve:
        """The curve with equal weight for every pixel."""
        return curve(self.anomalous, self.clean)

    def aupro(self, limit: float = AUPRO_LIMIT) -> float | None:
        """Area under the per-region overlap (PRO) curve up to a false positive rate of ``limit``, over that.

        As defined by Bergmann et al. (2019, 2021). The per-region overlap at a threshold is the fraction of a region
        above it, averaged over regions: the recall of pixels weighted by their part of a region. So this is a partial
        area under a ROC curve. None without anomalous regions or without clean pixels.
        """
        return curve(self.regions, self.clean).area(limit)


def bootstrap_interval(
    curve: Curve, statistic: Callable[[Curve], float | None], num_samples: int = 1000
) -> tuple[float, float] | None:
    """A stratified 95 % percentile bootstrap interval (Efron 1979) of an *image*-level statistic.

    Class sizes are held fixed. Resampling images with replacement is drawing from a multinomial over the bins, so the
    histogram is enough. Pixels of one image are not independent: an interval from a pixel curve would be too narrow.

    Args:
        curve: has integer counts.
        statistic: such as ``Curve.area``.
        num_samples: bootstrap resamples.

    Returns:
        Lower and upper end, a pure function of the counts, or None if the statistic is undefined.
    """
    if statistic(curve) is None:
        return None
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(num_samples):
        anomalous_T, clean_T = (_resample(generator, counts_T) for counts_T in (curve.anomalous_T, curve.clean_T))
        drawn.append(statistic(replace(curve, anomalous_T=anomalous_T, clean_T=clean_T)))
    values = np.array(drawn, np.float64)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resample(generator: np.random.Generator, counts_T: Doubles) -> Doubles:
    total = counts_T.sum()
    return generator.multinomial(int(total), counts_T / total).astype(np.float64) if total else counts_T
