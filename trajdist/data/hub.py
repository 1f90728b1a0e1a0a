"""Hugging Face data sets as a source, read with the library ``datasets``; images stay encoded in its Arrow files.

``hf:NAME:SPLIT`` names one of the hub, ``hf:imagefolder:DIR`` (or another loader of files) what lies in a folder,
``hf:DIR`` or ``hf:DIR:SPLIT`` what ``save_to_disk`` wrote.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trajdist.data.base import EncodedSource
from trajdist.errors import DataError, one_line

LOADERS = ("imagefolder", "webdataset", "parquet", "arrow")


class HubDataset(EncodedSource):
    """A map-style data set with a column of images; the first such column counts.

    Args:
        path: as above.
        key: the config key or argument it came from, for the errors.

    Raises:
        DataError: the library is missing, the data set cannot be loaded, or it has no column of images.
    """

    def __init__(self, path: str, key: str) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(f"{key}={path!r} needs the package datasets: pip install 'trajdist[hf]'.") from None
        try:
            data = _load(path.removeprefix("hf:"))
        except Exception as error:  # The library raises errors of many kinds.
            raise DataError(f"{key}={path!r} cannot be loaded ({one_line(error)}).") from None
        if isinstance(data, datasets.DatasetDict):
            raise DataError(
                f"{key}={path!r} has splits: add one of {', '.join(data)}, as in {path}:{next(iter(data))}."
            )
        columns = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if not columns or not len(data):
            raise DataError(f"{key}={path!r} holds no images: its columns are {', '.join(data.column_names)}.")
        labels = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        self._labels = np.array(data[labels[0]], np.int64) if labels else None
        self._column = columns[0]
        self._data = data.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self.fingerprint = hashlib.sha256(f"{path}\n{len(data)}\n{data._fingerprint}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        """The file it came from, if the data set knows, behind its number."""
        path = self._data[index][self._column]["path"]
        return f"{index:08d}" + (f"-{Path(path).name}" if path else "")

    def read(self, index: int) -> bytes:
        image: dict[str, Any] = self._data[index][self._column]
        content: bytes = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return content

    def classes(self) -> npt.NDArray[np.int64] | None:
        return self._labels


def _load(name: str) -> Any:
    import datasets

    loader, _, rest = name.partition(":")
    if loader in LOADERS:
        folder = str(Path(rest).expanduser())
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder!r} is no folder")
        return datasets.load_dataset(loader, data_dir=folder, split="train")
    if Path(loader).expanduser().is_dir():
        saved = datasets.load_from_disk(str(Path(loader).expanduser()))
        return saved[rest] if rest else saved
    return datasets.load_dataset(loader, split=rest or None)
