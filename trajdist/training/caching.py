"""The trajectory cache of a phase: what its records depend on, and how many each process may add."""

from __future__ import annotations

import os
from pathlib import Path

from trajdist.data.cache import GIB, CacheWriter, TrajectoryCache
from trajdist.data.decode import TRANSFORM
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.saved.bundle import trajectory_fingerprint
from trajdist.training.session import Session


def open_cache(session: Session, set_name: str, extractor: TrajectoryExtractor) -> TrajectoryCache:
    """The cache of a set's trajectories, on a disk that all processes share or one of each machine.

    Raises:
        ConfigError: its folder cannot be written.
    """
    config, processes = session.config, session.processes
    key = {
        # Another folder may hold other images by the same names.
        "path": _absolute(str(getattr(config.data, set_name).path)),
        "images": session.sources[set_name].fingerprint,
        "fit": getattr(config.data, set_name).fit,
        "image_size": config.data.image_size,
        "transform": TRANSFORM,
        "trajectory": trajectory_fingerprint(extractor),
        "precision": session.accelerator.mixed_precision,
    }
    length, width = extractor.projection.valid_LD.shape
    shape = (extractor.resolution**2, length, width)
    cache = TrajectoryCache(Path(str(config.cache.dir)).expanduser(), key, len(session.sources[set_name]), shape)
    processes.all_do(cache.create)
    return cache


def _absolute(path: str) -> str:
    """A folder or pattern, whatever the working directory; prefixes and addresses as they are."""
    return path if ":" in path else os.path.realpath(os.path.expanduser(path))


def open_writer(session: Session, cache: TrajectoryCache) -> CacheWriter:
    """What is left of cache.max_gib is shared out among the processes."""
    kept, world = len(cache), session.processes.world
    holds = int(session.config.cache.max_gib * GIB / cache.stride)
    session.say(
        f"cache: {cache.folder} has the trajectories of {kept:,} of {cache.num_images:,} images "
        f"and may keep {min(holds, cache.num_images):,} ({cache.stride / GIB * min(holds, cache.num_images):.1f} GiB)"
    )
    room = holds - kept
    return CacheWriter(cache, max(0, -(-room // world)))
