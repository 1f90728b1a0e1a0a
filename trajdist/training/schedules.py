"""Schedules: pure functions of the progress, the fraction of all images consumed so far.

They take progress rather than a step count, so that a different number of processes or a resumed run sees the same
curve.
"""

from __future__ import annotations

import math


def warmup_cosine(progress: float, warmup_fraction: float) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine decay to 0 (Loshchilov & Hutter 2017)."""
    if progress < warmup_fraction:
        return progress / warmup_fraction
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup_fraction) / (1.0 - warmup_fraction)))


def linear_warmup(progress: float, warmup_fraction: float) -> float:
    """Factor that rises linearly from 0 to 1 over the warm-up and stays there."""
    return min(1.0, progress / warmup_fraction) if warmup_fraction else 1.0
