"""Reduces the residual at a place to one number: its distance from the residuals of clean images.

Shape suffixes: B images, H W grid, P places (H x W, row-major), N = B x P, F valid entries of a trajectory (block after
block), L steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trajdist.extraction.projection import BlockMoments, Reduce
from trajdist.models.linear import laid_out, linear

# Fraction of the mean variance added to each variance, so that entries almost constant on clean images do not dominate.
SHRINKAGE = 0.1
# One or two images hardly differ from their own mean: so that new ones do not score millions, a block's mean energy is
# at least this per entry (a hundredth of what whitening aims at), and the spread at least this.
FLOOR = 0.01
# Fractions of the place's usual score and of the image's median that are subtracted: a compromise between ignoring the
# context and letting a large defect raise its own baseline (docs/LOG.md).
PLACE_SHARE, IMAGE_SHARE = 0.5, 0.5
# The image score is the mean over this fraction of its places, the highest-scoring ones.
HOTTEST_SHARE = 0.04
# Blocks are whitened in this many groups: fewer groups multiply more zeros, more groups make slow, narrow matrices.
GROUPS = 4


class PlaceMoments:
    """Streaming mean at each place, and pooled within-place covariance."""

    def __init__(self, num_places: int, entries: int, device: torch.device) -> None:
        self.all = BlockMoments(entries, device)
        kind = self.all.count.dtype
        self.sum_PF = torch.zeros(num_places, entries, dtype=kind, device=device)
        self.images = torch.zeros((), dtype=kind, device=device)

    def update(self, rows_NF: torch.Tensor, weights_B: torch.Tensor) -> None:
        """Add rows, float ``[N, F]``, of B images with weights ``[B]``; an image of weight 0 is ignored."""
        num_places = len(self.sum_PF)
        self.all.update(rows_NF, weights_B.repeat_interleave(num_places))
        rows_BPF = rows_NF.unflatten(0, (-1, num_places))
        self.sum_PF += torch.einsum("bpf,b->pf", rows_BPF, weights_B).to(self.sum_PF.dtype)
        self.images += weights_B.sum()

    def all_reduce(self, sum_over_processes: Reduce) -> None:
        """Combine the moments of all processes, in place."""
        self.all.all_reduce(sum_over_processes)
        self.sum_PF, self.images = sum_over_processes(self.sum_PF), sum_over_processes(self.images)

    @property
    def mean_PF(self) -> torch.Tensor:
        return self.sum_PF / self.images.clamp(min=1)

    @property
    def covariance_FF(self) -> torch.Tensor:
        """Within-place covariance: the total covariance less the covariance of the place means."""
        between_PF = self.mean_PF - self.all.mean_C
        return self.all.covariance_CC.addmm_(between_PF.T, between_PF, alpha=-1 / len(between_PF))


class ResidualModel(nn.Module):
    """Whitens residuals with their clean covariance and computes an energy per block.

    Blocks are whitened from the deepest to the shallowest, each conditioned on all deeper ones (a Cholesky
    factorisation of the joint covariance in that order), so a block's energy is what it adds to the information in the
    deeper ones. A place's score is the mean over blocks of the square root of the energy, normalised by the clean
    energy so that no single block dominates.

    Attributes:
        mean_PF: float32, mean clean residual at each place.
        whitening_FF: float32, whitening of clean residuals, shared by all places.
        energy_L: float32, mean energy of each block over clean places.
        usual_P: float32, the place's mean clean score relative to the average place.
        centre: approximate mean of clean scores.
        spread: the unit of maps: standard deviation of clean :func:`roots` at a place, as root mean square over places.
    """

    mean_PF: torch.Tensor
    whitening_FF: torch.Tensor
    energy_L: torch.Tensor
    usual_P: torch.Tensor
    centre: torch.Tensor
    spread: torch.Tensor

    def __init__(self, widths: list[int], resolution: int) -> None:
        """``widths`` is the number of valid entries of each block, ``resolution`` the number of places per side."""
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
        """Store the whitening in the memory layout that :func:`linear` reads."""
        self.whitening_FF = laid_out(self.whitening_FF)

    def energies(self, residual_NF: torch.Tensor) -> torch.Tensor:
        """Energy of each block at each place, float32 ``[B, P, L]``, about 1 for clean images."""
        residual_BPF = residual_NF.unflatten(0, (-1, len(self.mean_PF))) - self.mean_PF
        centred_NF = residual_BPF.flatten(0, 1)
        energies: list[torch.Tensor] = []
        start = 0
        for widths in grouped(self.widths):
            stop = start + sum(widths)
            # A block's whitening has no entries for shallower blocks.
            white_NF = linear(centred_NF[:, start:], self.whitening_FF[start:, start:stop].T)
            energies += [block_NF.square().sum(-1) for block_NF in white_NF.split(widths, 1)]
            start = stop
        return torch.stack(energies, -1).view(*residual_BPF.shape[:2], -1) / self.energy_L

    def cells(self, energies_BPL: torch.Tensor) -> torch.Tensor:
        """Score of each place, float32 ``[B, P]``: for clean images, mean about 0 and standard deviation about 1.

        The latter is less if images differ in level, as the median takes half of that away.
        """
        raw_BP = roots(energies_BPL) - PLACE_SHARE * self.usual_P
        # The (lower) median, by sorting: exporters support that.
        median_B1 = raw_BP.sort(1).values[:, (raw_BP.shape[1] - 1) // 2, None]
        raw_BP = raw_BP - IMAGE_SHARE * median_B1
        return (raw_BP - self.centre) / self.spread

    def fit(self, moments: PlaceMoments, whiten: bool = True) -> None:
        """Set means, whitening and clean energies from the moments of clean residuals.

        With ``whiten=False`` the current whitening is kept.
        """
        covariance_FF = moments.covariance_FF.cpu().double()
        if whiten:
            # Use the overall variance: the within-place variance is zero for a single image.
            variance = moments.all.variance_C.mean().cpu().double().clamp(min=1e-6)
            self.whitening_FF.copy_(block_whitening(covariance_FF, variance, self.widths))
        # The expected energy follows from the covariance, without another pass over the data.
        whitening_FF = self.whitening_FF.cpu().double()
        energy_F = (covariance_FF @ whitening_FF).mul_(whitening_FF).sum(0)
        self.energy_L.copy_(
            torch.stack([part.sum().clamp(min=FLOOR * len(part)) for part in energy_F.split(self.widths)])
        )
        self.mean_PF.copy_(moments.mean_PF)

    def fit_places(self, moments: BlockMoments) -> None:
        """Set each place's usual score, and centre and spread, from the moments of clean images' :func:`roots`."""
        mean_P = moments.mean_C.to(self.usual_P)
        self.usual_P.copy_(mean_P - mean_P.mean())
        # For a typical image, the median is close to the mean.
        self.centre.copy_((1 - IMAGE_SHARE) * mean_P.mean())
        self.spread.copy_(moments.variance_C.mean().sqrt().clamp(min=FLOOR))


def block_whitening(covariance_FF: torch.Tensor, variance: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Whitening matrix, float64 ``[F, F]``, each block conditioned on all deeper ones; apply as ``rows @ whitening``.

    Args:
        covariance_FF: float64 covariance of the entries, blocks from shallow to deep.
        variance: float64 scalar; :data:`SHRINKAGE` times this is added to the diagonal.
        widths: number of entries of each block.

    Raises:
        torch.linalg.LinAlgError: the regularised covariance is not positive definite.
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
    """Mean over blocks of the square root of the energy, ``[B, P]``."""
    return energies_BPL.sqrt().mean(-1)


def deepest_first(widths: list[int]) -> torch.Tensor:
    """Permutation of the entries, int64 ``[F]``: blocks from last to first, entries within a block in order."""
    blocks = [torch.arange(start, start + width) for start, width in zip(starts(widths), widths, strict=True)]
    return torch.cat(blocks[::-1])


def starts(widths: list[int]) -> list[int]:
    """Index of each block's first entry."""
    return [sum(widths[:block]) for block in range(len(widths))]


def grouped(widths: list[int]) -> list[list[int]]:
    """The blocks' widths, in order, in at most :data:`GROUPS` groups with about the same number of entries."""
    groups: list[list[int]] = [[] for _ in range(GROUPS)]
    for start, width in zip(starts(widths), widths, strict=True):
        groups[GROUPS * start // sum(widths)].append(width)
    return [group for group in groups if group]


def image_scores(cells_BP: torch.Tensor) -> torch.Tensor:
    """Mean over the highest-scoring :data:`HOTTEST_SHARE` of the places, ``[B]``."""
    hottest = max(1, round(HOTTEST_SHARE * cells_BP.shape[1]))
    return cells_BP.topk(hottest, dim=1).values.mean(1)


def upsample(cells_BHW: torch.Tensor, size: int) -> torch.Tensor:
    """Interpolate cell scores bilinearly to image size, ``[B, size, size]``."""
    return F.interpolate(cells_BHW[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
