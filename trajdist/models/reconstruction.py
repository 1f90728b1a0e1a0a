"""What every sequence model returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Reconstruction(NamedTuple):
    """A model's output for ``N`` trajectories of ``L`` steps and ``D`` channels.

    Attributes:
        output_NLD: the reconstructed trajectories.
        latent_NZ: the bottleneck's code (its mean, for a VAE).
        log_variance_NZ: log-variance of the code; None unless the model is variational.
    """

    output_NLD: torch.Tensor
    latent_NZ: torch.Tensor
    log_variance_NZ: torch.Tensor | None = None
