"""The projection of a step's channels to ``feature_dim`` numbers, and the streaming statistics to fit it.

Shape suffixes: B images, P places, C channels of a step, L steps, D channels of a trajectory, N rows, R of a panel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trajdist.extraction.eigen import leading_eigenvectors
from trajdist.models.linear import laid_out, linear
from trajdist.sharding import PROJECTION, seed_of

Reduce = Callable[[torch.Tensor], torch.Tensor]

# Variances below this fraction of the mean channel variance are noise, or belong to channels that were silent in the
# sample: they are not scaled up to unit variance.
VARIANCE_FLOOR = 1e-4
# A symmetric matrix is kept as panels of this many rows, each up to the diagonal: 5/8 of the entries of 2048 x 2048.
PANEL = 512


class Projection(nn.Module):
    """One affine map per step, from its channels to ``feature_dim`` numbers. Steps with fewer channels are padded.

    Args:
        channels: of every step.
        feature_dim: D.

    Attributes:
        widths: number of valid entries of each step.
        valid_LD: bool, False where a trajectory is padding.
    """

    valid_LD: torch.Tensor

    def __init__(self, channels: list[int], feature_dim: int) -> None:
        super().__init__()
        self.channels, self.feature_dim = list(channels), feature_dim
        self.widths = [min(count, feature_dim) for count in channels]
        for step, (count, width) in enumerate(zip(channels, self.widths, strict=True)):
            self.register_buffer(f"mean_{step}", torch.zeros(count))
            self.register_buffer(f"matrix_{step}", torch.zeros(count, width))
        # On the CPU even under torch.device("meta"): it is not in the state dict, so loading would not fill it in.
        valid_LD = torch.arange(feature_dim, device="cpu")[None, :] < torch.tensor(self.widths, device="cpu")[:, None]
        self.register_buffer("valid_LD", valid_LD, persistent=False)

    def forward(self, step: int, pooled_BPC: torch.Tensor) -> torch.Tensor:
        """Project the pooled activation of a step, float32 ``[B, P, C]``, to ``[B, P, min(C, D)]``."""
        # Centring first avoids cancellation where the mean is large.
        centred_BPC = pooled_BPC - self.get_buffer(f"mean_{step}")
        return linear(centred_BPC, self.get_buffer(f"matrix_{step}").T)

    def lay_out(self) -> None:
        """Store the matrices in the memory layout that :func:`linear` reads."""
        for step in range(len(self.channels)):
            matrix_CD = self.get_buffer(f"matrix_{step}")
            self.register_buffer(f"matrix_{step}", laid_out(matrix_CD))

    def set_step(self, step: int, mean_C: torch.Tensor, matrix_CD: torch.Tensor) -> None:
        """Copy in a step's mean ``[C]`` and matrix ``[C, min(C, D)]``."""
        self.get_buffer(f"mean_{step}").copy_(mean_C)
        self.get_buffer(f"matrix_{step}").copy_(matrix_CD)


class BlockMoments:
    """Streaming count, mean and scatter matrix of one step's channels (Chan, Golub & LeVeque 1983).

    Each batch is centred on its own mean before the product, and sums are float64 where the device supports it. The
    mean of a batch is float32: a channel's variance is right to 0.02 % if its mean is 10,000 standard deviations, and
    off by several percent at ten times that.

    Attributes:
        count, mean_C: of the rows so far.
        panels: the scatter matrix up to its diagonal, ``[R, stop]`` for the rows that end before ``stop``.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.count = torch.zeros((), dtype=kind, device=device)
        self.mean_C = torch.zeros(channels, dtype=kind, device=device)
        spans = ((start, min(start + PANEL, channels)) for start in range(0, channels, PANEL))
        self.panels = [torch.zeros(stop - start, stop, dtype=kind, device=device) for start, stop in spans]

    def update(self, rows_NC: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Add float32 rows ``[N, C]``. Weights ``[N]`` are 0 or 1; a row of weight 0 does not count."""
        count = weights_N.sum()
        mean_C = (weights_N @ rows_NC) / count.clamp(min=1)
        centred_CN = ((rows_NC - mean_C) * weights_N[:, None]).T
        self._merge(count.to(self.count), mean_C.to(self.count), centred_CN)

    def _merge(self, count: torch.Tensor, mean_C: torch.Tensor, centred_CN: torch.Tensor) -> None:
        total = (self.count + count).clamp(min=1)
        delta_C = mean_C - self.mean_C
        # In place: the scatter matrix of a wide block is larger than everything else a batch needs.
        for panel in self.panels:
            panel += linear(centred_CN[_rows_of(panel)], centred_CN[: panel.shape[1]])
        self._shift(delta_C, self.count * count / total)
        self.mean_C += delta_C * (count / total)
        self.count += count

    def _shift(self, delta_C: torch.Tensor, weight: torch.Tensor) -> None:
        """Add ``weight`` times the outer product of ``delta_C`` with itself to the scatter matrix."""
        for panel in self.panels:
            panel.addr_((delta_C * weight)[_rows_of(panel)], delta_C[: panel.shape[1]])

    def all_reduce(self, sum_over_processes: Reduce) -> None:
        """Merge the moments of all processes, after shifting each scatter matrix to the global mean."""
        count = sum_over_processes(self.count.clone())
        mean_C = sum_over_processes(self.mean_C * self.count) / count.clamp(min=1)
        self._shift(self.mean_C - mean_C, self.count)
        self.panels = [sum_over_processes(panel) for panel in self.panels]
        self.count, self.mean_C = count, mean_C

    @property
    def covariance_CC(self) -> torch.Tensor:
        """Covariance ``[C, C]`` with divisor N: a new matrix."""
        covariance_CC = self.mean_C.new_empty(len(self.mean_C), len(self.mean_C))
        for panel in self.panels:
            rows, stop = _rows_of(panel), panel.shape[1]
            covariance_CC[:stop, rows] = panel.T
            covariance_CC[rows, :stop] = panel
        return covariance_CC.div_(self.count.clamp(min=1))

    @property
    def variance_C(self) -> torch.Tensor:
        """Diagonal of the covariance, ``[C]``."""
        diagonal_C = torch.cat([panel[:, _rows_of(panel)].diagonal() for panel in self.panels])
        return diagonal_C / self.count.clamp(min=1)


def _rows_of(panel_RC: torch.Tensor) -> slice:
    """The rows of the whole matrix that a panel holds."""
    height, stop = panel_RC.shape
    return slice(stop - height, stop)


def pca_whitening(covariance_CC: torch.Tensor, width: int) -> torch.Tensor:
    """``[C, width]``: the leading principal directions, each scaled to unit variance. The sign is fixed."""
    values, vectors = leading_eigenvectors(covariance_CC.cpu().double(), width)
    floor = VARIANCE_FLOOR * covariance_CC.diagonal().mean().cpu().double()
    strongest = vectors.abs().argmax(0)
    signs = torch.sign(vectors[strongest, torch.arange(vectors.shape[1])])
    scale = torch.rsqrt(torch.maximum(values, floor).clamp(min=1e-12))
    return vectors * signs * scale


def random_projection(covariance_CC: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """``[C, width]``: orthonormal random directions of the standardised channels, each scaled to unit variance."""
    generator = torch.Generator().manual_seed(seed)
    covariance = covariance_CC.cpu().double()
    variance_C = covariance.diagonal()
    deviation = variance_C.clamp(min=max(VARIANCE_FLOOR * float(variance_C.mean()), 1e-12)).sqrt()
    gaussian = torch.randn(len(deviation), width, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(gaussian).Q / deviation[:, None]
    variance = torch.einsum("cd,ce,ed->d", directions, covariance, directions)
    return directions * torch.rsqrt(variance.clamp(min=VARIANCE_FLOOR))


def fit_projection(projection: Projection, moments: list[BlockMoments], kind: str, seed: int) -> None:
    """Fit every step's map to its moments; ``kind`` is ``trajectory.projection``, ``pca`` or ``random``.

    Empties the list: each step's moments are let go before the next, mostly larger ones are used.
    """
    for step, width in enumerate(projection.widths):
        moment = moments.pop(0)
        covariance = moment.covariance_CC
        if kind == "pca":
            matrix = pca_whitening(covariance, width)
        else:
            matrix = random_projection(covariance, width, seed_of(seed, PROJECTION, step))
        projection.set_step(step, moment.mean_C.float().cpu(), matrix.float())
