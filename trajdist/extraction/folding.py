"""Folds BatchNorm and padding into the convolutions of a frozen network: same function, fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Allowed change of the outputs, relative to their largest value: float32 rounding accumulates over the layers.
TOLERANCE = 1e-3

Outputs = Callable[[], list[torch.Tensor]]


def fold_batchnorm(network: nn.Module, keep: Collection[str], outputs: Outputs) -> None:
    """Fold, in place, every BatchNorm that reads a convolution's output (Jacob et al. 2018, section 3.2).

    The pairs are found in one forward pass, so networks with any control flow can be folded. Other readers of a
    convolution's output are not detected; instead the outputs before and after are compared, and if they differ the
    network is restored.

    Args:
        keep: names of modules whose own output is observed and must not change.
        outputs: runs the network in eval mode on one image and returns the observed outputs.
    """
    before = outputs()
    names = {module: name for name, module in network.named_modules()}
    pairs = [(conv, norm) for conv, norm in _pairs(network, outputs) if names[conv] not in keep]
    for conv, norm in pairs:
        network.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        network.set_submodule(names[norm], _rest(norm))
    if pairs and not _agree(before, outputs()):
        for conv, norm in pairs:
            network.set_submodule(names[conv], conv)
            network.set_submodule(names[norm], norm)


def _pairs(network: nn.Module, outputs: Outputs) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the BatchNorms that read their output, each called exactly once."""
    made: list[tuple[nn.Conv2d, torch.Tensor]] = []
    read: list[tuple[nn.BatchNorm2d, torch.Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        # Tensors are compared by identity, so they must stay alive until then.
        if isinstance(module, nn.Conv2d):
            made.append((module, output))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            read.append((module, inputs[0]))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        outputs()
    finally:
        for handle in handles:
            handle.remove()
    calls = [module for module, _ in made] + [module for module, _ in read]
    return [
        (conv, norm)
        for norm, seen in read
        for conv, output in made
        if output is seen and calls.count(conv) == calls.count(norm) == 1
    ]


def _rest(norm: Any) -> nn.Module:
    """What is left of a folded BatchNorm: timm's also contain dropout and the activation."""
    rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
    return rest.eval()


def _agree(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(
        (one - other).abs().max() <= TOLERANCE * one.abs().max() for one, other in zip(before, after, strict=True)
    )


def fold_padding(network: nn.Module) -> None:
    """Replace EfficientNet's padding layers, which copy the map, by the convolutions' own padding, in place."""
    for module in network.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        # Without padding, static_padding is an identity.
        left, right, top, bottom = getattr(module.static_padding, "padding", (0, 0, 0, 0))
        # nn.Conv2d can only pad symmetrically.
        if (left, top) == (right, bottom):
            del module.static_padding
            module.padding, module.__class__ = (top, left), nn.Conv2d
