"""Sequence models by name: those of trajdist, and those that installed packages register. Needs no torch.

A package adds a model by one line in its metadata, in the group ``trajdist.models``::

    [project.entry-points."trajdist.models"]
    mine = "my_package.my_model:MyModel"

``MyModel`` is called as :func:`trajdist.models.registry.build_model` calls it.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from trajdist.errors import ConfigError

GROUP = "trajdist.models"
BUILT_IN = ("autoencoder", "vae", "transformer")


def installed_models() -> dict[str, EntryPoint]:
    """The models of other packages; trajdist's own names are not for others."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN}


def known_model(name: str) -> str:
    """The name, if a model has it.

    Raises:
        ValueError: none has.
    """
    if name not in BUILT_IN and name not in (others := installed_models()):
        *some, last = (repr(known) for known in (*BUILT_IN, *sorted(others)))
        raise ValueError(f"it should be {', '.join(some)} or {last}, or its package should be installed")
    return name


def load_model_class(name: str) -> object:
    """What the package of a model registered under its name.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    entry = installed_models().get(name)
    if entry is None:
        raise ConfigError(f"model.type={name!r} is no model that is installed.")
    try:
        return entry.load()
    except Exception as error:  # Somebody else's module may raise anything.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"model.type={name!r} is {entry.value!r}, which cannot be imported ({reason}).") from None
