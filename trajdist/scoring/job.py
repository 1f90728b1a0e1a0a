"""One invocation of ``score`` or ``evaluate``: the run, the images, the processes and the output folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from rich.console import Console
from torch.utils.data import DataLoader

from trajdist.data.base import FIRST_IMAGES, ImageSource, told_of_dim
from trajdist.data.loader import (
    MOST_READERS,
    ImageBatch,
    SlotDataset,
    build_loader,
    processors,
    resolve_threads,
    resolve_workers,
)
from trajdist.errors import ArtifactError, DataError
from trajdist.files import exists, is_folder, user_path
from trajdist.runtime.memory import naming_memory
from trajdist.runtime.processes import Processes, start_accelerator
from trajdist.runtime.progress import make_console
from trajdist.saved.rundir import RunDir
from trajdist.scoring.detector import Detector
from trajdist.scoring.output import MapsFile
from trajdist.scoring.scorer import Scorer, load
from trajdist.sharding import Int64s, Plan, picked

# How long the processes wait for one another.
TIMEOUT_S = 1800.0
# What to do if the run does not fit into the memory of an accelerator.
MORE_MEMORY = "end other programs on it, or set ACCELERATE_USE_CPU=true to score on the CPU"


@dataclass(frozen=True)
class Options:
    """What the user asked for on the command line.

    Attributes:
        adapters: adapter folders instead of the run's own; several are compared.
        phase: 1 for the unadapted model, None for the latest.
        false_alarm_rate: share of clean images that may be called anomalous; None for 1 %, or the smallest share that
            the clean images of the calibration support.
        explain: also write and draw the blocks' errors at the hottest place.
        overlays: ``all``, ``anomalous`` or ``none``.
    """

    adapters: tuple[str, ...] = ()
    phase: int | None = None
    false_alarm_rate: float | None = None
    batch_size: int = 32
    explain: bool = False
    overlays: str = "all"


@dataclass
class Scoring:
    """One invocation: what is scored, by which run and processes, and where the results go."""

    run_dir: str
    scorer: Scorer
    source: ImageSource
    images_title: str
    out: Path
    options: Options
    processes: Processes
    console: Console
    rates: list[float]
    thresholds: list[float]
    lock: int | None = None

    def close(self) -> None:
        """Release the output folder and leave the process group."""
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None
        self.processes.leave()

    @property
    def drawing_threads(self) -> int:
        return min(MOST_READERS, processors() // self.processes.local_world)

    def plan(self, num_images: int) -> Plan:
        """The steps in which the processes walk through that many images."""
        world = self.processes.world
        # A few images get a smaller batch, so that no time goes into empty slots.
        return Plan.once(num_images, min(self.options.batch_size, -(-num_images // world)), world)

    def loader(self, plan: Plan, cursor: int, order: Int64s) -> DataLoader[ImageBatch]:
        """This process's batches of the images at these positions, from the cursor on."""
        device = self.processes.device.type
        workers = resolve_workers("auto", self.processes.local_world, device)
        threads = resolve_threads("auto", workers)
        dataset = SlotDataset(self.source, partial(picked, order), self.scorer.size, self.scorer.fit, threads=threads)
        loader = build_loader(dataset, plan, cursor=cursor, num_workers=workers, pin_memory=device == "cuda")
        return self.processes.shard(loader)

    @cached_property
    def map_range(self) -> tuple[float, float]:
        """The scores that overlays show darkest and brightest.

        The darkest is exceeded by one clean place in ten, the middle of the scale by one in a thousand.
        """
        cells = self.scorer.detectors[0].cells
        low, middle = (cells.threshold(max(rate, cells.least_p_value)) for rate in (0.1, 0.001))
        return low, 2 * middle - low

    @cached_property
    def maps(self) -> MapsFile:
        """The file with the raw maps of all images."""
        return MapsFile(self.out / "maps.safetensors", len(self.source), self.scorer.extractor.resolution)

    @property
    def step_names(self) -> list[str]:
        return [step.name for step in self.scorer.extractor.steps]


def open_scoring(run_dir: str, source: ImageSource, title: str, out: str, options: Options) -> Scoring:
    """Start the processes and load the run; ``title`` is what the user called the images: their path.

    Raises:
        ArtifactError: the run is not finished, or damaged, or the output folder is no folder.
        ConfigError: the options contradict each other.
        DataError: another process has found other images.
        TrainingError: the run does not fit into memory.
    """
    accelerator = start_accelerator("no", TIMEOUT_S, False)
    processes = Processes(accelerator)
    _check_same_images(source, title, processes)
    console, where = make_console(processes.is_main), user_path(out)
    processes.main_does(lambda: _check_is_folder(where))
    scorer = _load(run_dir, options, processes)

    rates = [options.false_alarm_rate or supported_rate(detector) for detector in scorer.detectors]
    thresholds = [detector.images.threshold(rate) for detector, rate in zip(scorer.detectors, rates, strict=True)]
    job = Scoring(run_dir, scorer, source, title, where, options, processes, console, rates, thresholds)
    _announce(job)
    return job


def _check_is_folder(out: Path) -> None:
    """Before anything is loaded.

    Raises:
        ArtifactError: the output folder is something else.
    """
    if exists(out) and not is_folder(out):
        raise ArtifactError(f"--out {str(out)!r} is not a folder: name one.")


def _check_same_images(source: ImageSource, title: str, processes: Processes) -> None:
    """Check that all processes, each of which has listed the images, found the same; every process calls it.

    Raises:
        DataError: on the main process, if another one has found other images.
        SystemExit: on the others, with its exit code.
    """
    found = processes.gather([(len(source), source.fingerprint)])

    def compare() -> None:
        other = next((rank for rank, images in enumerate(found) if images != found[0]), None)
        if other is not None:
            raise DataError(
                f"the images of {title!r} are not the same on all processes ({found[other][0]} on process {other}, "
                f"{found[0][0]} on process 0{', by other names' if found[other][0] == found[0][0] else ''}): "
                "wait until the folder is complete, let all machines see the same files, and run the command again."
            )

    processes.main_does(compare)


def _load(run_dir: str, options: Options, processes: Processes) -> Scorer:
    """Load on the main process first: the others find what it downloaded, and exit if it fails.

    Raises:
        TrainingError: there was not enough memory; other programs may hold that of a GPU.
    """
    adapters = list(options.adapters) or None

    def of_run() -> Scorer:
        with naming_memory(processes, lambda device: "end other programs" if device == "cpu" else MORE_MEMORY):
            return load(run_dir, adapters, options.phase, str(processes.device))

    return processes.main_first(of_run)


def supported_rate(detector: Detector) -> float:
    """The default false-alarm rate: 1 %, unless the clean images are too few for it."""
    return max(0.01, detector.images.least_p_value)


def _announce(job: Scoring) -> None:
    first = range(min(FIRST_IMAGES, len(job.source)))
    if job.processes.is_main and (told := told_of_dim(job.source, first)):
        job.console.print(f"{job.images_title!r}: {told}")
    unadapted = not any(detector.adapted for detector in job.scorer.detectors)
    if unadapted and job.options.phase is None and RunDir(job.run_dir).was_adapting():
        job.console.print(
            f"{job.run_dir!r} did not finish its Phase 2, so its unadapted Phase 1 is used: resume it with the same "
            "command, or use --phase 1 if this is intended"
        )
    for detector, rate, threshold in zip(job.scorer.detectors, job.rates, job.thresholds, strict=True):
        job.console.print(
            f"{detector.name}: threshold {threshold:.4g} for a false-alarm rate of {rate:.3g}, "
            f"from {detector.images.count} clean images"
        )
        if not detector.held_out:
            job.console.print(
                f"{detector.name} was trained on these clean images: new ones score higher, so expect more false "
                "alarms; set calibration.holdout_fraction above 0 and train again, or add images"
            )
        if threshold == float("inf"):
            job.console.print(
                f"{detector.images.count} clean images are too few for this rate: no image can be called anomalous; "
                f"use --false-alarm-rate {detector.images.least_rate} or more"
            )
