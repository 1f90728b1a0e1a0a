"""Which process gets which image, and when: pure integer arithmetic, the same on every process and world size.

A run walks through ``num_epochs`` epochs of ``num_images`` positions. The *cursor* is the number of images
consumed so far, ``epoch * num_images + position``. One optimizer step takes the next ``global_batch`` positions of
its epoch (fewer at the epoch's end), cut into micro-batches of ``world * slots`` slots; each process gets
``slots`` consecutive ones. Slots without a position are empty (weight 0), so that every process gets the same number
of equally large micro-batches. The global batch is a property of the run, not of the world size: with a different
number of processes, the run takes the same steps on the same images.

Shapes: N images, B slots, K chosen places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8

# Purposes of random numbers; each has its own stream, and changing a number changes every run.
SPLIT, ORDER, PLACES, DRAWING, SAMPLE, SUBSET, VALIDATION, PROJECTION = range(8)


@dataclass(frozen=True)
class Step:
    """One optimizer step: positions ``[start, stop)`` of an epoch. ``index`` counts from 0 over all epochs."""

    index: int
    epoch: int
    start: int
    stop: int
    ends_epoch: bool

    @property
    def num_images(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Slots:
    """A micro-batch of one process: positions ``[start, stop)`` of ``epoch`` in ``size`` slots; the rest are empty."""

    epoch: int
    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Plan:
    """How ``world`` processes walk through the images.

    Attributes:
        num_images: per epoch.
        global_batch: images per optimizer step, over all processes.
        batch_size: maximum images per process and micro-batch.
    """

    num_images: int
    num_epochs: int
    global_batch: int
    world: int
    batch_size: int

    @classmethod
    def once(cls, num_images: int, batch_size: int, world: int) -> Plan:
        """One pass over the images, in steps of one micro-batch."""
        return cls(num_images, 1, world * batch_size, world, batch_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step."""
        return -(-self.global_batch // (self.world * self.batch_size))

    @property
    def slots(self) -> int:
        """Slots per process and micro-batch."""
        return -(-self.global_batch // (self.world * self.micro_batches))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.global_batch)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.num_epochs

    @property
    def total_images(self) -> int:
        return self.num_images * self.num_epochs

    def step(self, index: int) -> Step:
        """The step with this index."""
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self.global_batch
        stop = min(start + self.global_batch, self.num_images)
        return Step(index, epoch, start, stop, ends_epoch=stop == self.num_images)

    def cursor_after(self, step: Step) -> int:
        """Images consumed once ``step`` is done."""
        return step.epoch * self.num_images + step.stop

    def step_index_at(self, cursor: int) -> int:
        """Index of the step that begins at ``cursor``.

        Raises:
            ValueError: ``cursor`` lies inside a step.
        """
        epoch, position = divmod(cursor, self.num_images)
        within = position // self.global_batch
        if not self.is_between_steps(cursor):
            raise ValueError(f"cursor {cursor} lies inside a step of {self.global_batch} images")
        return epoch * self.steps_per_epoch + within

    def is_between_steps(self, cursor: int) -> bool:
        """Whether a step can begin at ``cursor``."""
        return cursor % self.num_images % self.global_batch == 0

    def steps(self, cursor: int = 0) -> Iterator[Step]:
        """All steps from ``cursor`` to the end of the last epoch."""
        for index in range(self.step_index_at(cursor), self.total_steps):
            yield self.step(index)

    def micro_batch(self, step: Step, micro: int, process: int) -> Slots:
        """The slots of ``process`` in micro-batch ``micro`` of ``step``."""
        first = step.start + (micro * self.world + process) * self.slots
        start = min(first, step.stop)
        return Slots(step.epoch, start, min(first + self.slots, step.stop), self.slots)

    def shares(self, cursor: int = 0) -> Iterator[Slots]:
        """All micro-batches of all processes from ``cursor`` on, in the order in which Accelerate deals them out."""
        for step in self.steps(cursor):
            for micro in range(self.micro_batches):
                for process in range(self.world):
                    yield self.micro_batch(step, micro, process)


def mix64(values: UInt64s) -> UInt64s:
    """Scramble 64-bit integers one by one: a bijection (the finalizer of SplitMix64, Steele et al. 2014)."""
    z = values + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key64(*parts: int) -> int:
    """Hash several small integers (seed, phase, epoch, ...) into one well-mixed 64-bit key."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix64(key ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return int(key[0])


def seed_of(*parts: int) -> int:
    """:func:`key64` as a seed for torch, with room for adding small numbers."""
    return key64(*parts) >> 1


def permute(positions: Int64s, size: int, key: int) -> Int64s:
    """The entries of a shuffled ``range(size)`` at ``positions``, as int64 of the same shape, in constant memory.

    A Feistel network on the smallest even number of bits that holds ``size``, cycle-walked until the result is below
    ``size`` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). No list of length ``size`` is ever built,
    any position is as cheap as the first, and the order does not depend on any library's random generator.

    >>> permute(np.arange(10), 10, key=7).tolist()
    [4, 2, 3, 6, 8, 9, 7, 0, 1, 5]
    """
    positions = np.asarray(positions, np.int64)
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < size), "position outside the epoch"
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = [np.uint64(key64(key, turn)) for turn in range(_ROUNDS)]
    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        value = result[outside]
        left, right = value >> half, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def permute_windows(positions: Int64s, sizes: Int64s, window: int, key: int) -> Int64s:
    """As :func:`permute`, for items in consecutive shards of ``sizes`` items, mixing few shards at a time.

    The shards are shuffled and cut into windows of ``window`` shards; within a window all items are shuffled. So only
    the shards of one window are read at a time. Memory grows only with the number of shards.

    >>> permute_windows(np.arange(6), np.array([2, 2, 2]), window=1, key=0).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    positions = np.asarray(positions, np.int64)
    order = permute(np.arange(len(sizes)), len(sizes), key64(key, 0))
    starts, ends = np.cumsum(sizes) - sizes, np.cumsum(sizes[order])
    borders = np.append(0, ends)[np.append(np.arange(0, len(sizes), window), len(sizes))]
    windows = np.searchsorted(borders, positions, side="right") - 1
    mixed = np.empty_like(positions)
    for number in np.unique(windows):
        within, first = windows == number, borders[number]
        size = int(borders[number + 1] - first)
        mixed[within] = first + permute(positions[within] - first, size, key64(key, 1, int(number)))
    turns = np.searchsorted(ends, mixed, side="right")
    shards = order[turns]
    return starts[shards] + mixed - (ends[turns] - sizes[shards])


@dataclass(frozen=True)
class Order:
    """What determines the order of the images, apart from their number and the seed.

    Attributes:
        shard_sizes: number of images in each shard of the set.
        window: number of shards to mix at a time; 0, or a window that holds them all, mixes everything.
        classes: ``[N]``, the class of each image, if a subset is to be stratified by class.
    """

    shard_sizes: Sequence[int] = ()
    window: int = 0
    classes: Int64s | None = field(default=None, compare=False, repr=False)

    @property
    def by_shards(self) -> bool:
        return 0 < self.window < len(self.shard_sizes)


@dataclass(frozen=True)
class Selection:
    """Which of ``total`` images are trained on, which are held out for calibration, and the order of each epoch.

    Attributes:
        window: number of shards to mix at a time, if the order goes by shards.
        stratified: whether the images trained on are a subset stratified by class.
        members: ``[num_train]``, sorted indices of the images trained on; None if they follow from a formula.
        member_sizes: how many of them each shard has, if the order goes by shards.
        split_of: the phase whose split into training and held-out images this is, if another one's.
    """

    total: int
    num_train: int
    num_holdout: int
    seed: int
    phase: int
    window: int = 0
    stratified: bool = False
    members: Int64s | None = field(default=None, compare=False, repr=False)
    member_sizes: Int64s | None = field(default=None, compare=False, repr=False)
    split_of: int | None = None

    @classmethod
    def draw(
        cls,
        total: int,
        num_samples: int,
        holdout_fraction: float,
        seed: int,
        phase: int,
        order: Order | None = None,
        max_holdout: int | None = None,
        split_of: int | None = None,
    ) -> Selection:
        """Hold out a seeded random fraction of all images; train on ``num_samples`` of the others (-1: all of them).

        At most ``max_holdout`` are held out. If classes are known, those ``num_samples`` are stratified by class.
        """
        order = order or Order()
        num_holdout = min(round(total * holdout_fraction), total - 1) if total else 0
        num_holdout = num_holdout if max_holdout is None else min(num_holdout, max_holdout)
        available = total - num_holdout
        num_train = available if num_samples < 0 else min(num_samples, available)
        plain = cls(total, num_train, num_holdout, seed, phase, split_of=split_of)
        stratified = order.classes is not None and num_train < available
        if not stratified and not order.by_shards:
            return plain
        images = plain._split(np.arange(available if stratified else num_train))
        if stratified:
            assert order.classes is not None
            images = images[_shares(order.classes[images], num_train, key64(seed, phase, SUBSET))]
        return replace(plain, stratified=stratified).of(np.sort(images), order)

    def of(self, members: Int64s, order: Order) -> Selection:
        """The same selection with another list of images to train on, sorted."""
        if not order.by_shards:
            return replace(self, members=members)
        borders = np.searchsorted(members, np.append(0, np.cumsum(order.shard_sizes)))
        return replace(self, members=members, window=order.window, member_sizes=np.diff(borders))

    def train(self, epoch: int, positions: Int64s) -> Int64s:
        """Image indices at ``positions`` of an epoch."""
        key = key64(self.seed, self.phase, ORDER, epoch)
        if self.members is None:
            return self._split(permute(positions, self.num_train, key))
        if self.member_sizes is None:
            return self.members[permute(positions, self.num_train, key)]
        return self.members[permute_windows(positions, self.member_sizes, self.window, key)]

    def sample(self, count: int) -> Callable[[int, Int64s], Int64s]:
        """The order of a pass over a random ``count`` of the images trained on, as a function like :meth:`train`.

        If the order goes by shards, images are drawn from all shards (an epoch begins with only a few), and sorted, so
        that no shard is visited twice.
        """
        if self.member_sizes is None or count >= self.num_train:
            return self.train
        assert self.members is not None
        drawn = permute(np.arange(count), self.num_train, key64(self.seed, self.phase, SAMPLE))
        return partial(picked, self.members[np.sort(drawn)])

    def holdout(self, epoch: int, positions: Int64s) -> Int64s:
        """Indices of the held-out images at ``positions``, the same in every epoch."""
        return self._split(self.total - 1 - np.asarray(positions, np.int64))

    def held_out(self, count: int) -> Callable[[int, Int64s], Int64s]:
        """The order of a pass over the first ``count`` held-out images, as a function like :meth:`holdout`.

        If the order goes by shards, they are sorted, so that no shard is visited twice.
        """
        if self.member_sizes is None:
            return self.holdout
        return partial(picked, np.sort(self.holdout(0, np.arange(count))))

    def _split(self, ranks: Int64s) -> Int64s:
        return permute(ranks, self.total, key64(self.seed, self.split_of or self.phase, SPLIT))


def picked(images: Int64s, epoch: int, positions: Int64s) -> Int64s:
    """The order of a pass over ``images``; for ``functools.partial``, as a lambda cannot be sent to spawned workers."""
    return images[positions]


def _shares(classes: Int64s, count: int, key: int) -> Int64s:
    """Positions of ``count`` of the shuffled images, stratified by class (systematic sampling).

    The images are lined up class by class, the classes in random order, and every (N / count)-th is drawn, from a
    random start. So all images are equally likely, and each class has its share, rounded down or up.
    """
    names, numbers = np.unique(classes, return_inverse=True)
    turn = permute(np.arange(len(names)), len(names), key64(key, 0))
    line = np.argsort(turn[numbers], kind="stable")
    start = key64(key, 1) % len(classes)
    return np.sort(line[(np.arange(count) * len(classes) + start) // count])


@dataclass(frozen=True)
class PlaceDraw:
    """Which ``count`` of an image's ``total`` places are trained on: drawn anew for each image in each epoch.

    All places are equally likely, so the mean loss over those drawn is an unbiased estimate of that over all places.
    """

    total: int
    count: int
    seed: int
    phase: int

    def __call__(self, slots: Slots) -> Int64s:
        """Sorted indices of the places of each slot, ``[B, K]``: a pure function of the epoch and the position."""
        positions = np.arange(slots.start, slots.start + slots.size, dtype=np.int64).astype(np.uint64)
        keys = mix64(positions ^ np.uint64(key64(self.seed, self.phase, PLACES, slots.epoch)))
        lots = mix64(keys[:, None] ^ mix64(np.arange(self.total, dtype=np.uint64)))
        return np.sort(np.argsort(lots, axis=1, kind="stable")[:, : self.count], axis=1)


def digest(indices: Int64s) -> int:
    """Order-independent digest of a set of images: the sum of their scrambled indices, 32 bits each.

    The digest of a union is the sum of the digests; 2**31 images fit into a signed 64-bit integer.
    """
    return int((mix64(np.asarray(indices, np.int64).astype(np.uint64)) >> np.uint64(32)).sum())
