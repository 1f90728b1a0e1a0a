"""The trajectory cache of a phase: what its records depend on, and how many records each process may add."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trajdist.data.decode import TRANSFORM
from trajdist.data.trajectory_cache import CacheWriter, TrajectoryCache
from trajdist.errors import ArtifactError
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.files import GIB, read_object, user_path
from trajdist.saved.bundle import trajectory_fingerprint
from trajdist.training.session import Session


def open_cache(session: Session, set_name: str, extractor: TrajectoryExtractor) -> TrajectoryCache:
    """Open the trajectory cache of an image set, on a shared disk or on a local disk of each machine.

    A record is one image's trajectories, bfloat16 ``[places, steps, channels]``. All processes must call it.

    Raises:
        ConfigError: ``cache.dir`` cannot be written.
    """
    config, processes = session.config, session.processes
    key = {
        # The fingerprint covers names only: another folder may hold other images under the same names.
        "path": _absolute(str(session.settings(set_name).path)),
        "images": session.sources[set_name].fingerprint,
        "fit": session.settings(set_name).fit,
        "image_size": config.data.image_size,
        "transform": TRANSFORM,
        "trajectory": trajectory_fingerprint(extractor),
        "precision": session.accelerator.mixed_precision,
    }
    length, width = extractor.projection.valid_LD.shape
    shape = (extractor.resolution**2, length, width)
    cache = TrajectoryCache(user_path(str(config.cache.dir)), key, len(session.sources[set_name]), shape)
    processes.all_do(cache.create)
    if processes.is_main:
        for folder in _of_other_versions(cache.folder.parent, key):
            session.say(f"cache: {folder} is of another version of trajdist: remove it if no run with that needs it")
    return cache


def _of_other_versions(caches: Path, key: dict[str, Any]) -> Iterator[Path]:
    """The caches of the same images that were transformed in another way; this version reads none of them."""
    for path in sorted(caches.glob("*/key.json")):
        with suppress(ArtifactError):
            other = read_object(path)
            same_images = all(other.get(name) == key[name] for name in ("path", "images"))
            if same_images and other.get("transform") != key["transform"]:
                yield path.parent


def _absolute(path: str) -> str:
    """A local folder or pattern as an absolute path; prefixed sources and URLs are returned unchanged."""
    return path if ":" in path else os.path.realpath(os.path.expanduser(path))


def open_writer(session: Session, cache: TrajectoryCache) -> CacheWriter:
    """A writer that may add this process's share of the room left in ``cache.max_gib``; all processes must call it.

    The folder may be shared by all, or local to each machine, whose processes then share that room among themselves.
    """
    kept, identity = len(cache), cache.identity()
    sharing = session.processes.gather([identity]).count(identity)
    holds = cache.capacity(session.config.cache.max_gib)
    session.say(
        f"cache: {cache.folder} has the trajectories of {kept:,} of {cache.num_images:,} images "
        f"and may keep {min(holds, cache.num_images):,} ({cache.stride / GIB * min(holds, cache.num_images):.1f} GiB)"
    )
    room = holds - kept
    return CacheWriter(cache, max(0, -(-room // sharing)))
