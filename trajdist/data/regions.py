"""The connected regions of a defect mask, for metrics in which each region has the same weight.

Shape suffixes: H W pixels of a mask, R runs (stretches of marked pixels in a row), S pixels per side of a map.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]

# Runs are laid on the map in batches of this size, whatever the mask.
BATCH = 4096


def region_shares(mask_HW: Mask, size: int) -> Doubles:
    """Which part of a region lies on each pixel of a map as large as the mask: float64 ``[size, size]``.

    Regions are 8-connected. Each adds up to 1, so the sum is their number. They are those of the mask at its own size:
    if the mask were resized first, a thin one would fall apart, or vanish.
    """
    row_R, start_R, stop_R = _runs(mask_HW)
    root_R = _regions(row_R, start_R, stop_R)
    area_R = np.bincount(root_R, stop_R - start_R)[root_R] if len(root_R) else np.zeros(0)
    shares_SS = np.zeros((size, size))
    for first in range(0, len(row_R), BATCH):
        few = slice(first, first + BATCH)
        down_RS = _overlaps(row_R[few], row_R[few] + 1, mask_HW.shape[0], size)
        across_RS = _overlaps(start_R[few], stop_R[few], mask_HW.shape[1], size)
        shares_SS += down_RS.T @ (across_RS / area_R[few, None])
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
    touching_R = np.maximum(to_R - from_R, 0)
    lower = np.repeat(np.arange(len(row_R)), touching_R)
    upper = np.arange(len(lower)) - np.repeat(np.cumsum(touching_R) - touching_R, touching_R) + from_R[lower]
    root_R = np.arange(len(row_R))
    while (root_R[lower] != root_R[upper]).any():
        first, second = root_R[lower], root_R[upper]
        np.minimum.at(root_R, np.maximum(first, second), np.minimum(first, second))
        while (root_R[root_R] != root_R).any():
            root_R = root_R[root_R]
    return root_R


def _overlaps(start_R: Numbers, stop_R: Numbers, extent: int, size: int) -> Doubles:
    """How much of each stretch lies on each of ``size`` equal parts of ``extent`` pixels: ``[R, size]``, in pixels."""
    edges = np.arange(size + 1) * extent / size
    return np.diff(np.clip(edges - start_R[:, None], 0, (stop_R - start_R)[:, None]), axis=1)
