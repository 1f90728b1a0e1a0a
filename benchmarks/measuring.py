"""Times, and figures of several rounds, for the benchmarks beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence


def seconds(work: Callable[[], object]) -> float:
    """Seconds until it is done, on the device too."""
    import torch  # Some benchmarks measure processes of their own and do without.

    from trajdist.runtime.processes import device_type

    started = time.perf_counter()
    work()
    if device_type() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def over_rounds(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    found = list(values)
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}


def ratio(ones: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of the ratios within each round."""
    return over_rounds(one / other for one, other in zip(ones, others, strict=True))
