"""Sequence models by name. A new one is a file beside this one and a line in ``build_model``."""

from __future__ import annotations

from torch import nn

from trajdist.models.autoencoder import Autoencoder
from trajdist.models.transformer import Transformer
from trajdist.models.vae import VariationalAutoencoder


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
    """Build the model that ``model.type`` names, for trajectories of ``length`` blocks and ``width`` channels."""
    if kind == "autoencoder":
        return Autoencoder(length, width, hidden_dim, latent_dim, num_layers, dropout)
    if kind == "vae":
        return VariationalAutoencoder(length, width, hidden_dim, latent_dim, num_layers, dropout)
    if kind == "transformer":
        return Transformer(length, width, hidden_dim, latent_dim, num_layers, num_heads, dropout)
    raise ValueError(f"unknown model type {kind!r}")
