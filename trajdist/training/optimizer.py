"""The optimizer of both phases."""

from __future__ import annotations

import torch
from torch import nn

from trajdist.training.objectives import LOGISTIC_RATE


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); no decay for biases, gains, depth embeddings and the logistic curve."""
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    logistic = [weight for name, weight in weights if name == "logistic"]
    weights = [(name, weight) for name, weight in weights if name != "logistic"]
    decayed = [weight for name, weight in weights if weight.ndim >= 2 and "depth_" not in name]
    others = [weight for name, weight in weights if weight.ndim < 2 or "depth_" in name]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": logistic, "weight_decay": 0.0, "rate": LOGISTIC_RATE},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, fused=device.type in ("cuda", "cpu")
    )
