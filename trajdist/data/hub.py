"""Hugging Face datasets as a source, read with the ``datasets`` library; images stay encoded in its Arrow files.

``hf:NAME:SPLIT`` is a dataset on the hub, ``hf:imagefolder:DIR`` (or another of :data:`LOADERS`) a local folder, and
``hf:DIR`` or ``hf:DIR:SPLIT`` the output of ``save_to_disk``.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trajdist.data.base import EncodedSource
from trajdist.data.storage import read_bytes
from trajdist.errors import DataError, one_line
from trajdist.files import user_path

LOADERS = ("imagefolder", "webdataset", "parquet", "arrow")


class HubDataset(EncodedSource):
    """A map-style dataset with an image column; the first one is used, and the first ClassLabel column as the class.

    Args:
        path: one of the forms above.
        key: the config key or argument that it came from, for error messages.

    Raises:
        DataError: the library is missing, the dataset cannot be loaded, no split is chosen, or it has no images.
    """

    def __init__(self, path: str, key: str) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{key}={path!r} needs the package datasets: pip install 'trajdist[hf]'.") from None
        try:
            data = _load(path.removeprefix("hf:"))
        except Exception as error:  # datasets raises errors of many types.
            raise DataError(f"{key}={path!r} cannot be loaded ({one_line(error)}): check the name.") from None
        if isinstance(data, datasets.DatasetDict):
            raise DataError(
                f"{key}={path!r} has splits: add one of {', '.join(data)}, as in {path}:{next(iter(data))}."
            )
        columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if not columns or not len(data):
            raise DataError(f"{key}={path!r} holds no images: its columns are {', '.join(data.column_names)}.")
        labels = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        self._labels = _classes(data[labels[0]]) if labels else None
        self._column = columns[0]
        self._data = data.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self.fingerprint = hashlib.sha256(f"{path}\n{len(data)}\n{data._fingerprint}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """The zero-padded index, followed by the original file name if the dataset has it."""
        path = (self._data[index][self._column] or {}).get("path")  # A row may hold no image.
        return f"{index:08d}" + (f"-{Path(path).name}" if path else "")

    def read(self, index: int) -> bytes:
        image: dict[str, Any] | None = self._data[index][self._column]
        if image is None:
            raise OSError("the row holds no image")
        content: bytes = image["bytes"] if image["bytes"] is not None else read_bytes(Path(image["path"]), retries=0)
        return content

    def classes(self) -> npt.NDArray[np.int64] | None:
        return self._labels


def _classes(labels: Sequence[int | None]) -> npt.NDArray[np.int64]:
    """The class numbers; -1 for an image without a label."""
    return np.array([-1 if label is None else label for label in labels], np.int64)


def _load(name: str) -> Any:
    import datasets

    loader, _, rest = name.partition(":")
    if loader in LOADERS:
        folder = str(user_path(rest))
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder!r} is not a folder")
        # Name all files: with data_dir, the library would look for split names, such as "train", in the file names.
        return datasets.load_dataset(loader, data_files={"train": f"{glob.escape(folder)}/**"}, split="train")
    if user_path(loader).is_dir():
        saved = datasets.load_from_disk(str(user_path(loader)))
        return saved[rest] if rest else saved
    return datasets.load_dataset(loader, split=rest or None)
