"""From the residual of a place to one number: how far it is from the residuals of clean images.

Shape suffixes: N places, F valid entries of a trajectory (block after block), L blocks, H W grid, B images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trajdist.trajectory import BlockMoments

# Share of the mean variance added to every variance: entries that clean images never move must not decide alone.
SHRINKAGE = 1e-2


class ResidualModel(nn.Module):
    """Whitens residuals by their clean covariance and measures them block by block.

    Blocks are whitened in turn from the deepest to the shallowest, each given all deeper ones (a Cholesky
    factorisation of the joint covariance in that order), so that a block's energy is what it adds to what the deeper
    ones have said. The score of a place is the mean over blocks of the logarithm of that energy, in which no single
    block can drown the others. What is usual at a place in the frame is subtracted.

    Attributes:
        mean_F, whitening_FF: of clean residuals.
        usual_HW, spread: mean score per place, and standard deviation over all places, of clean images.
    """

    mean_F: torch.Tensor
    whitening_FF: torch.Tensor
    usual_HW: torch.Tensor
    spread: torch.Tensor

    def __init__(self, valid_LD: torch.Tensor, resolution: int) -> None:
        super().__init__()
        self.widths = valid_LD.sum(1).tolist()
        entries = sum(self.widths)
        self.register_buffer("mean_F", torch.zeros(entries))
        self.register_buffer("whitening_FF", torch.eye(entries))
        self.register_buffer("usual_HW", torch.zeros(resolution, resolution))
        self.register_buffer("spread", torch.ones(()))

    def energies(self, residual_NF: torch.Tensor) -> torch.Tensor:
        """Mean squared whitened residual of each block, ``[N, L]``; about 1 for clean images."""
        white_NF = (residual_NF - self.mean_F) @ self.whitening_FF
        parts = white_NF.square().split(self.widths, dim=1)
        return torch.stack([part.mean(1) for part in parts], 1)

    def standardise(self, energies_BHWL: torch.Tensor) -> torch.Tensor:
        """Score of every place, ``[B, H, W]``: about 0 on average and 1 in spread for clean images."""
        return (cell_scores(energies_BHWL) - self.usual_HW) / self.spread

    def fit(self, moments: BlockMoments) -> None:
        """Set mean and whitening from the moments of clean residuals."""
        covariance_FF = moments.covariance_CC.double().cpu()
        covariance_FF += SHRINKAGE * covariance_FF.diagonal().mean() * torch.eye(len(covariance_FF))
        # Cholesky takes entries first to last, so the order is reversed before and after.
        lower_FF = torch.linalg.cholesky(covariance_FF.flip(0, 1))
        identity_FF = torch.eye(len(lower_FF), dtype=torch.float64)
        inverse_FF = torch.linalg.solve_triangular(lower_FF, identity_FF, upper=False)
        self.whitening_FF.copy_(inverse_FF.T.flip(0, 1))
        self.mean_F.copy_(moments.mean_C)

    def fit_places(self, places: BlockMoments) -> None:
        """Set what is usual from the moments of clean images' score maps, as :meth:`standardise` gave them."""
        mean_P, variance_P = places.mean_C, places.covariance_CC.diagonal()
        self.usual_HW += mean_P.view_as(self.usual_HW).to(self.usual_HW) * self.spread
        self.spread *= variance_P.mean().sqrt().clamp(min=1e-6).to(self.spread)


def cell_scores(energies_NL: torch.Tensor) -> torch.Tensor:
    """Mean logarithm of the blocks' energies, ``[..., L] -> [...]``."""
    return energies_NL.clamp(min=1e-6).log().mean(-1)


def smooth(cells_BHW: torch.Tensor) -> torch.Tensor:
    """Binomial 3 x 3 mean, the border repeated."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=cells_BHW.device)
    padded = F.pad(cells_BHW[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, (torch.outer(kernel, kernel) / 16.0)[None, None])[:, 0]


def image_scores(cells_BHW: torch.Tensor) -> torch.Tensor:
    """Mean of the hottest 2 % of the places, at least one, ``[B]``."""
    flat_BP = cells_BHW.flatten(1)
    return flat_BP.topk(max(1, round(0.02 * flat_BP.shape[1])), dim=1).values.mean(1)


def upsample(cells_BHW: torch.Tensor, size: int) -> torch.Tensor:
    """Smoothed and interpolated to the image, ``[B, size, size]``."""
    return F.interpolate(smooth(cells_BHW)[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
