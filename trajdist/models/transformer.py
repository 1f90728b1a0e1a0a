"""A transformer over depth with a bottleneck: blocks attend to blocks, the whole trajectory passes through one code.

Query, key, value and output are linear layers that are called as modules, so LoRA adapters on them take effect.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trajdist.models.linear import Linear
from trajdist.models.reconstruction import Reconstruction

# Maximum trajectories times heads in one call on an accelerator: the grid limit of CUDA's fused kernels, one of whose
# backward passes also indexes 128 steps of up to 256 numbers for each with 32 bits.
MOST_SEQUENCES = 2**16 - 1


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), ``[N, heads, L, width]``."""
    if q.device.type != "cpu":
        inputs = (part.split(max(1, MOST_SEQUENCES // q.shape[1])) for part in (q, k, v))
        parts = [F.scaled_dot_product_attention(*each) for each in zip(*inputs, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    # On CPUs the fused kernel takes twice as long for such short sequences (the depth of a backbone).
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention over the blocks of a trajectory, ``[N, L, hidden]``."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (Linear(hidden_dim, hidden_dim) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.attention = Attention(hidden_dim, num_heads)
        self.up, self.down = Linear(hidden_dim, 4 * hidden_dim), Linear(4 * hidden_dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """``[N, L, D]`` -> encoder over the blocks -> one code of ``latent_dim`` numbers -> decoder -> ``[N, L, D]``."""

    def __init__(
        self,
        length: int,
        width: int,
        hidden_dim: int,
        latent_dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed, self.unembed = Linear(width, hidden_dim), Linear(hidden_dim, width)
        self.depth_in = nn.Parameter(torch.randn(length, hidden_dim) * 0.02)
        self.depth_out = nn.Parameter(torch.randn(length, hidden_dim) * 0.02)
        self.encoder = nn.Sequential(*(Layer(hidden_dim, num_heads, dropout) for _ in range(num_layers)))
        self.decoder = nn.Sequential(*(Layer(hidden_dim, num_heads, dropout) for _ in range(num_layers)))
        self.norm_in, self.norm_out = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.squeeze = Linear(length * hidden_dim, latent_dim)
        self.unsqueeze = Linear(latent_dim, length * hidden_dim)

    def forward(self, trajectories_NLD: torch.Tensor) -> Reconstruction:
        length, hidden = self.depth_in.shape
        x = self.encoder(self.embed(trajectories_NLD) + self.depth_in)
        latent = self.squeeze(self.norm_in(x).flatten(1))
        y = self.decoder(self.unsqueeze(latent).unflatten(-1, (length, hidden)) + self.depth_out)
        return Reconstruction(self.unembed(self.norm_out(y)), latent)
