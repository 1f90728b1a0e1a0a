"""From a nested mapping to a config: the schema, the rules that tie two keys together, and the error messages."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Mapping
from datetime import date
from typing import Any

from pydantic import ValidationError

from trajdist import launcher
from trajdist.config import Config, Model
from trajdist.config_schema import fields
from trajdist.errors import ConfigError


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping against the schema, and the rules that tie two keys together."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, [key for key, *_ in fields()])) from None
    model = config.model
    # Other types ignore the default, which every dumped config contains; a number that the user chose must fit.
    heads_matter = model.type == "transformer" or model.num_heads != Model().num_heads
    if heads_matter and model.hidden_dim % model.num_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} does not divide model.hidden_dim={model.hidden_dim}: "
            "choose a number of heads that does."
        )
    _check_validation(config)
    _check_domains(config)
    _check_targets(config)
    return config


def _check_domains(config: Config) -> None:
    """Domains are set by ``data.domain`` or ``data.domains``, not both; several are validated on held-out images."""
    if not config.data.domains:
        return
    names = ", ".join(config.data.domains)
    if config.data.domain.path is not None:
        raise ConfigError(
            f"data.domain.path={config.data.domain.path!r} and data.domains ({names}) are both set: leave one out, as "
            "data.domain.path=null does."
        )
    if config.validation.path is not None:
        raise ConfigError(
            f"validation.path={config.validation.path!r} is for one domain, data.domains has {names}: leave it out, or "
            "adapt to one domain at a time."
        )
    precision = config.runtime.mixed_precision
    if (launcher.mixed_precision() if precision == "auto" else precision) == "fp16":
        raise ConfigError(
            "runtime.mixed_precision='fp16', set here or by accelerate launch, can scale the gradients of only one "
            "domain: use bf16 or no."
        )


def _check_validation(config: Config) -> None:
    """Refuse validation keys that mean nothing without others."""
    validation, patience = config.validation, config.early_stopping.patience
    if not validation.every_epochs and (patience or validation.path is not None):
        key, value = ("early_stopping.patience", patience) if patience else ("validation.path", validation.path)
        raise ConfigError(f"{key}={value!r} needs validations: set validation.every_epochs=1, or leave it out.")
    if validation.every_epochs and validation.path is None and not config.calibration.holdout_fraction:
        raise ConfigError(
            f"validation.every_epochs={validation.every_epochs} has nothing to validate on: raise "
            "calibration.holdout_fraction above 0, or name labelled images with validation.path."
        )


def _check_targets(config: Config) -> None:
    """Check the regular expression now: PEFT would only see it after Phase 1."""
    targets = config.domain_adaptation.lora.target_modules
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"domain_adaptation.lora.target_modules={targets!r} is not a valid regular expression ({error}): fix it, "
            "or write a list of module names, as in [encoder.0, decoder.0]."
        ) from None


def _explain(error: ValidationError, known: list[str]) -> str:
    """The first mistake as one sentence; ``known`` are the dotted keys that exist."""
    problem, *others = error.errors(include_url=False)
    known = [*known, *_of_domain(problem["loc"], known)]
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    key, value = _key(problem["loc"], sections), problem["input"]
    if problem["loc"][-1:] == ("[key]",):  # Only domains have free names.
        quoted = "in quotes, " if problem["type"] == "string_type" else ""
        return (
            f"data.domains has a domain {value!r}: write its name {quoted}with only letters A-Z and a-z, digits, - and "
            "_ (at most 64, the first a letter or digit)."
        )
    if problem["type"] == "invalid_key":
        return f"the config has a key {value!r}, which is not text: trajdist config lists all keys."
    if problem["type"] == "extra_forbidden":
        # For an unknown group, the keys in it tell more about what was meant.
        while isinstance(value, Mapping) and value:
            inner, value = next(iter(value.items()))
            key = f"{key}.{inner}"
        shown, close = key if key.isprintable() else ascii(key), _nearest(key, known)
        fix = f"did you mean {close}?" if close else "trajdist config lists all keys."
        return f"unknown config key {shown} (= {_shown(value)}): {fix}"
    if key in sections:
        return f"{key} = {_shown(value)} is not a group of keys: write {key}.KEY=VALUE (see trajdist config)."
    # For a key that takes several types, pydantic reports an error for each.
    same = [each for each in (problem, *others) if _key(each["loc"], sections) == key and each["input"] is value]
    message = " or ".join(dict.fromkeys(_said(each["msg"]) for each in same))
    if problem["type"] == "list_type" and isinstance(value, (str, int, float)):
        message += f", as in {_as_list(key, str(value))}"
    if problem["type"] == "string_type" and isinstance(value, (int, float, date)):
        message += ", so write it in quotes"
    if (key, value) == ("backbone.weights", None):
        message += ", or the word none for random weights"
    return f"{key} = {_shown(value)} is not possible: {message} (see trajdist config --schema)."


def _key(location: tuple[int | str, ...], sections: set[str]) -> str:
    """The dotted key of a mistake, without the union branches that pydantic adds to the location."""
    key, *rest = [str(part) for part in location] or ["the config"]
    for part in rest:
        if key not in sections:
            break
        key = f"{key}.{part}"
    return key


def _said(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _as_list(key: str, text: str) -> str:
    """The list that was meant, for the command line."""
    if not text.startswith("["):
        return f"{key}=[{text}]"
    # It has brackets but was read as text: an item such as ``layer?.*`` lacks quotes, or the shell removed them.
    items = ",".join(repr(item.strip(" '\"")) for item in text.strip("[]").split(","))
    return f'"{key}=[{items}]"'


def _shown(value: object) -> str:
    """A value as it was written, abbreviated: YAML aliases can expand a few lines to billions of items."""
    brief = reprlib.Repr()
    brief.maxlevel = 2
    brief.maxstring = brief.maxother = brief.maxlong = 200
    return repr(str(value)) if isinstance(value, date) else brief.repr(value)


def _nearest(key: str, known: list[str]) -> str | None:
    """The key that was probably meant: equal but for case or missing groups, or similar with a similar last part."""
    names = {name.lower(): name for name in known}
    lower, last = key.lower(), _last(key.lower())
    if lower in names:
        return names[lower]
    ends = [name for name in names if name.endswith(f".{lower}")]
    alike = difflib.get_close_matches(lower, names, n=5)
    found = ends or [name for name in alike if difflib.get_close_matches(last, [_last(name)])]
    return names[found[0]] if found else None


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _of_domain(location: tuple[Any, ...], known: list[str]) -> list[str]:
    """The keys of the domain of ``data.domains`` that ``location`` is in."""
    if location[:2] != ("data", "domains") or len(location) < 3:
        return []
    own = f"data.domains.{location[2]}."
    return [own + key.removeprefix("data.domain.") for key in known if key.startswith("data.domain.")]
