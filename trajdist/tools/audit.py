"""Proves from the files of a run that each epoch saw each of its images once, however often the run was interrupted.

``ledger.jsonl`` says which positions of an epoch were trained on, with a digest of the images that were actually read.
What those images must have been follows from the seed alone, so nothing here trusts the training. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trajdist.config import SETS, Config
from trajdist.config_files import read_yaml
from trajdist.config_parsing import parse_config
from trajdist.data.base import ImageSource
from trajdist.data.sources import open_source
from trajdist.data.storage import Access
from trajdist.errors import ArtifactError, UserError, os_errors
from trajdist.files import exists, is_file, open_regular
from trajdist.saved.rundir import RunDir
from trajdist.screen import on_screen
from trajdist.sharding import Int64s, Selection, digest
from trajdist.tables import counted
from trajdist.training.selection import recall_facts, recall_selection

CHUNK = 2**16
LARGEST_LINE = 2**24
# Maximum sentences shown of each kind, and images named in a sentence.
SHOWN, NAMED = 20, 3


class Stretch(BaseModel):
    """A line of the ledger: positions ``[start, stop)`` of an epoch were consumed."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    phase: int
    epoch: int = Field(ge=0, lt=2**31)
    start: int = Field(ge=0, lt=2**40)
    stop: int = Field(ge=0, lt=2**40)
    images: int
    digest: int
    missing: list[int]
    num_processes: int


@dataclass
class PhaseAudit:
    """Audit of one phase, line by line: how far its ledger goes, and what is wrong with it.

    Attributes:
        name_of: the name of an image, given its number in the set.
        missing: epoch and number of the first images that an epoch had to do without, of ``num_missing``.
        block: the epoch and first position of a block of :data:`CHUNK` positions, and their images.
    """

    phase: int
    selection: Selection
    num_epochs: int
    name_of: Callable[[int], str]
    cursor: int = 0
    worlds: list[int] = field(default_factory=list)
    missing: list[tuple[int, int]] = field(default_factory=list)
    num_missing: int = 0
    problems: list[str] = field(default_factory=list)
    block: tuple[tuple[int, int], Int64s] | None = field(default=None, repr=False)

    def add(self, number: int, stretch: Stretch) -> None:
        """Check line ``number`` of the ledger."""
        size = self.selection.num_train
        where = f"ledger line {number}: phase {self.phase}, epoch {stretch.epoch + 1}"
        if not stretch.start < stretch.stop <= size:
            self.problems.append(f"{where} has only positions 0 to {size}, not {stretch.start} to {stretch.stop}")
            return
        begin = stretch.epoch * size + stretch.start
        if begin > self.cursor:
            self.problems.append(f"{where} leaves a gap: {self._range(self.cursor, begin, 'are missing')}")
        elif begin < self.cursor:
            end = min(self.cursor, stretch.epoch * size + stretch.stop)
            self.problems.append(f"{where} repeats images: {self._range(begin, end, 'are there already')}")
        if not self._digest_holds(stretch):
            positions = f"positions {stretch.start} to {stretch.stop}"
            names = self._names(begin, begin + stretch.stop - stretch.start)
            self.problems.append(f"{where} did not train on the images that {positions} stand for: {names}")
        self.cursor = max(self.cursor, stretch.epoch * size + stretch.stop)
        # Many epochs without the same thousands of images would fill the memory.
        self.missing += [(stretch.epoch, image) for image in stretch.missing[: SHOWN - len(self.missing)]]
        self.num_missing += len(stretch.missing)
        if self.worlds[-1:] != [stretch.num_processes]:
            self.worlds.append(stretch.num_processes)

    def close(self, epochs: int | None) -> None:
        """End the ledger; ``epochs`` is the number done according to the summary, None if the phase is unfinished."""
        wanted = (epochs or 0) * self.selection.num_train
        if self.cursor < wanted:
            what = self._range(self.cursor, wanted, "are missing from the ledger")
            self.problems.append(f"phase {self.phase} is incomplete: {what}")

    def _range(self, begin: int, end: int, what: str) -> str:
        size = self.selection.num_train
        parts = [f"epoch {at // size + 1} position {at % size}" for at in (begin, end - 1)]
        return f"{end - begin:,} images ({parts[0]} to {parts[1]}) {what}: {self._names(begin, end)}"

    def _names(self, begin: int, end: int) -> str:
        """The first images of a range of positions, counted through all epochs; for the problems that are shown."""
        if len(self.problems) >= SHOWN:
            return "..."
        size = self.selection.num_train
        shown = range(begin, min(end, begin + NAMED))
        images = [self.selection.train(at // size, np.array([at % size])) for at in shown]
        return ", ".join([self.name_of(int(image[0])) for image in images] + ["..."] * (end - begin > NAMED))

    def _digest_holds(self, stretch: Stretch) -> bool:
        """Whether the images that were read and those that were missing are together those of these positions."""
        # The numbers may be anything, even too large for an array.
        if not all(0 <= number < 2**62 for number in stretch.missing):
            return False
        absent = np.array(stretch.missing, np.int64)
        if len(set(stretch.missing)) != len(absent):
            return False
        expected, found = 0, 0
        for images in self._images(stretch):
            expected += digest(images)
            found += int(np.isin(absent, images).sum()) if len(absent) else 0
        read = stretch.stop - stretch.start - len(absent)
        return found == len(absent) and stretch.images == read and stretch.digest == expected - digest(absent)

    def _images(self, stretch: Stretch) -> Iterator[Int64s]:
        """The images of a stretch, in parts. Consecutive stretches share a block, whose order is drawn only once."""
        for first in range(stretch.start - stretch.start % CHUNK, stretch.stop, CHUNK):
            if self.block is None or self.block[0] != (stretch.epoch, first):
                positions = np.arange(first, min(first + CHUNK, self.selection.num_train))
                self.block = (stretch.epoch, first), self.selection.train(stretch.epoch, positions)
            yield self.block[1][max(stretch.start - first, 0) : stretch.stop - first]

    def describe(self, epochs: int | None) -> str:
        """One line about what was seen."""
        done, position = divmod(self.cursor, self.selection.num_train)
        worlds = ", then ".join(map(str, self.worlds)) or "no"
        noun = "process" if self.worlds[-1:] == [1] else "processes"
        size = self.selection.num_train
        text = f"phase {self.phase}: {counted(done, 'epoch')} of {counted(size, 'image')}, {worlds} {noun}"
        so_far = f"{position:,} images of epoch {done + 1} so far"
        if done >= self.num_epochs:
            so_far = "all its epochs are done, but not the calibration"
        unfinished = f"; not finished: {so_far}" if epochs is None else ""
        unusable = f"; {self.num_missing} times an image could not be used" if self.num_missing else ""
        return text + unfinished + unusable


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found; ``replaced`` are sentences about the first of ``num_replaced`` unusable images."""

    status: str
    facts: list[str]
    replaced: list[str]
    num_replaced: int
    problems: list[str]


def audit(run_dir: str | Path) -> Audit:
    """Check the ledger of a run, and those of its domains, against what its seed and config determine.

    Raises:
        ArtifactError: there is no run, or its files are not what a run writes.
    """
    rundir = RunDir(run_dir)
    parts = {"": _audit_one(rundir)} if is_file(rundir.ledger) or not rundir.domains() else {}
    # A domain whose training has not begun has no ledger yet.
    parts |= {f"{path.name}: ": _audit_one(RunDir(path)) for path in rundir.domains() if is_file(RunDir(path).ledger)}
    facts, replaced, problems = (
        [f"{name}{line}" for name, part in parts.items() for line in getattr(part, kind)]
        for kind in ("facts", "replaced", "problems")
    )
    done = rundir.read_summary().get("phase2", {}).get("domains", {})
    gone = set(done) - {path.name for path in rundir.domains()}
    problems += [f"{name}: its folder {str(rundir.path / 'domains' / name)!r} is gone" for name in sorted(gone)]
    num_replaced = sum(part.num_replaced for part in parts.values())
    return Audit(rundir.told_status(), facts, replaced, num_replaced, problems)


def _audit_one(rundir: RunDir) -> Audit:
    """Audit a run without its domains."""
    missing = next((file.name for file in (rundir.config, rundir.ledger) if not is_file(file)), None)
    if missing is not None:
        raise ArtifactError(f"{str(rundir.path)!r} has no {missing}: name a run that has begun to train.")
    config = parse_config(read_yaml(rundir.config))
    summary, status = rundir.read_summary(), rundir.read_status()
    phases = dict(_phases(rundir, config))
    epochs = {phase: summary.get(f"phase{phase}", {}).get("epochs") for phase in phases}
    problems = []
    for number, line in enumerate(_lines(rundir.ledger), start=1):
        stretch = _parse(line)
        if stretch is not None and stretch.phase in phases:
            phases[stretch.phase].add(number, stretch)
        elif line.endswith(b"\n") or status == "done":
            problems.append(f"ledger line {number} is not a record of this run")
    for phase, found in phases.items():
        found.close(epochs[phase])
        problems += found.problems
    facts = [found.describe(epochs[phase]) for phase, found in phases.items() if found.cursor or epochs[phase]]
    num_replaced = sum(found.num_missing for found in phases.values())
    return Audit(status, facts, list(_replaced(rundir, phases)), num_replaced, problems)


def _phases(rundir: RunDir, config: Config) -> Iterator[tuple[int, PhaseAudit]]:
    """The phases that have begun."""
    for phase in SETS:
        selection = recall_selection(rundir, config, phase)
        if selection is not None and selection.num_train:
            num_epochs = config.data.of_phase(phase).num_epochs
            yield phase, PhaseAudit(phase, selection, num_epochs, _names_of_set(rundir, config, phase))


def _names_of_set(rundir: RunDir, config: Config, phase: int) -> Callable[[int], str]:
    """Names of images by number, from the set if it can still be opened, which is done when a name is first wanted."""
    known = recall_facts(rundir, SETS[phase])

    @cache
    def source() -> ImageSource | None:
        try:
            path, key = config.data.of_phase(phase).path, f"data.{SETS[phase]}.path"
            found = open_source(path, key, Access.of(config.data))
        except UserError:
            return None
        return found if known and found.fingerprint == known.fingerprint else None

    def name_of(image: int) -> str:
        opened = source()
        return on_screen(opened.name(image)) if opened is not None else f"image number {image}"

    return name_of


def _lines(path: Path) -> Iterator[bytes]:
    with (
        os_errors(f"{str(path)!r} cannot be read", fix="make it readable"),
        open(path, "rb", opener=open_regular) as handle,
    ):
        while line := handle.readline(LARGEST_LINE):
            yield line


def _parse(line: bytes) -> Stretch | None:
    try:
        return Stretch.model_validate_json(line)
    except ValidationError:
        return None


def _replaced(rundir: RunDir, phases: dict[int, PhaseAudit]) -> Iterator[str]:
    """A sentence for each of the first images that an epoch had to do without."""
    wanted = {(SETS[phase], image) for phase, found in phases.items() for _, image in found.missing}
    known = _bad_images(rundir.bad_images, wanted)
    for phase, found in phases.items():
        for epoch, image in found.missing:
            what = known.get((SETS[phase], image), f"image number {image}")
            yield f"phase {phase}, epoch {epoch + 1} did without {what}"


def _bad_images(path: Path, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Name and reason of those that are wanted, by set and number."""
    found: dict[tuple[str, int], str] = {}
    for line in _lines(path) if exists(path) else ():
        try:
            record = json.loads(line)
            if (record["set"], record["index"]) in wanted:
                found[record["set"], record["index"]] = f"{record['image']} ({record['reason']})"
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # A line truncated by a crash.
    return found


def report(found: Audit) -> Iterator[str]:
    """The lines to show."""
    yield f"status: {found.status}"
    yield from found.facts
    yield from found.replaced[:SHOWN]
    if found.num_replaced > SHOWN:
        yield f"and {found.num_replaced - SHOWN} more such images, all in bad_images.jsonl"
    yield from found.problems[:SHOWN]
    if len(found.problems) > SHOWN:
        yield f"and {len(found.problems) - SHOWN} more such problems"
    yield "clean: every image once per epoch" if not found.problems else f"{len(found.problems)} problems"
