"""BatchNorm of a frozen network folded into the convolution before it: the same function, fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Outputs of the folded network may differ by this share of their largest value: float32 rounding, layer after layer.
TOLERANCE = 1e-3

Outputs = Callable[[], list[torch.Tensor]]


def fold_batchnorm(network: nn.Module, keep: Collection[str], outputs: Outputs) -> int:
    """Fold in place every BatchNorm that alone reads a convolution's output (Jacob et al. 2018, section 3.2).

    Which ones do is learned from one forward pass, so that networks with any control flow can be folded. Whether a
    convolution has other readers that call no module cannot be seen: the outputs are compared, and a network that
    does not agree with itself is left as it was.

    Args:
        keep: names of modules whose own output is observed and must stay what it is.
        outputs: runs the network in eval on one image and returns what is observed of it.

    Returns:
        The number of folded pairs.
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
        return 0
    return len(pairs)


def _pairs(network: nn.Module, outputs: Outputs) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the BatchNorms that read them, each called once."""
    made: list[tuple[nn.Conv2d, torch.Tensor]] = []
    read: list[tuple[nn.BatchNorm2d, torch.Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        # The tensors are kept, so that no later one takes the place of an earlier one.
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
    """What a normalisation does besides: timm's have their activation inside."""
    rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
    return rest.eval()


def _agree(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(
        (one - other).abs().max() <= TOLERANCE * one.abs().max() for one, other in zip(before, after, strict=True)
    )
