"""What is in a run directory, an adapter, a checkpoint or a safetensors file, as rich renderables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from trajdist.artifacts import METADATA_KEY, check_tensors, read_header
from trajdist.errors import ArtifactError
from trajdist.files import exists, is_file, read_object
from trajdist.saved.rundir import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunDir
from trajdist.screen import lines_on_screen
from trajdist.tables import summary_table

# A folder with more files than this, such as one of pictures, is summed up in one row.
MOST_FILES = 12


def inspect(path: Path) -> Iterator[RenderableType]:
    """Tables about ``path``; metadata are shown, tensors checked if they can be. What is damaged hides nothing else.

    Raises:
        ArtifactError: it does not exist, is not trajdist's, or is damaged; after the tables of all that is whole.
    """
    if not exists(path):
        raise ArtifactError(f"{str(path)!r} does not exist.")
    if is_file(path):
        yield from _inspect_safetensors(path)
    elif exists(path / "manifest.json"):
        yield from _inspect_checkpoint(path)
    elif exists(path / ADAPTER_CONFIG):
        yield from _all_of(_parts_of_adapter(path))
    elif exists(path / "config.yaml"):
        yield from _all_of(_parts_of_run(path))
    elif any(path.glob("*.safetensors")):
        yield from _all_of(_inspect_safetensors(file) for file in sorted(path.glob("*.safetensors")))
    else:
        raise ArtifactError(f"{str(path)!r} is not a run, adapter or checkpoint: it has no config.yaml or manifest.")


def _all_of(parts: Iterable[Iterator[RenderableType]]) -> Iterator[RenderableType]:
    """The tables of every part.

    Raises:
        ArtifactError: at the end, names everything that is damaged.
    """
    problems = []
    for part in parts:
        try:
            yield from part
        except ArtifactError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "; ".join(str(problem).rstrip(".") for problem in problems)
        raise ArtifactError(f"{len(problems)} problems: {listed}.") from problems[0]


def _parts_of_run(path: Path) -> Iterator[Iterator[RenderableType]]:
    rundir = RunDir(path)
    yield _inspect_status(rundir)
    yield _inspect_summary(rundir)
    yield from map(_inspect_safetensors, sorted(path.glob("phase*/*.safetensors")))
    for adapter in sorted(path.glob("phase2/adapter*")):
        yield from _parts_of_adapter(adapter)
    yield from map(_inspect_checkpoint, sorted(path.glob("checkpoints/step-*")))
    for domain in rundir.domains():
        yield from _parts_of_run(domain)


def _inspect_status(rundir: RunDir) -> Iterator[RenderableType]:
    path, problem = rundir.path, None
    status: dict[str, Any] = {"status": "never started"}
    try:
        if exists(path / "status.json"):
            status = read_object(path / "status.json")
            status |= {"status": rundir.told_status(), "time": _local_time(status.get("time"))}
    except ArtifactError as error:
        status, problem = {"status": "damaged"}, error
    yield _facts(f"run {path}", {**status, "files": _listing(path)})
    if problem:
        raise problem


def _inspect_summary(rundir: RunDir) -> Iterator[RenderableType]:
    if exists(rundir.path / "summary.json"):
        yield summary_table(rundir.read_summary())


def _local_time(seconds: Any) -> Any:
    """A readable date; anything that is not a time is returned unchanged."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return seconds


def _listing(path: Path) -> str:
    """All files of a run except those of its domains, which are runs themselves; a folder of many files is one row."""
    rows: list[str] = []
    for folder, subfolders, names in os.walk(path):
        inside = Path(folder).relative_to(path)
        subfolders[:] = sorted(name for name in subfolders if inside / name != Path("domains"))
        rows += _rows(inside, _sizes(folder, names))
    return "\n".join(rows)


def _sizes(folder: str, names: list[str]) -> dict[str, int]:
    """The sizes of these files in bytes, sorted by name; without hidden ones, and those that a run has just removed."""
    sizes = {}
    for name in sorted(name for name in names if not name.startswith(".")):
        with suppress(OSError):
            sizes[name] = os.stat(os.path.join(folder, name)).st_size
    return sizes


def _rows(folder: Path, sizes: dict[str, int]) -> Iterator[str]:
    if len(sizes) > MOST_FILES:
        yield f"{folder}/  {len(sizes):,} files, {sum(sizes.values()):,} bytes"
    else:
        yield from (f"{folder / name}  {size:,} bytes" for name, size in sizes.items())


def _parts_of_adapter(path: Path) -> Iterator[Iterator[RenderableType]]:
    yield _inspect_adapter_config(path)
    yield _inspect_safetensors(path / ADAPTER_WEIGHTS)


def _inspect_adapter_config(path: Path) -> Iterator[RenderableType]:
    document = read_object(path / ADAPTER_CONFIG)
    shown = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
    facts = {key: document.get(key) for key in (*shown, "base_model_name_or_path")}
    yield _facts(f"adapter {path}", facts)


def _inspect_checkpoint(path: Path) -> Iterator[RenderableType]:
    from trajdist.saved.checkpoint import verify

    problem = verify(path)
    facts: dict[str, Any] = {"hashes": "hold" if problem is None else problem}
    if problem is None:
        shown = ("phase", "step", "cursor", "global_batch", "num_processes", "seconds")
        state = read_object(path / "state.json")
        facts |= {key: state.get(key) for key in shown}
        if isinstance(facts["seconds"], float):
            facts["seconds"] = f"{facts['seconds']:.1f}"
    yield _facts(f"checkpoint {path}", facts)
    if problem is not None:
        raise ArtifactError(f"the checkpoint {str(path)!r} is damaged: {problem}.")


def _inspect_safetensors(path: Path) -> Iterator[RenderableType]:
    metadata, tensors = read_header(path)
    yield from _all_of([_inspect_metadata(path, metadata), _inspect_tensors(path, tensors)])


def _inspect_metadata(path: Path, metadata: Mapping[str, str]) -> Iterator[RenderableType]:
    if METADATA_KEY in metadata:
        yield _facts(str(path), _document(path, metadata[METADATA_KEY]))


def _inspect_tensors(path: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> Iterator[RenderableType]:
    table = Table(title=_plain(f"tensors of {path}", "table.title"), title_justify="left")
    table.add_column("name", overflow="fold")
    for column in ("type", "shape"):
        table.add_column(column, no_wrap=True)
    for name, (kind, shape) in sorted(tensors.items()):
        table.add_row(_plain(name), kind, " x ".join(map(str, shape)) or "scalar")
    yield table
    check_tensors(path)


def _document(path: Path, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise ArtifactError(f"{str(path)!r} is damaged: its metadata is not a JSON object.") from None


def _facts(title: str, facts: Mapping[str, Any]) -> Table:
    table = Table(title=_plain(title, "table.title"), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(_plain(key), _plain(str(value)))
    return table


def _plain(text: str, style: str = "") -> Text:
    """Text shown literally: names may look like rich's markup, hold terminal codes or not be valid Unicode."""
    return Text(lines_on_screen(text), style)
