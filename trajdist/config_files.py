"""Config files: YAML read and written, shipped ones found by name, ``key=value`` overrides applied to them."""

from __future__ import annotations

import itertools
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from trajdist.config import Config
from trajdist.config_parsing import parse_config
from trajdist.config_schema import is_text
from trajdist.errors import ConfigError, one_line
from trajdist.files import user_path

DIGITS = re.compile(r"\d+")
NULLS = ("", "~", "null", "Null", "NULL")


def load_config(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (or a shipped config by name), apply ``key=value`` overrides, and check the result.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of the wrong type or out of bounds.
    """
    tree: dict[str, Any] = read_yaml(find_config(str(source))) if source is not None else {}
    overrides = list(overrides)
    _refuse_expanded_paths(overrides)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def _refuse_expanded_paths(overrides: list[str]) -> None:
    """Refuse a pattern that the shell has expanded, as in ``key=/data/{000..127}.tar``: the last one would win."""
    for one, other in itertools.pairwise(overrides):
        (key, _, path), (other_key, _, other_path) = one.partition("="), other.partition("=")
        alike = path != other_path and DIGITS.sub("", path) == DIGITS.sub("", other_path)
        if alike and key == other_key and key.endswith(".path"):
            raise ConfigError(
                f"{one!r} and {other!r} both set {key}, as if the shell had expanded braces: quote the pattern, or "
                "name one path."
            )


def refuse_moved(source: str, overrides: Iterable[str], run_dir: str) -> None:
    """Refuse the config.yaml of a moved or copied run: it would start another run at the old place.

    Raises:
        ConfigError: its run_dir is not the folder it is in, and the command sets none.
    """
    folder = user_path(source).parent
    if Path(source).name != "config.yaml" or not (folder / "run.json").is_file():
        return
    named = any(override.startswith("run_dir=") for override in overrides)
    if not named and user_path(run_dir).resolve() != folder.resolve():
        raise ConfigError(
            f"run_dir={run_dir!r} is not where {source!r} is, as if the run had been moved: add run_dir={folder} to "
            "resume it, or name another run_dir to start a new one."
        )


def find_config(name: str) -> Path:
    """Return the path of a config file; a bare name such as ``quickstart`` finds a shipped one."""
    path = Path(name)
    if os.path.isfile(path):
        return path
    shipped = {file.stem: file for folder in _config_folders() for file in sorted(folder.glob("*.yaml"))}
    if path.stem in shipped and path.suffix in ("", ".yaml") and len(path.parts) == 1:
        return shipped[path.stem]
    if os.path.isdir(path):
        raise ConfigError(f"the config {name!r} is a folder: name a YAML file in it.")
    raise ConfigError(
        f"there is no config file {name!r}: name a YAML file, or one of the shipped configs {', '.join(shipped)}."
    )


def _config_folders() -> Iterator[Path]:
    """The wheel carries configs/ inside the package; a checkout has it beside the package."""
    package = Path(str(resources.files("trajdist")))
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            yield folder


class _TwiceError(yaml.composer.ComposerError):
    """A duplicate key."""


class _Loader(yaml.SafeLoader):
    """PyYAML, with errors where it would guess silently or end in a traceback."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse duplicate keys, as YAML does; PyYAML keeps the last one."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _TwiceError(None, None, f"{key.value} is set twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct everything at once (``deep``), so that an alias inside its own anchor is an error."""
        try:
            made = super().construct_object(node, deep=True)
            # Text may name a file, and no file name holds a NUL or a lone surrogate.
            os.fsencode(made.replace("\0", "\ud800") if isinstance(made, str) else "")
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2].replace("str", "text")
            what = f"{reprlib.repr(node.value)} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None
        return made

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read 010 as ten, as YAML 1.2 does, not as eight."""
        text = str(self.construct_scalar(node))
        number = int(text) if re.fullmatch(r"[-+]?[0-9]+", text) else int(super().construct_yaml_int(node))
        str(number)  # Raises ValueError beyond a few thousand digits, whatever base the number is written in.
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parse(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping."""
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = one_line(error, 400).rstrip("^ :.")  # YAML's quotes the line and points at a place in it.
        raise ConfigError(f"the config {str(path)!r} cannot be read as YAML ({reason}): fix the file.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the config {str(path)!r} holds no 'key: value' lines: it is not a trajdist config.")
    return tree


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _value(key: str, text: str) -> Any:
    """The value in ``key=text``: YAML, except that of a key that takes text, only quotes and null are YAML.

    YAML would cut ``/data/set #1`` short and turn ``007`` into a number.
    """
    word = text.strip()
    if is_text(key) and word not in NULLS and not word.startswith(("'", '"')):
        return word
    try:
        return _parse(text)
    except _TwiceError as error:
        raise ConfigError(f"{key}={text!r} is not possible: {error.problem}, set it once.") from None
    except yaml.YAMLError as error:
        # Text that begins like this is meant as YAML; any other is taken literally.
        if isinstance(error, yaml.constructor.ConstructorError) and word.startswith(("{", "[", "'", '"')):
            raise ConfigError(f"{key}={text!r} is not possible: {error.problem}, write another value.") from None
        return text


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"the override {override!r} is not of the form key=value, such as model.hidden_dim=64.")
    value = _value(key, text)
    *parents, leaf = key.split(".")
    for parent in parents:
        node = tree.get(parent)
        if not isinstance(node, dict):
            node = tree[parent] = {}
        tree = node
    tree[leaf] = value
