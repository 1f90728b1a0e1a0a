"""trajdist: learns how images move through a frozen backbone, and finds the places that do not belong.

>>> import trajdist
>>> scorer = trajdist.load(run_dir)
>>> scores = scorer([image])
>>> bool(scores.p_values[0] <= 0.01)  # is it anomalous, at one false alarm in a hundred?
False
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Scorer", "Scores", "__version__", "load"]

if TYPE_CHECKING:
    from trajdist.scoring.scorer import Scorer, Scores, load


def __getattr__(name: str) -> Any:
    """The Python API brings torch with it; the command line must start without."""
    if name in ("Scorer", "Scores", "load"):
        from trajdist.scoring import scorer

        return getattr(scorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
