"""Metrics as their definitions put them, from exact scores: what the product's binned ones are compared with.

Shape suffixes: B images, S pixels per side.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from scipy import ndimage
from sklearn.metrics import auc, precision_recall_curve, roc_curve


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def shares_of_regions(mask_SS: np.ndarray) -> np.ndarray:
    """1 / size of its region for each pixel of one, diagonal neighbours included; 0 elsewhere."""
    regions, _ = ndimage.label(mask_SS, np.ones((3, 3)))
    sizes = np.bincount(regions.ravel())
    return np.where(regions > 0, 1 / sizes[regions], 0.0)


def laid_on(shares_HW: np.ndarray, size: int) -> np.ndarray:
    """The shares of a square mask's pixels, spread evenly over each, on the pixels of a map of another size."""
    side = len(shares_HW)
    times = size // gcd(size, side)
    fine = shares_HW.repeat(times, 0).repeat(times, 1) / times**2
    return fine.reshape(size, side * times // size, size, side * times // size).sum((1, 3))


def aupro(
    masks_BSS: np.ndarray, maps_BSS: np.ndarray, limit: float = 0.3, shares_BSS: np.ndarray | None = None
) -> float:
    """Mean overlap with the regions over the false positive rate, up to a rate of ``limit``.

    ``shares_BSS`` are parts of regions, if those are not of the masks given here.
    """
    if shares_BSS is None:
        shares_BSS = np.stack([shares_of_regions(mask) for mask in masks_BSS])
    # Each pixel once for its part of a region and once for being clean.
    labels, weights = np.repeat([True, False], maps_BSS.size), np.stack([shares_BSS, ~masks_BSS]).ravel()
    scores = np.tile(maps_BSS.ravel(), 2)
    rates, overlaps, _ = roc_curve(
        labels[weights > 0], scores[weights > 0], sample_weight=weights[weights > 0], drop_intermediate=False
    )
    kept = rates <= limit
    rates_in = np.append(rates[kept], limit)
    overlaps_in = np.append(overlaps[kept], np.interp(limit, rates, overlaps))
    return float(auc(rates_in, overlaps_in) / limit)
