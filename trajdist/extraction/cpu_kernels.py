"""Faster CPU kernels for frozen networks: weights are prepacked once, residual sums and ReLUs are fused.

oneDNN needs the weights of a convolution in a blocked layout, and PyTorch reorders them on every call: with many
weights and few images per batch, that is a good part of the time. Here they are reordered once. The sum of a residual
block and its ReLU take one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class PrepackedConv2d(nn.Conv2d):
    """A frozen convolution. After its first float32 call on a CPU it keeps its weights only in oneDNN's blocked layout.

    Any other kind of call, and any move, restores them; until then ``state_dict`` lacks them.
    """

    # Neither parameter nor buffer: MKL-DNN tensors can be neither moved nor saved.
    _packed: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not is_plain(input):
            self._unpack()
            return super().forward(input)
        if self._packed is None:
            self._packed = _reordered(self, input.shape)
            self.weight = None  # type: ignore[assignment]
        return _convolve(self, input, self._packed)

    def _unpack(self) -> None:
        if self._packed is not None:
            dense = self._packed.to_dense().contiguous(memory_format=torch.channels_last)
            self.weight = nn.Parameter(dense, requires_grad=False)
            del self._packed

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _add_relu(residual: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """ReLU of the sum, written in place to ``residual``, which has no other reader."""
    if is_plain(residual) and residual.shape == shortcut.shape:
        total: torch.Tensor = torch.ops.aten._add_relu_.Tensor(residual, shortcut)
        return total
    return residual.add_(shortcut).relu_()


def _basic_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of torchvision's ``BasicBlock`` (He et al. 2015, figure 5, left)."""
    shortcut = x if block.downsample is None else block.downsample(x)
    residual = block.relu(block.bn1(block.conv1(x)))
    return _add_relu(block.bn2(block.conv2(residual)), shortcut)


def _bottleneck(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of torchvision's ``Bottleneck`` (He et al. 2015, figure 5, right)."""
    shortcut = x if block.downsample is None else block.downsample(x)
    residual = block.relu(block.bn1(block.conv1(x)))
    residual = block.relu(block.bn2(block.conv2(residual)))
    return _add_relu(block.bn3(block.conv3(residual)), shortcut)


# Keyed by class name, so that torchvision need not be imported here.
FORWARDS = {"BasicBlock": _basic_block, "Bottleneck": _bottleneck}


def specialise(network: nn.Module) -> None:
    """Switch a frozen network's convolutions and torchvision's residual blocks to these kernels, in place.

    Other modules, and tensors that are not :func:`is_plain`, are computed as before. Does nothing where torch lacks
    the operators.
    """
    if not _available():
        return
    for module in network.modules():
        if _is_residual(module):
            module.forward = MethodType(FORWARDS[type(module).__name__], module)
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = PrepackedConv2d


def restore(network: nn.Module) -> None:
    """Undo :func:`specialise`, in place."""
    for module in network.modules():
        if _is_residual(module):
            vars(module).pop("forward", None)
        if isinstance(module, PrepackedConv2d):
            module._unpack()
            module.__class__ = nn.Conv2d  # type: ignore[assignment]


def _is_residual(module: nn.Module) -> bool:
    return type(module).__module__ == "torchvision.models.resnet" and type(module).__name__ in FORWARDS


def is_plain(x: torch.Tensor) -> bool:
    """Whether this is float32 on a CPU, without gradient or autocast, and not traced (compiler, exporter, counter)."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad
    return plain and not torch.is_autocast_enabled("cpu")


def _reordered(conv: nn.Conv2d, shape: torch.Size) -> torch.Tensor:
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    packed: torch.Tensor = reorder(conv.weight.detach(), *_geometry(conv), list(shape))
    return packed


def _convolve(conv: nn.Conv2d, x: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    convolve = torch.ops.mkldnn._convolution_pointwise
    result: torch.Tensor = convolve(x, packed, conv.bias, *_geometry(conv), "none", [], "")
    return result


def _geometry(conv: nn.Conv2d) -> tuple[object, ...]:
    return conv.padding, conv.stride, conv.dilation, conv.groups


@cache
def _available() -> bool:
    """Whether the operators work here. They are internal to torch's compiler, so they are tested before use."""
    # No random initialisation: it would advance the run's random number generator.
    conv = nn.utils.skip_init(nn.Conv2d, 16, 16, 3, padding=1, bias=False).requires_grad_(False)
    conv.weight.copy_(torch.linspace(-1, 1, conv.weight.numel()).view_as(conv.weight))
    x = torch.linspace(-1, 1, 1024).view(1, 16, 8, 8).to(memory_format=torch.channels_last)
    try:
        torch.ops.aten._add_relu_.Tensor(x.clone(), x)
        same = torch.allclose(_convolve(conv, x, _reordered(conv, x.shape)), F.conv2d(x, conv.weight, None, 1, 1))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return same
