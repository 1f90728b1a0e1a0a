"""Losses: pure functions, float32, one value per image.

Shape suffixes: B images, N rows (places of all images), L steps, D channels of a trajectory, Z latent code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trajdist.models.reconstruction import Reconstruction


class Losses(NamedTuple):
    """Per-image losses, each ``[B]``: the one to minimise, and its reconstruction and KL parts."""

    loss: torch.Tensor
    recon: torch.Tensor
    kl: torch.Tensor


def trajectory_losses(
    reconstruction: Reconstruction,
    target_NLD: torch.Tensor,
    valid_LD: torch.Tensor,
    num_images: int,
    kl_weight: float,
) -> Losses:
    """Mean squared error per valid entry, plus the weighted KL divergence on the same scale.

    For a Gaussian decoder of unit variance, the negative evidence lower bound of a cell is
    ``0.5 * squared error + KL``. Both are divided by half the cell's number of valid entries, so that ``recon`` is a
    mean squared error whatever the shape, and with ``kl_weight`` 1 the loss is that bound, rescaled. Padded entries
    do not count.

    Args:
        target_NLD: the same number of rows for every image, image after image.
        valid_LD: bool, False for padding.
        num_images: B.
    """
    error_NLD = (reconstruction.output_NLD.float() - target_NLD.float()).square() * valid_LD
    entries = valid_LD.sum()
    recon_B = error_NLD.sum((1, 2)).view(num_images, -1).mean(1) / entries
    kl_B = torch.zeros_like(recon_B)
    if reconstruction.log_variance_NZ is not None:
        kl_N = gaussian_kl(reconstruction.latent_NZ.float(), reconstruction.log_variance_NZ.float())
        kl_B = 2.0 * kl_N.view(num_images, -1).mean(1) / entries
    return Losses(recon_B + kl_weight * kl_B, recon_B, kl_B)


def gaussian_kl(mean_NZ: torch.Tensor, log_variance_NZ: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over the latent: ``[N]`` (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean_NZ.square() + log_variance_NZ.exp() - 1.0 - log_variance_NZ).sum(-1)
