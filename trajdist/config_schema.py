"""The keys of the config: their names, defaults, descriptions and types."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from trajdist.config import FREE, Config, Section


def json_schema() -> str:
    """JSON Schema of the config file, for editors."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> ``{"a.b": value}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def flat(config: Config) -> dict[str, Any]:
    """Every key of a config with dots, and its value as in JSON."""
    return flatten(config.model_dump(mode="json"))


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str, bool]]:
    """Walk the schema: (dotted key, default, description, may change on resume) for every leaf."""
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            yield from fields(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.default, field.description or "", field.json_schema_extra == FREE


def is_text(key: str) -> bool:
    """Whether the value of a dotted key is text (or null), and nothing else."""
    kind: Any = Config
    for part in key.split("."):
        if get_origin(kind) is dict:  # data.domains.NAME
            kind = get_args(kind)[1]
        elif isinstance(kind, type) and issubclass(kind, Section) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        else:
            return False
    return kind is str or set(get_args(kind)) == {str, type(None)}
