"""Where images come from: folders here, and which source a path means."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trajdist import launcher
from trajdist.data.base import EXTENSIONS, OTHER_PICTURES, EncodedSource, ImageSource, Names, numbered, version_of
from trajdist.data.storage import THREADS, Access, expand, has_pattern, is_url, read_bytes, refusal, retrying
from trajdist.errors import DataError
from trajdist.files import user_path

# Files whose sizes and times a thread asks for in a row.
PART = 1000
# What the folder of good images is called in a labelled set's folder test.
GOOD_FOLDERS = {"good", "ok"}
# Folders of clean images in labelled sets.
CLEAN = ("train/good", "train/ok", "Normal", "Images/Normal", "Data/Images/Normal")
# In a scoring's output folder: the file that identifies it, and the folder of its pictures.
SCORED, PICTURES = "scoring.json", "maps"


class Listing(NamedTuple):
    """The images below a folder, and what else there is.

    Attributes:
        names: sorted, relative to the folder.
        others: number of other files by ending.
        masks, defects: the first folder, from the top, with masks or with defective images beside clean ones; empty
            if there is none.
    """

    names: list[str]
    others: Counter[str]
    masks: str
    defects: str


def open_source(path: str | None, key: str, access: Access | None = None) -> ImageSource:
    """The source that ``path`` names; ``key`` is the config key or argument it came from, for the error.

    Raises:
        DataError: it does not exist, or holds no images.
    """
    if not path:
        raise DataError(f"{key} is not set: name a folder of images, as in {key}=/data/images.")
    access = access or Access()
    if path.startswith("skimage:"):
        from trajdist.data.samples import SamplePhotos

        return SamplePhotos(path, key)
    if path.startswith("hf:"):
        from trajdist.data.hub import HubDataset

        return HubDataset(path, key)
    if shards := _shards_of(path, key, access.retries):
        from trajdist.data.shards import TarShards

        return TarShards(shards, key, access)
    return ImageFolder(user_path(path), key, access.retries)


def _shards_of(path: str, key: str, retries: int) -> list[str]:
    """The tar shards that a path means: those that a pattern or URL names, or all in a folder without images; or none.

    Raises:
        DataError: a folder holds images as well as tar files, so some would be ignored either way.
    """
    local = user_path(path)
    if is_url(path):
        return _expanded(path, key, retries)
    if not os.path.isdir(local):
        is_shards = path.endswith(".tar") and (os.path.exists(local) or has_pattern(path))
        return _expanded(str(local), key, retries) if is_shards else []
    shards = sorted(str(shard) for shard in local.glob("[!.]*.tar") if os.path.isfile(shard))
    if shards and _list_images(local).names:
        raise DataError(
            f"{key}={path!r} holds images as well as tar files: name {str(local / '*.tar')!r} for the shards, or move "
            "the tar files away."
        )
    return shards


def _expanded(path: str, key: str, retries: int) -> list[str]:
    try:
        found = retrying(lambda: expand(f"{path}*.tar" if path.endswith("/") else path), retries)
    except Exception as error:  # Each store raises errors of its own.
        raise refusal(key, path, error) from None
    if not found:
        raise DataError(f"{key}={path!r} names no shards: nothing there matches.")
    return found


class ImageFolder(EncodedSource):
    """All image files below a folder, with or without class folders, sorted by path; or one image file.

    Attributes:
        root: the folder.
        masks, defects: as :class:`Listing` has them.
    """

    def __init__(self, root: Path, key: str, read_retries: int = 0) -> None:
        if not os.path.exists(root):  # False as well where a folder above is closed to this user.
            raise DataError(f"{key}={str(root)!r} does not exist, or may not be read: name a folder of images.")
        self.root = root if os.path.isdir(root) else root.parent
        self._retries = read_retries
        found = _list_images(root) if self.root is root else _single(root)
        if not found.names:
            raise DataError(f"{key}={str(root)!r} holds no images: files that end in {', '.join(EXTENSIONS)} count.")
        _tell_left_out(f"{key}={str(root)!r}", found.others)
        self._names, self.masks, self.defects = Names(found.names), found.masks, found.defects
        self.fingerprint = self._names.fingerprint

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        return read_bytes(self.root / self.name(index), self._retries)

    def classes(self) -> npt.NDArray[np.int64] | None:
        """One class per folder that holds images; None if there is only one."""
        return numbered(os.path.dirname(self.name(index)) for index in range(len(self)))

    def version(self, index: int) -> int:
        try:
            stat = os.stat(self.root / self.name(index))
        except OSError:
            return 0
        return version_of(stat.st_size, stat.st_mtime_ns)

    def stamp(self) -> str:
        digest = hashlib.sha256(os.fsencode(self.root.resolve()))
        parts = (range(start, min(start + PART, len(self))) for start in range(0, len(self), PART))
        # A network file system takes up to a millisecond to answer, but many can be asked at a time.
        with ThreadPoolExecutor(THREADS) as threads:
            for facts in threads.map(self._sizes_and_times, parts):
                digest.update(facts)
        return digest.hexdigest()

    def _sizes_and_times(self, part: range) -> bytes:
        facts = []
        for index in part:
            try:
                stat = os.stat(os.path.join(self.root, self.name(index)))
            except OSError:
                facts.append("none|")
            else:
                facts.append(f"{stat.st_size} {stat.st_mtime_ns}|")
        return "".join(facts).encode()


def _single(file: Path) -> Listing:
    """A file that is named explicitly may have the ending of any picture format."""
    is_picture = file.suffix.lower() in {*EXTENSIONS, *OTHER_PICTURES}
    return Listing([file.name] if is_picture else [], Counter(), "", "")


def _find_labelled(root: Path, folders: set[str]) -> tuple[str, str]:
    """Where there are masks, and where there are defects, beside clean images, as in MVTec AD, BTAD and VisA.

    Args:
        folders: those that hold images, relative to ``root``.
    """
    name = os.path.basename(os.path.realpath(root))
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for folder in folders:
        parts = PurePath(name, folder).parts
        for depth in range(1, len(parts)):
            inside[parts[:depth]].add(parts[depth])
    from_the_top = sorted(inside)
    masks = (path for path in from_the_top if _are_masked(inside[path]))
    defects = (path for path in from_the_top if _are_sorted(path[-1], inside[path]))
    first_masks, first_defects = next(masks, None), next(defects, None)
    return (
        os.path.join(root, *first_masks[1:]) if first_masks else "",
        os.path.join(root, *first_defects[1:]) if first_defects else "",
    )


def _are_masked(subfolders: set[str]) -> bool:
    return "ground_truth" in subfolders or {"Images", "Masks"} <= subfolders


def _are_sorted(folder: str, subfolders: set[str]) -> bool:
    """Whether clean and defective images are in subfolders of their own."""
    is_test = folder == "test" and not GOOD_FOLDERS.isdisjoint(subfolders) and not subfolders <= GOOD_FOLDERS
    return is_test or {"Normal", "Anomaly"} <= subfolders


def _list_images(root: Path) -> Listing:
    """List what is below a folder; linked folders are followed, once.

    Pictures that a scoring drew are left out: its output folder may lie among the images.
    """
    names: list[str] = []
    others: Counter[str] = Counter()
    folders: set[str] = set()
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        drawn = PICTURES if SCORED in files else None
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != drawn)
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative + os.sep
        for name in (name for name in files if not name.startswith(".")):
            if name.lower().endswith(EXTENSIONS):
                names.append(prefix + name)
                folders.add(relative)
            else:
                others[os.path.splitext(name)[1].lower()] += 1
    return Listing(sorted(names), others, *_find_labelled(root, folders))


def _tell_left_out(folder: str, others: Counter[str]) -> None:
    """Report pictures in unsupported formats on stderr; labels and notes beside images need no mention."""
    if launcher.rank() or not others:
        return
    left_out = sorted(others.keys() & OTHER_PICTURES, key=lambda ending: (-others[ending], ending))
    if not left_out:
        return
    count, endings = sum(others[ending] for ending in left_out), ", ".join([*left_out[:3], "..."][: len(left_out)])
    files = f"file with another ending ({endings}) is" if count == 1 else f"files with other endings ({endings}) are"
    print(f"trajdist: {folder}: {count:,} {files} left out; {', '.join(EXTENSIONS)} count", file=sys.stderr)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"the folder {error.filename!r} cannot be listed ({error.strerror}): make it readable.") from None


def open_sets(wanted: Mapping[str, str | None], access: Access) -> dict[str, ImageSource]:
    """Open several sets to train on, given as ``{"imagenet": path}``, for the keys ``data.imagenet.path`` and so on.

    Raises:
        DataError: one cannot be opened, or holds a labelled set, whose defects and masks are not clean images.
    """
    sources = {name: open_source(path, f"data.{name}.path", access) for name, path in wanted.items()}
    for name, path in wanted.items():
        _refuse_labelled(sources[name], f"data.{name}.path={path!r}")
    return sources


def _refuse_labelled(source: ImageSource, given: str) -> None:
    if not isinstance(source, ImageFolder) or not (labelled := source.masks or source.defects):
        return
    around = (labelled, os.path.dirname(labelled))
    clean = [path for folder in around for part in CLEAN if _has_images(path := os.path.join(folder, part))]
    raise DataError(
        f"{given} {_is_or_contains(source, labelled)} a labelled set, and its defects or masks would be trained on: "
        "name a folder of clean images"
        f"{f', as in {clean[0]!r}' if clean else ''}."
    )


def _is_or_contains(source: ImageFolder, labelled: str) -> str:
    return "is" if os.path.samefile(labelled, source.root) else f"contains {labelled!r},"


def _has_images(folder: str) -> bool:
    return os.path.isdir(folder) and any(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder))


def refuse_masks(source: ImageSource, given: str, use: str) -> None:
    """Refuse masks where images are wanted; ``use`` is what is done to them, such as "scored".

    Raises:
        DataError: there is a folder of masks, which would count as images.
    """
    if not isinstance(source, ImageFolder) or not (labelled := source.masks):
        return
    test = os.path.join(labelled, "test")
    raise DataError(
        f"{given} {_is_or_contains(source, labelled)} a labelled set, and its masks would be {use} as images: "
        "name a folder of images in it"
        f"{f', such as {test!r} (trajdist evaluate takes the set as it is)' if os.path.isdir(test) else ''}."
    )
