"""Which images a phase trains on, drawn from the set or redrawn from the run's records, and in which steps."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trajdist.config import SETS, Config
from trajdist.config_files import read_yaml
from trajdist.config_schema import flat, flatten
from trajdist.data.base import ImageSource
from trajdist.errors import ArtifactError, UserError, first_problem
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
            known, made = recall_facts(first, SETS[1]), flatten(read_yaml(first.config))
        except UserError:
            return cls()
        if known is None:
            return cls()
        return cls(made.get("data.imagenet.path"), _split_by(known.num_images, known.fingerprint, made))

    def are(self, source: ImageSource, config: Config) -> bool:
        """Whether a phase with this set and config would hold out the same images."""
        return self.split == _split_by(len(source), source.fingerprint, flat(config))

    def may_be_among(self, path: str | None) -> bool:
        """Whether the set at ``path`` has the same name, or one of the two is a folder around the other."""
        if self.path is None or path is None:
            return False
        folders = [os.path.realpath(user_path(each)) for each in (self.path, path)]
        around = all(map(os.path.isdir, folders)) and os.path.commonpath(folders) in folders
        return self.path == path or around


class SetFacts(BaseModel):
    """What run.json says of an image set: to refuse a different one, and to redraw the same order without the set.

    Attributes:
        max_holdout: how many images could be held out at most; None if it made no difference, or was not known yet.
        split_of: the phase whose split the set's phase took over.
        shard_sizes: if the order goes by shards.
        subset: hash of the list of a stratified subset.
    """

    model_config = ConfigDict(frozen=True, strict=True)
    num_images: int = Field(gt=0, lt=2**40)
    fingerprint: str = ""
    max_holdout: int | None = Field(None, gt=0)
    split_of: int | None = Field(None, ge=1, le=1)
    shard_sizes: list[Annotated[int, Field(ge=0)]] = []
    subset: str | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> SetFacts:
        if self.shard_sizes and sum(self.shard_sizes) != self.num_images:
            raise ValueError(f"its shard_sizes do not add up to {self.num_images}")
        return self


def recall_facts(rundir: RunDir, set_name: str) -> SetFacts | None:
    """What run.json says of a set; None if nothing.

    Raises:
        ArtifactError: run.json is damaged.
    """
    known = rundir.recall(set_name)
    try:
        return None if known is None else SetFacts.model_validate(known)
    except ValidationError as error:
        field, why = first_problem(error)
        where = f"{set_name}.{field}".rstrip(".")
        raise ArtifactError(f"{str(rundir.path / 'run.json')!r} is damaged ({where}: {why}).") from None


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


def selection_facts(source: ImageSource, selection: Selection, max_holdout: int | None) -> SetFacts:
    """What a run records about a set."""
    return SetFacts(
        num_images=len(source),
        fingerprint=source.fingerprint,
        max_holdout=max_holdout if selection.num_holdout == max_holdout else None,
        split_of=1 if selection.split_of else None,
        shard_sizes=source.shard_sizes() if selection.member_sizes is not None else [],
        subset=_hash(selection.members) if selection.stratified and selection.members is not None else None,
    )


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
    known = recall_facts(rundir, SETS[phase])
    if known is None:
        return None
    order = Order(known.shard_sizes, config.data.shuffle_window)
    selection = _draw(config, phase, known.num_images, order, known.max_holdout, known.split_of)
    return (
        selection if known.subset is None else selection.of(_read_subset(rundir, phase, known.subset, selection), order)
    )


def as_begun(selection: Selection, rundir: RunDir, config: Config, source: ImageSource, known: SetFacts) -> Selection:
    """The selection with the subset that a run has begun with: earlier versions drew others by class.

    Args:
        known: what run.json says of the set.

    Raises:
        ArtifactError: the list of the subset is damaged.
    """
    same_set = known.fingerprint == source.fingerprint
    if known.subset is None or selection.members is None or not same_set or known.subset == _hash(selection.members):
        return selection
    members = _read_subset(rundir, selection.phase, known.subset, selection)
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


def _hash(members: Int64s) -> str:
    return hashlib.sha256(members.astype("<i8").tobytes()).hexdigest()
