"""A multilayer perceptron over the whole trajectory: its first layer can relate any block to any other."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from trajdist.models.linear import Linear
from trajdist.models.reconstruction import Reconstruction


def perceptron(sizes: list[int], dropout: float) -> nn.Sequential:
    """Linear layers of these sizes, each but the last followed by GELU and dropout."""
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [Linear(size_in, size_out), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


class Autoencoder(nn.Module):
    """``[N, L, D]`` -> hidden layers -> latent -> hidden layers -> ``[N, L, D]``."""

    def __init__(
        self, length: int, width: int, hidden_dim: int, latent_dim: int, num_layers: int, dropout: float, **_: int
    ) -> None:
        super().__init__()
        sizes = [length * width, *[hidden_dim] * num_layers, latent_dim]
        self.encoder = perceptron(sizes, dropout)
        self.decoder = perceptron(sizes[::-1], dropout)

    def forward(self, trajectories_NLD: torch.Tensor) -> Reconstruction:
        latent = self.encoder(trajectories_NLD.flatten(1))
        return Reconstruction(self.decoder(latent).view_as(trajectories_NLD), latent)
