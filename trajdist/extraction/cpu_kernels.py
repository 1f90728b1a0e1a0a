"""Faster CPU kernels for frozen networks: weights are prepacked once, residual sums and ReLUs are fused.

Shape suffixes: B images, C channels, H W feature map, K pixels per image, N pixels of all images.

oneDNN needs the weights of a convolution in a blocked layout, and PyTorch reorders them on every call: with many
weights and few images per batch, that is a good part of the time. Here they are reordered once. The sum of a residual
block and its ReLU take one pass over memory. A network's last block can be computed at some pixels only.
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

# Above this fraction of a map's pixels, computing the whole last block is as fast.
FEW_PIXELS = 1 / 3


class PrepackedConv2d(nn.Conv2d):
    """A frozen convolution. After its first float32 call on a CPU it keeps its weights only in oneDNN's blocked layout.

    Any other kind of call, and any move, restores them; until then ``state_dict`` lacks them.
    """

    # Neither parameter nor buffer: MKL-DNN tensors can be neither moved nor saved.
    _packed: torch.Tensor | None = None
    _as_matrix = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not is_plain(input):
            self._unpack()
            return super().forward(input)
        if self._packed is None or self._as_matrix:
            self._unpack()
            self._pack(_reordered(self, input.shape), as_matrix=False)
        return _convolve(self, input, self._packed)

    def at(self, x_BCHW: torch.Tensor, pixels_BK: torch.Tensor) -> torch.Tensor:
        """This convolution at some pixels only, numbered row by row: ``[N, C, 1, 1]``.

        Computed as a matrix product, for which the weights are packed differently. The convolution must be centred.
        """
        rows = _windows(x_BCHW, pixels_BK, self.kernel_size[0])
        if not is_plain(x_BCHW):
            self._unpack()
            return F.linear(rows, _matrix(self), self.bias)[:, :, None, None]
        if self._packed is None or not self._as_matrix:
            self._unpack()
            self._pack(torch.ops.mkldnn._reorder_linear_weight(_matrix(self), len(rows)), as_matrix=True)
        return _multiply(rows, self._packed, self.bias)[:, :, None, None]

    def _pack(self, packed: torch.Tensor, as_matrix: bool) -> None:
        self._packed, self._as_matrix = packed, as_matrix
        self.weight = None  # type: ignore[assignment]

    def _unpack(self) -> None:
        if self._packed is not None:
            dense = self._packed.to_dense()
            if self._as_matrix:
                dense = dense.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)
            dense = dense.contiguous(memory_format=torch.channels_last)
            self.weight = nn.Parameter(dense, requires_grad=False)
            del self._packed, self._as_matrix

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


def numbered(within_B: torch.Tensor, per_image: int) -> torch.Tensor:
    """Indices into the flattened batch, from indices within each image, ``[B, ...]``."""
    first_B = torch.arange(len(within_B), device=within_B.device) * per_image
    return within_B + first_B.view(-1, *[1] * (within_B.ndim - 1))


def _windows(x_BCHW: torch.Tensor, pixels_BK: torch.Tensor, side: int) -> torch.Tensor:
    """The ``side`` x ``side`` windows around these pixels, zero outside the map: ``[N, side**2 * C]``."""
    padded_BHWC = F.pad(x_BCHW, [side // 2] * 4).permute(0, 2, 3, 1)
    (height, width), inner = padded_BHWC.shape[1:3], x_BCHW.shape[3]
    corners_BK = pixels_BK // inner * width + pixels_BK % inner
    reach = torch.arange(side)
    window = (reach[:, None] * width + reach).flatten()
    windows_NW = numbered(corners_BK, height * width).flatten()[:, None] + window
    return padded_BHWC.flatten(0, 2)[windows_NW].flatten(1)


def residual_at(block: Any, x_BCHW: torch.Tensor, pixels_BK: torch.Tensor) -> torch.Tensor | None:
    """A residual block at these pixels of each image, numbered row by row; None if it cannot be computed that way.

    The result is written to ``x_BCHW``, which keeps its values elsewhere.
    """
    if not _suits(block, x_BCHW) or pixels_BK.shape[1] > FEW_PIXELS * x_BCHW[0, 0].numel():
        return None
    residual = block.relu(block.bn1(block.conv1(x_BCHW)))
    residual = block.bn2(block.conv2.at(residual, pixels_BK))
    if hasattr(block, "conv3"):
        residual = block.relu(residual)
        residual = block.bn3(block.conv3.at(residual, torch.zeros(len(residual), 1, dtype=torch.int64)))
    rows = x_BCHW.permute(0, 2, 3, 1).view(-1, x_BCHW.shape[1])
    pixels_N = numbered(pixels_BK, x_BCHW[0, 0].numel()).flatten()
    rows[pixels_N] = _add_relu(residual.flatten(1), rows[pixels_N])
    return x_BCHW


def _suits(block: Any, x: torch.Tensor) -> bool:
    """Whether :func:`residual_at` can compute this block on this input."""
    # Counters (of bytes or operations) are allowed: they should count what is really computed.
    if not _is_plain_or_counted(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if not _is_residual(block) or block.downsample is not None:
        return False
    last = [conv for name, conv in block.named_children() if name in ("conv2", "conv3")]
    return all(isinstance(conv, PrepackedConv2d) and _is_centred(conv) for conv in last)


def _is_centred(conv: nn.Conv2d) -> bool:
    """Whether each output pixel is computed from the square window around it."""
    side = conv.kernel_size[0]
    wanted = (side, side), (side // 2, side // 2), (1, 1), (1, 1), 1
    return side % 2 == 1 and (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups) == wanted


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
    return not is_in_torch_dispatch_mode() and _is_plain_or_counted(x)


def _is_plain_or_counted(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
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


def _matrix(conv: nn.Conv2d) -> torch.Tensor:
    """The weights ``[M, side**2 * C]`` of a convolution, for :func:`_windows`."""
    return conv.weight.detach().permute(0, 2, 3, 1).flatten(1)


def _multiply(rows: torch.Tensor, packed: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
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
        rows, matrix = _windows(x, torch.arange(4)[None], 3), _matrix(conv)
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, len(rows))
        same &= torch.allclose(_multiply(rows, packed, None), F.linear(rows, matrix), atol=1e-6)
        return same and torch.equal(packed.to_dense(), matrix)
    except (AttributeError, RuntimeError, TypeError):
        return False
