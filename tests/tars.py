"""Small tar shards for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from images import noise


def encoded(seed: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    noise(seed).save(content, kind)
    return content.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """A tar of regular files, in the order given; names may come twice."""
    pairs = members.items() if isinstance(members, Mapping) else members
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in pairs:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, images: Path, per_shard: int) -> list[Path]:
    """The files of a folder of images, in its order, in shards of ``per_shard``."""
    names = sorted(str(file.relative_to(images)) for file in images.rglob("*.png"))
    parts = [names[start : start + per_shard] for start in range(0, len(names), per_shard)]
    return [
        write_tar(folder / f"set-{number:06d}.tar", [(name, (images / name).read_bytes()) for name in part])
        for number, part in enumerate(parts)
    ]
