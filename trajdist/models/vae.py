"""Variational autoencoder (Kingma & Welling 2014) over the whole trajectory."""

from __future__ import annotations

import torch
from torch import nn

from trajdist.models.autoencoder import perceptron
from trajdist.models.reconstruction import Reconstruction


class VariationalAutoencoder(nn.Module):
    """Encodes ``[N, L, D]`` to a Gaussian; decodes a sample when training, else its mean (scores are deterministic)."""

    def __init__(
        self, length: int, width: int, hidden_dim: int, latent_dim: int, num_layers: int, dropout: float, **_: int
    ) -> None:
        super().__init__()
        hidden = [hidden_dim] * num_layers
        self.encoder = perceptron([length * width, *hidden, 2 * latent_dim], dropout)
        self.decoder = perceptron([latent_dim, *hidden, length * width], dropout)

    def forward(self, trajectories_NLD: torch.Tensor) -> Reconstruction:
        mean, log_variance = self.encoder(trajectories_NLD.flatten(1)).float().chunk(2, -1)
        # Early in training exp() must stay finite.
        log_variance = log_variance.clamp(-20.0, 10.0)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance) if self.training else mean
        return Reconstruction(self.decoder(latent).view_as(trajectories_NLD), mean, log_variance)
