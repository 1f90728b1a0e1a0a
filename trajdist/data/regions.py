"""The connected regions of a defect mask, for metrics in which each region has the same weight.

Shape suffixes: H W pixels of a mask, R runs (stretches of marked pixels in a row), S pixels per side of a map.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]

# Rows of the mask that are laid on the map at a time.
BAND = 256


def region_shares(mask_HW: Mask, size: int) -> Doubles:
    """Which part of a region lies on each pixel of a map of the mask's area: float64 ``[size, size]``.

    Regions are 8-connected. Each adds up to 1, so the sum is their number. They are those of the mask at its own size:
    if the mask were resized first, a thin one would fall apart, or vanish.
    """
    row_R, start_R, stop_R = _runs(mask_HW)
    root_R = _regions(row_R, start_R, stop_R)
    shares_R = 1.0 / np.bincount(root_R, stop_R - start_R)[root_R]
    down_HS, across_WS = (_overlaps(extent, size) for extent in mask_HW.shape)
    left, right = start_R.min(initial=mask_HW.shape[1]), stop_R.max(initial=0)
    shares_SS = np.zeros((size, size))
    for top in range(0, len(mask_HW), BAND):
        band = slice(top, top + BAND)
        first, last = np.searchsorted(row_R, (top, top + BAND))
        if first == last:
            continue
        marked = mask_HW[band, left:right]
        weights = np.zeros(marked.shape)
        weights[marked] = np.repeat(shares_R[first:last], (stop_R - start_R)[first:last])
        shares_SS += down_HS[band].T @ (weights @ across_WS[left:right])
    return shares_SS


def _runs(mask_HW: Mask) -> tuple[Numbers, Numbers, Numbers]:
    """Row, first column and column after the last of each run, in row-major order."""
    borders = np.diff(np.pad(mask_HW, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (row_R, start_R), (_, stop_R) = (np.nonzero(borders == sign) for sign in (1, -1))
    return row_R, start_R, stop_R


def _regions(row_R: Numbers, start_R: Numbers, stop_R: Numbers) -> Numbers:
    """For each run, the index of the first run of its region.

    Union-find: every run starts as its own root. The later root of two that touch is hooked to the earlier one, and
    paths are compressed, until all that touch agree.
    """
    # A key for each place in row-major order, with a gap between rows: the runs of the row above are a range of keys.
    width = stop_R.max(initial=0) + 2
    above_R = (row_R - 1) * width
    from_R = np.searchsorted(row_R * width + stop_R, above_R + start_R, "left")
    to_R = np.searchsorted(row_R * width + start_R, above_R + stop_R, "right")
    touching_R = to_R - from_R
    lower = np.repeat(np.arange(len(row_R)), touching_R)
    upper = np.arange(len(lower)) - np.repeat(np.cumsum(touching_R) - touching_R, touching_R) + from_R[lower]
    root_R = np.arange(len(row_R))
    while (root_R[lower] != root_R[upper]).any():
        first, second = root_R[lower], root_R[upper]
        np.minimum.at(root_R, np.maximum(first, second), np.minimum(first, second))
        while (root_R[root_R] != root_R).any():
            root_R = root_R[root_R]
    return root_R


def _overlaps(extent: int, size: int) -> Doubles:
    """How much of each of ``extent`` pixels lies on each of ``size`` equal parts of all of them: ``[extent, size]``."""
    edges = np.arange(size + 1) * extent / size
    return np.diff(np.clip(edges - np.arange(extent)[:, None], 0, 1), axis=1)
