"""Metrics as their definitions put them, from exact scores: what the product's binned ones are compared with.

Shape suffixes: B images, S pixels per side.
"""

from __future__ import annotations

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


def aupro(masks_BSS: np.ndarray, maps_BSS: np.ndarray, limit: float = 0.3) -> float:
    """Mean overlap with the regions over the false positive rate, up to a rate of ``limit``."""
    weights = np.where(masks_BSS, np.stack([shares_of_regions(mask) for mask in masks_BSS]), 1.0)
    rates, overlaps, _ = roc_curve(
        masks_BSS.ravel(), maps_BSS.ravel(), sample_weight=weights.ravel(), drop_intermediate=False
    )
    kept = rates <= limit
    rates_in = np.append(rates[kept], limit)
    overlaps_in = np.append(overlaps[kept], np.interp(limit, rates, overlaps))
    return float(auc(rates_in, overlaps_in) / limit)
