"""Experiment trackers through Accelerate: the records of metrics.jsonl, the config, and images. Main process only.

A tracker's run belongs to a run directory: its id is stored there, and a restart resumes it.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trajdist.errors import ConfigError, one_line
from trajdist.saved.rundir import RunDir

PROJECT = "trajdist"

Picture = npt.NDArray[np.uint8]
Say = Callable[[str], None]


def check_installed(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, before anything is trained.

    Raises:
        ConfigError: it names the package to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"logging.trackers has {name!r}, which is not installed: pip install 'trajdist[{name}]', "
                "or leave it out."
            )


class Trackers:
    """The open trackers of a run. One that fails is reported once and dropped; training goes on without it."""

    def __init__(self, names: Sequence[str], rundir: RunDir, config: Mapping[str, Any], say: Say) -> None:
        """``config`` is flat; it is sent when a tracker's run begins, and not again on a restart."""
        self._say, self._domain, self._after = say, "", 0
        self._open: dict[str, Any] = {}
        for name in names:
            self._trying(name, self._begin, name, rundir, config)

    def __bool__(self) -> bool:
        return bool(self._open)

    def under(self, domain: str, after: int) -> Trackers:
        """A view that logs everything as ``domain/...``, with ``after`` added to every step."""
        view = copy.copy(self)
        view._domain, view._after = f"{domain}/", after
        return view

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a metrics.jsonl record, as ``phase1/step/loss``; ``step`` counts through both phases."""
        prefix = f"{self._domain}phase{record['phase']}/{record['event']}"
        values = {
            f"{prefix}/{key}": float(value)
            for key, value in record.items()
            if key not in ("phase", "step") and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        self._each(lambda _, tracker: tracker.log(values, step=self._after + step))

    def show(self, title: str, pictures: Sequence[Picture], step: int) -> None:
        """Log pictures of one size, uint8 ``[H, W, 3]``."""
        self._each(lambda name, tracker: SHOW[name](tracker, f"{self._domain}{title}", pictures, self._after + step))

    def finish(self) -> None:
        """Close all trackers."""
        self._each(lambda _, tracker: tracker.finish())
        self._open.clear()

    def _begin(self, name: str, rundir: RunDir, config: Mapping[str, Any]) -> None:
        key = f"tracker_{name}"
        known = rundir.recall(key)
        tracker, run_id = OPEN[name](rundir.path.absolute(), known)
        self._open[name] = tracker
        if known is None:
            rundir.remember(key, run_id)
            tracker.store_init_configuration({name: _plain(value) for name, value in config.items()})

    def _each(self, work: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._trying(name, work, name, tracker)

    def _trying(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:  # Trackers can raise anything, depending on their servers.
            self._open.pop(name, None)
            reason = one_line(error)
            self._say(f"the tracker {name} failed ({type(error).__name__}: {reason}): training goes on without it")


def _plain(value: Any) -> str | int | float | bool:
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _folder(run: Path) -> Path:
    folder = run / "trackers"
    folder.mkdir(exist_ok=True)
    return folder


def _open_tensorboard(run: Path, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", logging_dir=str(_folder(run)))
    tracker.start()
    return tracker, "tensorboard"


def _open_wandb(run: Path, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import WandBTracker

    run_id = known or uuid.uuid4().hex
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    tracker = WandBTracker(project, id=run_id, name=run.name, resume="allow", dir=str(_folder(run)))
    tracker.start()
    return tracker, run_id


def _open_trackio(run: Path, known: str | None) -> tuple[Any, str]:
    from accelerate.tracking import TrackioTracker

    # trackio identifies a run by its name alone.
    run_id = known or f"{run.name}-{uuid.uuid4().hex[:8]}"
    tracker = TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), name=run_id, resume="allow")
    tracker.start()
    return tracker, run_id


def _open_mlflow(run: Path, known: str | None) -> tuple[Any, str]:
    import mlflow
    from accelerate.tracking import MLflowTracker

    pictures = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{_folder(run) / 'mlflow.db'}")
        pictures = (_folder(run) / "mlflow").as_uri()
    tracker = MLflowTracker(PROJECT, logging_dir=pictures, run_id=known, run_name=run.name)
    tracker.start()
    return tracker, tracker.active_run.info.run_id


def _show_tensorboard(tracker: Any, title: str, pictures: Sequence[Picture], step: int) -> None:
    tracker.log_images({title: np.stack(pictures)}, step=step, dataformats="NHWC")
    tracker.writer.flush()


def _show_wandb(tracker: Any, title: str, pictures: Sequence[Picture], step: int) -> None:
    tracker.log_images({title: list(pictures)}, step=step)


def _show_trackio(tracker: Any, title: str, pictures: Sequence[Picture], step: int) -> None:
    import trackio

    tracker.log({f"{title}/{number}": trackio.Image(picture) for number, picture in enumerate(pictures)}, step=step)


def _show_mlflow(tracker: Any, title: str, pictures: Sequence[Picture], step: int) -> None:
    import mlflow

    for number, picture in enumerate(pictures):
        mlflow.log_image(picture, artifact_file=f"{title}/step-{step:08d}-{number}.png")


OPEN = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
    "mlflow": _open_mlflow,
}
SHOW = {
    "tensorboard": _show_tensorboard,
    "wandb": _show_wandb,
    "trackio": _show_trackio,
    "mlflow": _show_mlflow,
}
