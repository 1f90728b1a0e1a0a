"""The optimizer of both phases, and its schedules.

Schedules are pure functions of the progress, the fraction of all images consumed so far. They take progress rather than
a step count, so that a different number of processes or a resumed run sees the same curve.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from trajdist.saved.checkpoint import Tensors

# Learning rate of the logistic curve of the contrast, relative to the adapter's.
LOGISTIC_RATE = 10.0


def trainable_weights(model: nn.Module) -> Tensors:
    """The trainable weights of a model without wrappers, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); no decay for biases, gains, depth embeddings and the logistic curve."""
    weights = trainable_weights(model)
    logistic = [weights.pop("logistic")] if "logistic" in weights else []
    decayed = [weight for name, weight in weights.items() if weight.ndim >= 2 and "depth_" not in name]
    others = [weight for name, weight in weights.items() if weight.ndim < 2 or "depth_" in name]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": logistic, "weight_decay": 0.0, "rate": LOGISTIC_RATE},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, fused=device.type in ("cuda", "cpu")
    )


def warmup_cosine(progress: float, warmup_fraction: float) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine decay to 0 (Loshchilov & Hutter 2017)."""
    if progress < warmup_fraction:
        return progress / warmup_fraction
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup_fraction) / (1.0 - warmup_fraction)))


def linear_warmup(progress: float, warmup_fraction: float) -> float:
    """Factor that rises linearly from 0 to 1 over the warm-up and stays there."""
    return min(1.0, progress / warmup_fraction) if warmup_fraction else 1.0
