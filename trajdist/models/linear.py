"""Linear layers that are fast on any device: on CPUs they run as oneDNN convolutions.

Shape suffixes: C input features, M output features, B H W the rows arranged as one image (B = 1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

# With fewer than FEWEST_ROWS rows, or if they fill no rectangle at least LOWEST high, BLAS computes the product.
FEWEST_ROWS, LOWEST = 128, 4


def linear(rows: torch.Tensor, weight_MC: torch.Tensor, bias_M: torch.Tensor | None = None) -> torch.Tensor:
    """As ``torch.nn.functional.linear``: ``[..., C]`` -> ``[..., M]``.

    On CPUs in float32 it runs as a 1 x 1 convolution over the rows arranged as one nearly square image: oneDNN's
    kernels, forward and backward, are up to twice as fast as MKL's on processors that MKL is not tuned for.
    """
    height = _height(rows)
    if height < LOWEST:
        return F.linear(rows, weight_MC, bias_M)
    image_BCHW = rows.reshape(1, height, -1, rows.shape[-1]).permute(0, 3, 1, 2)
    product_BMHW = F.conv2d(image_BCHW, weight_MC[:, :, None, None], bias_M)
    return product_BMHW.permute(0, 2, 3, 1).reshape(*rows.shape[:-1], len(weight_MC))


def laid_out(matrix_CM: torch.Tensor) -> torch.Tensor:
    """The same matrix ``[C, M]``, stored so that its transpose, as :func:`linear` takes it, is contiguous."""
    return matrix_CM.T.contiguous().T


def _height(rows: torch.Tensor) -> int:
    """The largest divisor of the number of rows up to its square root; 0 where a convolution would not help."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return 0
    count = rows.numel() // max(1, rows.shape[-1])
    # With a symbolic batch size no layout can be chosen.
    if torch.compiler.is_exporting() or count < FEWEST_ROWS:
        return 0
    return next(height for height in range(math.isqrt(count), 0, -1) if count % height == 0)


class Linear(nn.Linear):
    """``torch.nn.Linear`` computed by :func:`linear`. As a subclass, it can carry LoRA adapters."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def use_fast_linear(network: nn.Module) -> None:
    """Turn a network's layers of type ``nn.Linear``, but not of its subclasses, into :class:`Linear`, in place."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
