"""Constant-memory histogram of a stream of scores; the bin number is the leading bits of the float32.

The bits of an IEEE 754 float, read as an integer, sort like the float (with the bits of negative ones flipped).
Truncated to the sign, exponent and ``MANTISSA_BITS`` bits of the mantissa, they number bins of constant *relative*
width: the range of the scores need not be known in advance, histograms of different processes can be added, and every
bin edge is a float32, so counts at or above an edge are exact. DDSketch (Masson, Rim & Lee 2019) uses the same idea
with logarithms.

Error: two scores share a bin only if they differ by less than ``2**-MANTISSA_BITS`` (0.1 %) of the smaller magnitude
(by less than 2e-41 below the smallest normal float, 1.2e-38). Centre scores that have a large common offset.

Shape suffixes: N scores, K bins, E edges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from trajdist.errors import ArtifactError
from trajdist.extraction.projection import Reduce

Doubles = npt.NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)

MANTISSA_BITS = 10
SHIFT = 23 - MANTISSA_BITS
NUM_BINS = 1 << (32 - SHIFT)
LARGEST = torch.finfo(torch.float32).max
# Scores that are counted at once: a call for each of a million would take minutes.
CHUNK = 2**16
NUM_BARS = 60


def bins_of(scores: torch.Tensor) -> torch.Tensor:
    """Bin of each score, int64, same shape; infinities are clamped to the largest finite floats, NaN counts as +inf."""
    # Adding 0 turns -0.0 into 0.0, so that equal scores get equal bins.
    finite = torch.nan_to_num(scores.float(), nan=LARGEST, posinf=LARGEST, neginf=-LARGEST) + 0.0
    return (_flip(finite.view(torch.int32)) >> SHIFT).long() + NUM_BINS // 2


def lower_edges(bins: torch.Tensor) -> torch.Tensor:
    """Smallest score of each bin, float32, same shape: ``score >= edge`` if and only if ``bins_of(score) >= bin``."""
    return _flip(((bins - NUM_BINS // 2) << SHIFT).int()).view(torch.float32)


def _flip(bits: torch.Tensor) -> torch.Tensor:
    """Map float bits (int32) to integers that sort like the floats; its own inverse."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


class ScoreHistogram:
    """Count, or total weight, of the scores in each bin: 4 MiB for any number of scores.

    Attributes:
        counts_K: float64 ``[NUM_BINS]`` on the CPU; integer counts are exact up to 2**53.
    """

    def __init__(self) -> None:
        self.counts_K = torch.zeros(NUM_BINS, dtype=torch.float64)

    def update(self, scores: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add scores of any shape; ``weights`` has the same shape, and a score of weight 0 is ignored."""
        bins_N = bins_of(scores).flatten().cpu()
        weights_N = torch.ones_like(bins_N) if weights is None else weights.flatten()
        self.counts_K.index_add_(0, bins_N, weights_N.to(self.counts_K))

    def __add__(self, other: ScoreHistogram) -> ScoreHistogram:
        total = ScoreHistogram()
        total.counts_K += self.counts_K + other.counts_K
        return total

    def all_reduce(self, sum_over_processes: Reduce) -> None:
        """Sum the histograms of all processes, in place."""
        self.counts_K = sum_over_processes(self.counts_K)

    def occupied(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower edges (float32, ascending) and counts (float64) of the non-empty bins."""
        bins = self.counts_K.nonzero().flatten()
        return lower_edges(bins), self.counts_K[bins]

    def to_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """For a safetensors file: ``{name}.edges`` and ``{name}.counts`` of the non-empty bins."""
        edges, counts = self.occupied()
        return {f"{name}.edges": edges, f"{name}.counts": counts}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], name: str, path: Path) -> ScoreHistogram:
        """Inverse of :meth:`to_tensors`; ``path`` is the file that the tensors came from, for error messages.

        Raises:
            ArtifactError: a tensor is missing, has the wrong dtype or shape, or is not from a valid histogram.
        """
        edges, counts = tensors.get(f"{name}.edges"), tensors.get(f"{name}.counts")
        if edges is None or counts is None:
            raise ArtifactError(f"{str(path)!r} lacks the score histogram {name!r}: make the calibration again.")
        valid = edges.dtype == torch.float32 and counts.dtype == torch.float64
        valid = valid and edges.ndim == 1 and edges.shape == counts.shape and bool(edges.isfinite().all())
        if not valid or not bool((counts > 0).all()) or not float(counts.sum()) < 2**53:
            raise ArtifactError(f"{str(path)!r} holds a damaged score histogram {name!r}: make the calibration again.")
        bins = bins_of(edges)
        if not torch.equal(lower_edges(bins), edges) or not bool((bins.diff() > 0).all()):
            raise ArtifactError(
                f"{str(path)!r} holds a score histogram {name!r} with other bins: make the calibration again."
            )
        histogram = cls()
        histogram.counts_K[bins] = counts
        return histogram


def histograms_of(keys: Iterable[Key], scores: Iterable[tuple[Key, float]]) -> dict[Key, ScoreHistogram]:
    """A histogram for each key, of the scores that come with it, in constant memory."""
    histograms = {key: ScoreHistogram() for key in keys}
    waiting = iter(scores)
    while chunk := list(islice(waiting, CHUNK)):
        by_key: dict[Key, list[float]] = defaultdict(list)
        for key, score in chunk:
            by_key[key].append(score)
        for key, own in by_key.items():
            histograms[key].update(torch.tensor(own))
    return histograms


def plot_bins(histograms: Mapping[str, ScoreHistogram]) -> tuple[Doubles, dict[str, Doubles]]:
    """Rebin several histograms for a plot of :data:`NUM_BARS` bars: common edges, one more than bars; counts by name.

    Edges are spaced geometrically if all scores are positive and span more than a factor of 20, else evenly. Each fine
    bin is assigned as a whole to the coarse bin that contains its lower edge.
    """
    filled = {name: [part.double().numpy() for part in entry.occupied()] for name, entry in histograms.items()}
    every_edge = np.concatenate([edges for edges, _ in filled.values()] or [np.zeros(0)])
    low, high = (every_edge.min(), every_edge.max()) if len(every_edge) else (0.0, 1.0)
    if high <= low:
        high = low + max(abs(low), 1.0)
    space = np.geomspace if 0 < 20 * low < high else np.linspace
    coarse_E = np.asarray(space(low, high, NUM_BARS + 1), np.float64)
    # Rounding may leave an end just inside the range, which would drop scores.
    coarse_E[0], coarse_E[-1] = low, high
    counts = {name: np.histogram(edges, coarse_E, weights=weights)[0] for name, (edges, weights) in filled.items()}
    return coarse_E, counts
