"""Sequence models by name. A new one is a file beside this one and a line in ``MODELS`` (and in ``plugins.BUILT_IN``).

One that lives in another package is registered by that package: see :mod:`trajdist.plugins`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import nn

from trajdist.models.autoencoder import Autoencoder
from trajdist.models.transformer import Transformer
from trajdist.models.vae import VariationalAutoencoder
from trajdist.plugins import load_model_class

Builder = Callable[..., nn.Module]
MODELS: dict[str, Builder] = {
    "autoencoder": Autoencoder,
    "vae": VariationalAutoencoder,
    "transformer": Transformer,
}


def build_model(
    kind: str,
    *,
    length: int,
    width: int,
    hidden_dim: int,
    latent_dim: int,
    num_layers: int,
    num_heads: int,
    dropout: float,
) -> nn.Module:
    """Build the model that ``model.type`` names, for trajectories of ``length`` blocks and ``width`` channels.

    It takes ``[N, L, D]`` and returns a :class:`trajdist.models.reconstruction.Reconstruction`. Every model is called
    with all of these names, and uses those that mean something to it.

    Raises:
        ConfigError: the package of the model cannot be imported.
    """
    builder = MODELS[kind] if kind in MODELS else cast(Builder, load_model_class(kind))
    return builder(
        length=length,
        width=width,
        hidden_dim=hidden_dim,
        latent_dim=latent_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        dropout=dropout,
    )
