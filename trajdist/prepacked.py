"""Frozen convolutions whose weights stay in the order in which the CPU's kernels read them.

oneDNN wants the weights of each convolution in blocks, and PyTorch puts them into that order again in every call: for
a network of many weights and a batch of a few images that is a good part of the time. Here it is done once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class PrepackedConv2d(nn.Conv2d):
    """A convolution that is frozen. After its first float32 call on a CPU it holds its weights in oneDNN's order only.

    Any other call, and any move, puts them back; ``state_dict`` lacks them meanwhile.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _is_plain(input):
            self._unpack()
            return super().forward(input)
        if self._packed is None:
            self._pack(input.shape)
        return _convolve(self, input, self._packed)

    @property
    def _packed(self) -> torch.Tensor | None:
        # Neither parameter nor buffer: its kind of tensor can be neither moved nor saved.
        return self.__dict__.get("packed")

    def _pack(self, shape: torch.Size) -> None:
        self.__dict__["packed"] = _reordered(self, shape)
        self.weight = None  # type: ignore[assignment]

    def _unpack(self) -> None:
        packed = self.__dict__.pop("packed", None)
        if packed is not None:
            dense = packed.to_dense().contiguous(memory_format=torch.channels_last)
            self.weight = nn.Parameter(dense, requires_grad=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def prepack(network: nn.Module) -> None:
    """Make the plain convolutions of a frozen network :class:`PrepackedConv2d`, in place, where this gains anything."""
    if not _available():
        return
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = PrepackedConv2d


def unpack(network: nn.Module) -> None:
    """Undo :func:`prepack`, in place."""
    for module in network.modules():
        if isinstance(module, PrepackedConv2d):
            module._unpack()
            module.__class__ = nn.Conv2d  # type: ignore[assignment]


def _is_plain(x: torch.Tensor) -> bool:
    """Neither on a GPU, nor in half precision, nor watched by a compiler, an exporter or a counter."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad
    return plain and not torch.is_autocast_enabled("cpu")


def _reordered(conv: nn.Conv2d, shape: torch.Size) -> torch.Tensor:
    geometry = [list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups]
    packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *geometry, list(shape))
    return packed


def _convolve(conv: nn.Conv2d, x: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, *geometry, "none", [], "")
    return result


@cache
def _available() -> bool:
    """These operators are torch's own, for its compiler: they are tried before they are trusted."""
    # Nothing is drawn: the seeds are the run's.
    conv = nn.utils.skip_init(nn.Conv2d, 16, 16, 3, padding=1, bias=False).requires_grad_(False)
    conv.weight.copy_(torch.linspace(-1, 1, conv.weight.numel()).view_as(conv.weight))
    x = torch.linspace(-1, 1, 1024).view(1, 16, 8, 8).to(memory_format=torch.channels_last)
    try:
        same = torch.allclose(_convolve(conv, x, _reordered(conv, x.shape)), F.conv2d(x, conv.weight, None, 1, 1))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return same
