"""One invocation of a training command: its processes, run directory and image sets, and where it reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from torch.utils.data import DataLoader

from trajdist import launcher
from trajdist.config import SETS, Config, ImageSet, domain_config
from trajdist.config_files import dump_yaml
from trajdist.config_schema import flat
from trajdist.data.base import FIRST_IMAGES, ImageSource, told_of_dim
from trajdist.data.decode import Fit
from trajdist.data.drawing import DefectDraw
from trajdist.data.loader import ImageBatch, IndexAt, SlotDataset, build_loader, resolve_threads, resolve_workers
from trajdist.data.trajectory_cache import TrajectoryCache
from trajdist.errors import ArtifactError, DataError, StopRequested, UserError
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.files import exists
from trajdist.runtime.preflight import check_all_reduce, check_processes_agree
from trajdist.runtime.processes import Processes, start_accelerator
from trajdist.runtime.progress import make_console
from trajdist.runtime.stopping import StopFlag
from trajdist.runtime.trackers import Trackers, check_installed
from trajdist.runtime.watchdog import Watchdog
from trajdist.saved import bundle
from trajdist.saved.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, read_state
from trajdist.saved.rundir import RunDir
from trajdist.sharding import PlaceDraw, Plan, Selection
from trajdist.training.claiming import claim, how_to_start_over, reference_world_of
from trajdist.training.selection import (
    Phase1Images,
    as_begun,
    draw_selection,
    keep_subset,
    recall_facts,
    selection_facts,
)

# How much longer than runtime.timeout_s the process group itself waits for a lost process.
GRACE_S = 60.0


@dataclass
class Position:
    """How far the run has got, for status.json.

    Attributes:
        phase: 1 or 2; 0 before the first.
        step: optimizer steps done in the phase.
    """

    phase: int = 0
    step: int = 0


@dataclass
class Session:
    """State shared by the phases.

    Attributes:
        sources: image sources by name: ``imagenet``, ``domain``, ``domains.NAME``, ``validation``.
        processes: the processes of the job: ranks and collectives.
        rundir: paths and records of the run.
        stop: set once a signal or the STOP file asks the run to stop.
        watchdog: ends a process that waits too long for another one.
        console: for messages and progress bars.
        reference_world: number of processes that the run began with; it fixes the global batch.
        profile: whether to trace a few steps.
        trackers: open experiment trackers, on the main process.
        extractor: built when first needed, then shared by the phases.
        domain: name of the domain, if there are several; else empty.
        at: kept up to date by the phases and the loop.
    """

    config: Config
    sources: dict[str, ImageSource]
    accelerator: Accelerator
    processes: Processes
    rundir: RunDir
    stop: StopFlag
    watchdog: Watchdog
    console: Console
    reference_world: int
    profile: bool
    trackers: Trackers
    extractor: TrajectoryExtractor | None = None
    domain: str = ""
    at: Position = field(default_factory=Position)

    def say(self, text: str) -> None:
        """Show the user a line, from the main process."""
        self.console.print(self.titled(with_keys_of(self.domain, text)))

    def titled(self, text: str) -> str:
        """``text`` preceded by the name of the domain, if there are several."""
        return f"{self.domain}: {text}" if self.domain else text

    def write_status(self, error: BaseException | None = None, ended: bool = False) -> None:
        """Write status.json: still running, or how the run ended.

        If ``error`` is why the run failed, an error in writing the file (such as a full disk) must not replace it.
        """
        status, why = ("done" if ended else "running"), ""
        if isinstance(error, (StopRequested, KeyboardInterrupt)):
            status, why = "stopped", str(error)
        elif error is not None:
            status, why = "failed", _why(error)
        if self.processes.is_main:
            with suppress(ArtifactError) if status == "failed" else nullcontext():
                self.rundir.write_status(status, self.at.phase, self.at.step, why)

    def accept(self) -> None:
        """Replace the run's config by this command's, once nothing can refuse it any more.

        Raises:
            ArtifactError: it cannot be written.
        """

        def write() -> None:
            self.rundir.write_config(dump_yaml(self.config))
            bundle.note_weights(self.rundir.trajectory, self.config.backbone.weights)

        self.processes.main_does(write)

    def of_domain(self, name: str) -> Session:
        """The session of one of several domains: with its own config and images, in its own run directory.

        Raises:
            ConfigError: a key changed that would change the result.
            ArtifactError: the directory cannot be written, or is in use by another run.
        """
        config = domain_config(self.config, name)
        rundir = RunDir(config.run_dir)
        with naming(name):
            self.processes.main_does(lambda: claim(rundir, config, self.reference_world))
        return replace(
            self,
            config=config,
            sources={"domain": self.sources[f"domains.{name}"]},
            rundir=rundir,
            # A terminal has room for only one progress bar.
            console=make_console(self.processes.is_main, bars=False),
            reference_world=self.processes.main_knows(lambda: reference_world_of(rundir)),
            trackers=self.trackers.under(name, self.rundir.phase1_steps()),
            domain=name,
            at=Position(phase=2),
        )

    def naming(self) -> AbstractContextManager[None]:
        """Make user errors raised in the block name the session's domain, if there are several."""
        return naming(self.domain)

    def silent(self) -> Session:
        """The same session for a nested stage, which prints nothing and shows no progress bar."""
        return replace(self, console=Console(quiet=True))

    def settings(self, set_name: str) -> ImageSet:
        """Config of an image set. Labelled validation images use the domain's, as scoring does."""
        settings: ImageSet = getattr(self.config.data, set_name, self.config.data.domain)
        return settings

    def check_images(self, set_name: str) -> None:
        """Refuse a set that changed since a phase was trained on it.

        Raises:
            DataError: it holds other images.
        """
        source, known = self.sources[set_name], self.processes.main_knows(lambda: recall_facts(self.rundir, set_name))
        if known and (known.num_images, known.fingerprint) != (len(source), source.fingerprint):
            raise self._other_images(set_name, known.num_images)

    def _other_images(self, set_name: str, before: int) -> DataError:
        path, now = self.settings(set_name).path, len(self.sources[set_name])
        return DataError(
            f"data.{set_name}.path={path!r} holds {now} images, the run began with {before} (or their names changed): "
            f"restore them, or {how_to_start_over(self.rundir, set_name == SETS[2])}."
        )

    def selection(self, phase: int) -> Selection:
        """The images that a phase trains on; refuses a set that changed since the run began.

        Raises:
            DataError: the images are not the same as before, or there are none to train on.
        """
        set_name = SETS[phase]
        source = self.sources[set_name]
        before = self.processes.main_knows(lambda: recall_facts(self.rundir, set_name))
        begun = before if before and self._has_begun(phase) else None
        max_holdout: int | None = self.config.trajectory.statistics_images
        if begun:
            # Earlier versions held out more, and other images than Phase 1: their runs go on with what they trained on.
            max_holdout, split_of = max_holdout if begun.max_holdout else None, begun.split_of
        else:
            split_of = 1 if phase == 2 and self._shares_images_of_phase1(source) else None
        selection = draw_selection(self.config, phase, source, max_holdout, split_of)
        if begun:
            drawn = selection
            selection = self.processes.main_knows(lambda: as_begun(drawn, self.rundir, self.config, source, begun))
        found = selection_facts(source, selection, max_holdout)
        if begun and begun != found:
            raise self._other_images(set_name, begun.num_images)
        if self.processes.is_main:
            if before is None:
                self._tell_of_dim(set_name, selection)
            keep_subset(self.rundir, set_name, selection)
            self.rundir.remember(set_name, found.model_dump(exclude_defaults=True), replace=True)
        return selection

    def _shares_images_of_phase1(self, source: ImageSource) -> bool:
        """Whether both phases have the same set: then neither is to train on what the other holds out."""
        return self.processes.main_knows(lambda: Phase1Images.below(self.rundir, self.config).are(source, self.config))

    def _tell_of_dim(self, set_name: str, selection: Selection) -> None:
        """Tell the user if the first images look like those of a 12-bit camera in 16-bit files."""
        first = selection.train(0, np.arange(min(FIRST_IMAGES, selection.num_train)))
        if told := told_of_dim(self.sources[set_name], first.tolist()):
            self.say(f"data.{set_name}.path={self.settings(set_name).path!r}: {told}")

    def _has_begun(self, phase: int) -> bool:
        """Whether a phase has produced anything from its images."""
        if self.processes.main_knows(lambda: any(self.rundir.path.glob(f"phase{phase}/**/*.safetensors"))):
            return True
        return self.checkpoint_phase() == phase

    def loader(
        self,
        set_name: str,
        index_at: IndexAt,
        plan: Plan,
        cursor: int = 0,
        draw: PlaceDraw | None = None,
        cache: TrajectoryCache | None = None,
        defects: DefectDraw | None = None,
        sharing: int = 1,
        fit: Fit | None = None,
        scattered: bool = False,
    ) -> DataLoader[ImageBatch]:
        """The loader of a plan, sharded by Accelerate; batches stay on the host until the feed moves them.

        Args:
            index_at: maps positions of an epoch to images, such as ``selection.train``.
            cursor: images consumed so far; the loader starts there.
            draw: chooses the places to train on; None trains on all of them.
            cache: supplies trajectories of images seen before.
            defects: draws a defect into a copy of each image.
            sharing: number of loaders among which the workers are divided, rounded up.
            fit: how images are made square; None takes the set's config.
            scattered: see :meth:`trajdist.data.base.ImageSource.scattered`.
        """
        data, source = self.config.data, self.sources[set_name]
        workers = resolve_workers(data.num_workers, self.processes.local_world, self.processes.device.type)
        dataset = SlotDataset(
            source.scattered() if scattered else source,
            index_at,
            data.image_size,
            fit or self.settings(set_name).fit,
            draw=draw,
            cache=cache,
            defects=defects,
            threads=resolve_threads(data.num_workers, workers),
        )
        pin_memory = self.processes.device.type == "cuda"
        loader = build_loader(dataset, plan, cursor=cursor, num_workers=-(-workers // sharing), pin_memory=pin_memory)
        return self.processes.shard(loader)

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest intact checkpoint; None without any.

        Raises:
            ArtifactError: it was not written by trajdist.
        """
        path = self._newest()
        return None if path is None else load_checkpoint(path)

    def checkpoint_phase(self) -> int:
        """The phase of the newest intact checkpoint; 0 without any. Raises what :meth:`newest_checkpoint` raises."""
        path = self._newest()
        return 0 if path is None else read_state(path).phase

    def _newest(self) -> Path | None:
        """The folder of the newest intact checkpoint, chosen by the main process, which reports damaged ones."""
        path = None
        if self.processes.is_main:
            path, problems = newest_checkpoint(self.rundir.checkpoints)
            for problem in problems:
                self.say(problem)
        found: Path | None = self.processes.broadcast(path)
        return found


def _why(error: BaseException) -> str:
    if isinstance(error, SystemExit):  # How the main process ends for another one's sake.
        return "another process failed: see its message"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def with_keys_of(domain: str, text: str) -> str:
    """``text`` with the keys of one of several domains in place of ``data.domain``; an empty name changes nothing."""
    return text.replace("data.domain.", f"data.domains.{domain}.") if domain else text


@contextmanager
def naming(domain: str) -> Iterator[None]:
    """Make user errors raised in the block name ``domain``; if that is empty they pass unchanged."""
    try:
        yield
    except UserError as error:
        if not domain:
            raise
        text = with_keys_of(domain, str(error))
        named = f"data.domains.{domain}." in text or os.path.join("domains", domain) in text
        raise type(error)(text if named else f"domain {domain}: {text}") from error


def open_session(config: Config, sources: dict[str, ImageSource], fresh: bool, profile: bool) -> Session:
    """Start the processes, check that they agree, claim the run directory, and check the config it began with.

    Every process of the job must call it.

    Raises:
        ConfigError: the processes differ, a key changed that would change the result, or a tracker is not installed.
        ArtifactError: the directory cannot be written, or is in use by another run.
        TrainingError: the processes cannot reach each other.
        SystemExit: on the other processes, if one of these is raised on the main process only.
    """
    check_installed(config.logging.trackers)
    init_method = check_processes_agree(config, sources)
    runtime = config.runtime
    # The watchdog, which can name a lost process, must act before the process group's own timeout, which cannot.
    backstop_s = runtime.timeout_s + GRACE_S
    accelerator = start_accelerator(runtime.mixed_precision, backstop_s, runtime.deterministic, init_method)
    processes = Processes(accelerator)
    check_all_reduce(processes)
    # A restart by the launcher must not apply ``--fresh`` again if the first start got this far. Ask all processes:
    # a launcher whose own processes did not fail does not count the restart.
    restarted = processes.any(launcher.has_restarted())
    rundir, console = RunDir(config.run_dir), make_console(processes.is_main)

    def prepare() -> None:
        has_made_way = restarted and rundir.recall("fresh_for") == launcher.job()
        if fresh and not has_made_way and (aside := rundir.move_away()):
            console.print(f"starting over: the old run is now {str(aside)!r}")
        asked_before = exists(rundir.stop_file)
        claim(rundir, config, processes.world)
        if asked_before:
            console.print("a STOP file from before this start is removed: make it anew to stop this run")
        if fresh:
            rundir.remember("fresh_for", launcher.job(), replace=True)

    processes.main_does(prepare)
    stop = StopFlag(rundir.stop_file, watches_file=processes.is_main)
    watchdog = Watchdog(processes, stop, runtime.timeout_s)
    reference_world = processes.main_knows(lambda: reference_world_of(rundir))
    trackers = Trackers(config.logging.trackers if processes.is_main else [], rundir, flat(config), console.print)
    return Session(
        config, sources, accelerator, processes, rundir, stop, watchdog, console, reference_world, profile, trackers
    )
