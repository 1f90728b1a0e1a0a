"""Sequence models by name: trajdist's own, and those that installed packages register. Does not import torch.

A package adds a model with one line in its metadata, in the group ``trajdist.models``::

    [project.entry-points."trajdist.models"]
    mine = "my_package.my_model:MyModel"

``MyModel`` is called as :func:`trajdist.models.registry.build_model` calls it.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from trajdist.errors import ConfigError, one_line

GROUP = "trajdist.models"
BUILT_IN = {
    "autoencoder": "trajdist.models.autoencoder:Autoencoder",
    "vae": "trajdist.models.vae:VariationalAutoencoder",
    "transformer": "trajdist.models.transformer:Transformer",
}


def installed_models() -> dict[str, EntryPoint]:
    """The models registered by other packages, which cannot override trajdist's own."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN}


def known_model(name: str) -> str:
    """Return ``name`` if there is a model of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BUILT_IN and name not in (others := installed_models()):
        *some, last = (repr(known) for known in (*BUILT_IN, *sorted(others)))
        raise ValueError(f"it should be {', '.join(some)} or {last}, or its package should be installed")
    return name


def load_model_class(name: str) -> object:
    """Import the model of this name: one of trajdist's own, or what a package registered.

    Raises:
        ConfigError: no package did, or it cannot be imported.
    """
    entry = EntryPoint(name, BUILT_IN[name], GROUP) if name in BUILT_IN else installed_models().get(name)
    if entry is None:
        raise ConfigError(f"model.type={name!r} is not installed: install the package that provides it.")
    try:
        return entry.load()
    except Exception as error:  # A third-party module may raise anything.
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ConfigError(f"model.type={name!r} is {entry.value!r}, which cannot be imported ({reason}).") from None
