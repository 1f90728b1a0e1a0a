"""From the residual of a place to one number: how far it is from the residuals of clean images.

Shape suffixes: B images, H W grid, P places (H x W, row by row), N = B x P, F valid entries of a trajectory (block
after block), L blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trajdist.extraction.projection import BlockMoments, Reduce
from trajdist.models.linear import laid_out, linear

# Share of the mean variance added to every variance: entries that clean images never move must not decide alone.
SHRINKAGE = 0.1
# How much of what is usual at a place, and of what is usual in the image at hand, is subtracted: half-way between a
# map that knows nothing of its surroundings and one in which a large defect makes itself usual (docs/LOG.md).
PLACE_SHARE, IMAGE_SHARE = 0.5, 0.5
# The image's score is the mean of this share of its places, the hottest ones.
HOTTEST_SHARE = 0.04
# Blocks are whitened together in this many groups: fewer products multiply more zeros, more are too narrow to be fast.
GROUPS = 4


class PlaceMoments:
    """Streaming mean at every place, and covariance about it over all places, of rows that come place by place."""

    def __init__(self, num_places: int, entries: int, device: torch.device) -> None:
        self.all = BlockMoments(entries, device)
        kind = self.all.count.dtype
        self.sum_PF = torch.zeros(num_places, entries, dtype=kind, device=device)
        self.images = torch.zeros((), dtype=kind, device=device)

    def update(self, rows_NF: torch.Tensor, weights_B: torch.Tensor) -> None:
        """Add the rows of B images; an image of weight 0 does not count."""
        num_places = len(self.sum_PF)
        self.all.update(rows_NF, weights_B.repeat_interleave(num_places))
        rows_BPF = rows_NF.unflatten(0, (-1, num_places))
        self.sum_PF += torch.einsum("bpf,b->pf", rows_BPF, weights_B).to(self.sum_PF.dtype)
        self.images += weights_B.sum()

    def all_reduce(self, sum_over_processes: Reduce) -> None:
        """Make these the moments of all processes' rows."""
        self.all.all_reduce(sum_over_processes)
        self.sum_PF, self.images = sum_over_processes(self.sum_PF), sum_over_processes(self.images)

    @property
    def mean_PF(self) -> torch.Tensor:
        return self.sum_PF / self.images.clamp(min=1)

    @property
    def covariance_FF(self) -> torch.Tensor:
        """All scatter is scatter about the places' means plus scatter of those means."""
        between_PF = self.mean_PF - self.all.mean_C
        return self.all.covariance_CC.addmm_(between_PF.T, between_PF, alpha=-1 / len(between_PF))


class ResidualModel(nn.Module):
    """Whitens residuals by their clean covariance and measures them block by block.

    Blocks are whitened in turn from the deepest to the shallowest, each given all deeper ones (a Cholesky
    factorisation of the joint covariance in that order), so that a block's energy is what it adds to what the deeper
    ones have said. The score of a place is the mean over blocks of the root of the energy, in units of the clean one:
    no single block can drown the others.

    Attributes:
        mean_PF, whitening_FF: of clean residuals, per place and over all places.
        energy_L: mean energy of clean places.
        usual_P: how much more than other places this one scores in clean images.
        centre, spread: of clean cell scores, so that a map reads in standard deviations.
    """

    mean_PF: torch.Tensor
    whitening_FF: torch.Tensor
    energy_L: torch.Tensor
    usual_P: torch.Tensor
    centre: torch.Tensor
    spread: torch.Tensor

    def __init__(self, widths: list[int], resolution: int) -> None:
        """``widths`` are the numbers of valid entries of the blocks, ``resolution`` the places per side."""
        super().__init__()
        self.widths = widths
        places, entries = resolution**2, sum(widths)
        self.register_buffer("mean_PF", torch.zeros(places, entries))
        self.register_buffer("whitening_FF", torch.eye(entries))
        self.register_buffer("energy_L", torch.ones(len(self.widths)))
        self.register_buffer("usual_P", torch.zeros(places))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.lay_out()

    def lay_out(self) -> None:
        """Keep the whitening in memory as its products read it."""
        self.whitening_FF = laid_out(self.whitening_FF)

    def energies(self, residual_NF: torch.Tensor) -> torch.Tensor:
        """Energy of each block at each place, ``[B, P, L]``, about 1 for clean images."""
        residual_BPF = residual_NF.unflatten(0, (-1, len(self.mean_PF))) - self.mean_PF
        centred_NF = residual_BPF.flatten(0, 1)
        energies: list[torch.Tensor] = []
        start = 0
        for widths in grouped(self.widths):
            stop = start + sum(widths)
            # The whitening of a block has no entries for shallower ones.
            white_NF = linear(centred_NF[:, start:], self.whitening_FF[start:, start:stop].T)
            energies += [block_NF.square().sum(-1) for block_NF in white_NF.split(widths, 1)]
            start = stop
        return torch.stack(energies, -1).view(*residual_BPF.shape[:2], -1) / self.energy_L

    def cells(self, energies_BPL: torch.Tensor) -> torch.Tensor:
        """Score of every place, ``[B, P]``: about 0 on average and 1 in spread for clean images."""
        raw_BP = roots(energies_BPL) - PLACE_SHARE * self.usual_P
        # The median, as exporters know it.
        median_B1 = raw_BP.sort(1).values[:, (raw_BP.shape[1] - 1) // 2, None]
        raw_BP = raw_BP - IMAGE_SHARE * median_B1
        return (raw_BP - self.centre) / self.spread

    def fit(self, moments: PlaceMoments, whiten: bool = True) -> None:
        """Set means, whitening and clean energies from the moments of clean residuals.

        Without ``whiten`` the whitening stays what it is.
        """
        covariance_FF = moments.covariance_FF.cpu().double()
        if whiten:
            # Of the variance over all places: that about the places' means is zero where there is but one image.
            variance = moments.all.variance_C.mean().cpu().double().clamp(min=1e-6)
            self.whitening_FF.copy_(block_whitening(covariance_FF, variance, self.widths))
        # The expected energy follows from the covariance: no further pass is needed.
        whitening_FF = self.whitening_FF.cpu().double()
        energy_F = (covariance_FF @ whitening_FF).mul_(whitening_FF).sum(0)
        self.energy_L.copy_(torch.stack([part.sum() for part in energy_F.split(self.widths)]).clamp(min=1e-6))
        self.mean_PF.copy_(moments.mean_PF)

    def fit_places(self, roots: BlockMoments) -> None:
        """Set what is usual at each place from the moments of clean images' :func:`roots`."""
        mean_P = roots.mean_C.to(self.usual_P)
        self.usual_P.copy_(mean_P - mean_P.mean())
        # Of a typical image, whose median is about its mean.
        self.centre.copy_((1 - IMAGE_SHARE) * mean_P.mean())
        self.spread.copy_(roots.variance_C.mean().sqrt().clamp(min=1e-6))


def block_whitening(covariance_FF: torch.Tensor, variance: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Whitens the deepest block first and each shallower one given those, ``[F, F]``, for rows from the left.

    Args:
        variance: the scale of the noise that :data:`SHRINKAGE` adds.
    """
    order = deepest_first(widths)
    shrunk_FF = covariance_FF[order[:, None], order]
    shrunk_FF.diagonal().add_(SHRINKAGE * variance)
    lower_FF = torch.linalg.cholesky(shrunk_FF)
    del shrunk_FF
    identity_FF = torch.eye(len(order), dtype=torch.float64)
    inverse_FF = torch.linalg.solve_triangular(lower_FF, identity_FF, upper=False)
    del lower_FF, identity_FF
    back = torch.argsort(order)
    return inverse_FF[back[:, None], back].T


def roots(energies_BPL: torch.Tensor) -> torch.Tensor:
    """Mean over blocks of the root of the energy, ``[B, P]``."""
    return energies_BPL.sqrt().mean(-1)


def deepest_first(widths: list[int]) -> torch.Tensor:
    """Entry numbers with the blocks from the last to the first, each block's own entries in order."""
    blocks = [torch.arange(start, start + width) for start, width in zip(starts(widths), widths, strict=True)]
    return torch.cat(blocks[::-1])


def starts(widths: list[int]) -> list[int]:
    """Number of each block's first entry."""
    return [sum(widths[:block]) for block in range(len(widths))]


def grouped(widths: list[int]) -> list[list[int]]:
    """The blocks' widths, in order, in at most :data:`GROUPS` groups of about the same number of entries."""
    groups: list[list[int]] = [[] for _ in range(GROUPS)]
    for start, width in zip(starts(widths), widths, strict=True):
        groups[GROUPS * start // sum(widths)].append(width)
    return [group for group in groups if group]


def image_scores(cells_BP: torch.Tensor) -> torch.Tensor:
    """Mean of the hottest places, ``[B]``."""
    hottest = max(1, round(HOTTEST_SHARE * cells_BP.shape[1]))
    return cells_BP.topk(hottest, dim=1).values.mean(1)


def upsample(cells_BHW: torch.Tensor, size: int) -> torch.Tensor:
    """Interpolated to the image, ``[B, size, size]``."""
    return F.interpolate(cells_BHW[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
