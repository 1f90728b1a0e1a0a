"""Which images a phase trains on, drawn from the set or redrawn from the run's records, and in which steps."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajdist.config import SETS, Config
from trajdist.config_files import read_yaml
from trajdist.config_schema import flatten
from trajdist.data.base import ImageSource
from trajdist.errors import ArtifactError, UserError
from trajdist.files import open_regular, user_path, write_bytes
from trajdist.saved.rundir import RunDir
from trajdist.sharding import Int64s, Order, Plan, Selection

# The keys that decide which images of a set are held out.
SPLIT_KEYS = ("seed", "calibration.holdout_fraction", "trajectory.statistics_images")


@dataclass(frozen=True)
class Phase1Images:
    """The images that a Phase 1 was trained on, as far as its run directory tells.

    Attributes:
        path: the set's, in the config; None if unknown.
        split: what decides which images were held out: their number, their fingerprint, and the values of
            :data:`SPLIT_KEYS`.
    """

    path: str | None = None
    split: tuple[Any, ...] = ()

    @classmethod
    def below(cls, rundir: RunDir, config: Config) -> Phase1Images:
        """Those of the Phase 1 that a run builds on: its own, or another run's, which may no longer exist."""
        folder = rundir.path if config.phase1 is None else user_path(config.phase1)
        first = RunDir(folder.parent if folder.name == "phase1" else folder)
        try:
            known, made = first.recall(SETS[1]), flatten(read_yaml(first.config))
        except UserError:
            return cls()
        if not isinstance(known, dict):
            return cls()
        return cls(made.get("data.imagenet.path"), _split_by(known.get("num_images"), known.get("fingerprint"), made))

    def are(self, source: ImageSource, config: Config) -> bool:
        """Whether a phase with this set and config would hold out the same images."""
        return self.split == _split_by(len(source), source.fingerprint, flatten(config.model_dump()))

    def may_be_among(self, path: str | None) -> bool:
        """Whether the set at ``path`` has the same name, or one of the two is a folder around the other."""
        if self.path is None or path is None:
            return False
        folders = [os.path.realpath(user_path(each)) for each in (self.path, path)]
        around = all(map(os.path.isdir, folders)) and os.path.commonpath(folders) in folders
        return self.path == path or around


def _split_by(num_images: Any, fingerprint: Any, keys: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which images of a set are held out; ``keys`` are those of a config, with dots."""
    return num_images, fingerprint, *(keys.get(key) for key in SPLIT_KEYS)


def draw_selection(
    config: Config, phase: int, source: ImageSource, max_holdout: int | None, split_of: int | None = None
) -> Selection:
    """Draw the images that a phase trains on, with at most ``max_holdout`` others held out.

    Args:
        split_of: another phase that trains on the same set, to hold out what it holds out.
    """
    classes = source.classes() if 0 < config.data.of_phase(phase).num_samples < len(source) else None
    order = Order(source.shard_sizes(), config.data.shuffle_window, classes)
    return _draw(config, phase, len(source), order, max_holdout, split_of)


def _draw(
    config: Config, phase: int, total: int, order: Order, max_holdout: int | None, split_of: int | None
) -> Selection:
    num_samples, fraction = config.data.of_phase(phase).num_samples, config.calibration.holdout_fraction
    return Selection.draw(total, num_samples, fraction, config.seed, phase, order, max_holdout, split_of)


def training_plan(config: Config, selection: Selection, reference_world: int, world: int) -> Plan:
    """How ``world`` processes walk through a phase's images in a run that began with ``reference_world`` of them.

    The latter determine the global batch.
    """
    settings = config.data.of_phase(selection.phase)
    global_batch = reference_world * settings.batch_size * settings.gradient_accumulation_steps
    return Plan(selection.num_train, settings.num_epochs, global_batch, world, settings.batch_size)


def selection_facts(source: ImageSource, selection: Selection, max_holdout: int | None) -> dict[str, Any]:
    """What a run records about a set, to refuse a different one and to redraw the same order without the set."""
    known: dict[str, Any] = {"num_images": len(source), "fingerprint": source.fingerprint}
    if selection.num_holdout == max_holdout:
        known["max_holdout"] = max_holdout
    if selection.split_of is not None:
        known["split_of"] = selection.split_of
    if selection.member_sizes is not None:
        known["shard_sizes"] = source.shard_sizes()
    if selection.stratified and selection.members is not None:
        known["subset"] = _hash(selection.members)
    return known


def keep_subset(rundir: RunDir, set_name: str, selection: Selection) -> None:
    """Save the list of a stratified subset: :func:`recall_selection` cannot redraw it without classes."""
    if selection.stratified and selection.members is not None:
        content = io.BytesIO()
        np.save(content, selection.members, allow_pickle=False)
        write_bytes(rundir.subset(set_name), content.getvalue())


def recall_selection(rundir: RunDir, config: Config, phase: int) -> Selection | None:
    """The selection of a phase that has begun, from the run directory alone; None if it has not begun.

    Raises:
        ArtifactError: run.json or the list of the subset is damaged.
    """
    known = rundir.recall(SETS[phase])
    if known is None:
        return None
    total = known.get("num_images") if isinstance(known, dict) else None
    if not isinstance(total, int) or not 0 < total < 2**40:
        raise _damaged(rundir, f"{SETS[phase]} has no number of images")
    sizes = known.get("shard_sizes", [])
    if not isinstance(sizes, list) or not all(isinstance(size, int) and 0 <= size <= total for size in sizes):
        raise _damaged(rundir, f"{SETS[phase]}.shard_sizes are not sizes")
    if sizes and sum(sizes) != total:
        raise _damaged(rundir, f"{SETS[phase]}.shard_sizes do not add up to {total}")
    max_holdout = known.get("max_holdout")
    if max_holdout is not None and (type(max_holdout) is not int or max_holdout < 1):
        raise _damaged(rundir, f"{SETS[phase]}.max_holdout={max_holdout!r} is not a number of images")
    split_of = recorded_split(rundir, phase, known)
    order = Order(sizes, config.data.shuffle_window)
    selection = _draw(config, phase, total, order, max_holdout, split_of)
    return (
        selection.of(_read_subset(rundir, phase, known["subset"], selection), order) if "subset" in known else selection
    )


def recorded_split(rundir: RunDir, phase: int, known: dict[str, Any]) -> int | None:
    """The phase whose split a phase took over, from what run.json says of its set; None if it has its own.

    Raises:
        ArtifactError: run.json is damaged.
    """
    split_of = known.get("split_of")
    if split_of is None or (type(split_of) is int and split_of == 1):
        return split_of
    raise _damaged(rundir, f"{SETS[phase]}.split_of={split_of!r} is not a phase with a split of its own")


def as_begun(selection: Selection, rundir: RunDir, config: Config, source: ImageSource, known: object) -> Selection:
    """The selection with the subset that a run has begun with: earlier versions drew others by class.

    Args:
        known: what run.json says of the set.

    Raises:
        ArtifactError: the list of the subset is damaged.
    """
    known = known if isinstance(known, dict) else {}
    begun_with, same_set = known.get("subset"), known.get("fingerprint") == source.fingerprint
    if begun_with is None or selection.members is None or not same_set or begun_with == _hash(selection.members):
        return selection
    members = _read_subset(rundir, selection.phase, begun_with, selection)
    return selection.of(members, Order(source.shard_sizes(), config.data.shuffle_window))


def _read_subset(rundir: RunDir, phase: int, expected: object, selection: Selection) -> Int64s:
    path = rundir.subset(SETS[phase])
    try:
        with open(path, "rb", opener=open_regular) as handle:
            members = np.load(handle, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{str(path)!r} cannot be read ({error}).") from None
    if members.dtype != np.int64 or members.shape != (selection.num_train,) or _hash(members) != expected:
        raise ArtifactError(f"{str(path)!r} is damaged: it is not the subset that run.json names.")
    return members


def _damaged(rundir: RunDir, what: str) -> ArtifactError:
    return ArtifactError(f"{str(rundir.path / 'run.json')!r} is damaged: {what}.")


def _hash(members: Int64s) -> str:
    return hashlib.sha256(members.astype("<i8").tobytes()).hexdigest()
