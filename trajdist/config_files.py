"""Config files: YAML read and written, shipped ones found by name, ``key=value`` overrides laid over them."""

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
from trajdist.errors import ConfigError
from trajdist.files import user_path

DIGITS = re.compile(r"\d+")
NULLS = ("", "~", "null", "Null", "NULL")


def load_config(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (or a shipped config by name), lay ``key=value`` overrides over it, and check the sum.

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
    """Refuse what a shell makes of ``key=/data/{000..127}.tar``: as many arguments, of which the last would win."""
    for one, other in itertools.pairwise(overrides):
        key = one.partition("=")[0]
        if one != other and key.endswith(".path") and DIGITS.sub("", one) == DIGITS.sub("", other):
            raise ConfigError(
                f"{one!r} and {other!r} both set {key}, as when the shell expands braces: quote the pattern, or name "
                "one path."
            )


def refuse_moved(source: str, overrides: Iterable[str], run_dir: str) -> None:
    """Refuse the config.yaml of a run that was moved or copied: it would begin another run where that one was.

    Raises:
        ConfigError: it names another run_dir than the folder it is in, and the command names none.
    """
    folder = user_path(source).parent
    if Path(source).name != "config.yaml" or not (folder / "run.json").is_file():
        return
    named = any(override.startswith("run_dir=") for override in overrides)
    if not named and user_path(run_dir).resolve() != folder.resolve():
        raise ConfigError(
            f"run_dir={run_dir!r} is not where {source!r} is, as after the run was moved: add run_dir={folder} to go "
            "on with it, or name another run_dir to begin anew."
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
    """A key that is there twice."""


class _Loader(yaml.SafeLoader):
    """PyYAML without what it does in silence or with a traceback."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """YAML itself forbids a key that is there twice; PyYAML keeps the last one."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _TwiceError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """All at once (``deep``), which makes an error of an alias inside of what it stands for."""
        try:
            made = super().construct_object(node, deep=True)
            # No file has a NUL or half a surrogate pair in its name.
            os.fsencode(made.replace("\0", "\ud800") if isinstance(made, str) else "")
        except (ValueError, LookupError, AttributeError):
            kind = node.tag.rpartition(":")[2].replace("str", "text")
            what = f"{reprlib.repr(node.value)} is no {kind}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None
        return made

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """010 is ten, as in YAML 1.2 and wherever numbers are padded, and not eight."""
        text = str(self.construct_scalar(node))
        number = int(text) if re.fullmatch(r"[-+]?[0-9]+", text) else int(super().construct_yaml_int(node))
        str(number)  # A ValueError beyond some thousands of digits, whatever base it is written in.
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parse(text: str) -> Any:
    """What a YAML document says.

    Raises:
        yaml.YAMLError: it is none.
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
        reason = " ".join(str(error).split()).rstrip("^ :.")
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
    """What stands behind ``key=``: YAML, but for a key that takes text, where only quotes and null are YAML.

    YAML would cut ``/data/set #1`` short and make a number of ``007``.
    """
    word = text.strip()
    if is_text(key) and word not in NULLS and not word.startswith(("'", '"')):
        return word
    try:
        return _parse(text)
    except _TwiceError as error:
        raise ConfigError(f"{key}={text!r} is not possible: {error.problem}, write it once.") from None
    except yaml.YAMLError as error:
        # What begins like this is YAML; other text is what it says.
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
