"""Frozen backbones, observed block by block.

Shape suffixes: B images, C channels, H W feature map, N tokens, S image side in pixels.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trajdist.artifacts import fingerprint
from trajdist.errors import ConfigError, one_line
from trajdist.extraction import cpu_kernels
from trajdist.extraction.folding import fold_batchnorm
from trajdist.extraction.networks import IMAGENET_MEAN, IMAGENET_STD, build_network
from trajdist.models.linear import use_fast_linear

# Class names of residual blocks in torchvision, timm and efficientnet_lite_pytorch; only the outermost match counts.
_BLOCKS = """
_InvertedResidual AttentionBlock BasicBlock Block BlockESE Bottle2neck Bottleneck BottleneckBlock ChannelBlock
CNBlock ConvBlock ConvEncoder ConvNeXtBlock CspNextBlock DarkBlock DepthwiseSeparableConv DlaBasic DlaBottle2neck
DlaBottleneck DualPathBlock EdgeBlock EdgeResidual EfficientFormerV2Block EfficientViMBlock EfficientVitBlock
EncoderBlock EvaBlock FocalNetBlock FusedMBConv GatedConvBlock GhostBottleneck GhostBottleneckV3
GlobalContextVitBlock HighPerfGpuBlock InvertedResidual LayerScaleBlock LevitBlock LinearBottleneck MaxVitBlock
MaxxVitBlock MBConv MBConvBlock MbConvBlock MetaBlock1d MetaBlock2d MetaFormerBlock MetaNeXtBlock MixerBlock
MobileAttention MobileVitBlock MobileVitV2Block NextConvBlock NextTransformerBlock NormFreeBlock OsaBlock
ParallelMaxxVitBlock ParallelScalingBlock ParallelThingsBlock PreActBasic PreActBottleneck PreBottleneck
PreXceptionModule RelPosBlock RepDepthwiseSeparable RepGhostBottleneck RepMixerBlock RepVggBlock RepViTBlock
ResBlock ResBottleneckBlock ResidualBlock ResNestBottleneck ResPostBlock ResPostRelPosBlock SEBottleneck
SelectiveKernelBasic SelectiveKernelBottleneck SelfAttnBlock Sequencer2dBlock SEResNetBlock SEResNetBottleneck
SEResNeXtBottleneck SpatialBlock SpatialGatingBlock SplitTransposeBlock SwinTransformerBlock SwinTransformerBlockV2
SwinTransformerV2Block SwinTransformerV2CrBlock TinyVitBlock TransformerBlock TransformerBlock2d
UniversalInvertedResidual XCABlock XceptionModule
"""
BLOCK_CLASSES = frozenset(_BLOCKS.split())
# Blocks that return [B, H, W, C]: their class decides where C = H = W; otherwise the sizes tell.
CHANNELS_LAST = re.compile("Swin|GatedConv|GlobalContextVit|Sequencer2d|TinyVit")

Visit = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Block:
    """One observed block.

    Attributes:
        name: of its module inside the network.
        channels: of its output.
        layout: axis order of its output: ``BCHW``, ``BHWC`` or ``BNC`` (tokens).
        side: height and width of its feature map, which is square.
    """

    name: str
    channels: int
    layout: str
    side: int


class _Finished(Exception):
    """Stops the forward pass after the last observed block: the head is not needed."""


class Backbone(nn.Module):
    """A frozen network, observed block by block. ``train()`` leaves it in eval mode, so BatchNorm cannot drift.

    Args:
        network: any image network; it is modified in place.
        patterns: globs of module names; if empty, residual blocks are found by class name.
        image_size: side of the input images, in pixels.
        state: identifies the network instead of its own state dict: interpolated embeddings depend on the processor.
        mean, std: normalisation of RGB values in 0..1.

    Attributes:
        blocks: the observed blocks, in execution order.
        fingerprint: identifies weights, buffers and observed blocks.
        largest_bytes: size of the largest activation for one image, in float32.

    Raises:
        ConfigError: no blocks are found, a block's output is not a feature map, or ``image_size`` does not suit.
    """

    mean_C1S: torch.Tensor
    std_C1S: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        patterns: list[str],
        image_size: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        state: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean_C1S", _row_of(mean, image_size), persistent=False)
        self.register_buffer("std_C1S", _row_of(std, image_size), persistent=False)
        self._visit: Visit | None = None
        self._pixels_BK: torch.Tensor | None = None
        self.largest_bytes = 0
        self.blocks = self._discover(find_blocks(network, patterns), image_size)
        names = [block.name for block in self.blocks]
        # Before BatchNorm is folded: it identifies the original network.
        self.fingerprint = fingerprint(state or self.network.state_dict(), {"blocks": names})
        fold_batchnorm(self.network, names, lambda: list(self._run_once(names, image_size).values()))
        use_fast_linear(self.network)
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            if tensor.ndim == 4:  # ``network.to(memory_format=...)`` fails if any tensor has five dimensions.
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        for number, block in enumerate(self.blocks):
            self.network.get_submodule(block.name).register_forward_hook(self._hook(number))
        # Modules inside the last block would not be called, so none of them may be observed.
        if not any(name.startswith(f"{names[-1]}.") for name in names):
            self.network.get_submodule(names[-1]).register_forward_pre_hook(self._finish_at_pixels)

    def train(self, mode: bool = True) -> Backbone:
        """No-op: a frozen backbone stays in eval mode."""
        return self

    def forward(self, images_BCSS: torch.Tensor, visit: Visit, pixels_BK: torch.Tensor | None = None) -> None:
        """Run uint8 images ``[B, 3, S, S]`` and call ``visit(number, activation)`` as each block finishes, in order.

        The activation is ``[B, C, H, W]`` (any memory format) without prefix tokens. The caller must reduce it at
        once and keep no reference, so that only one block's activation is alive at a time.

        Args:
            pixels_BK: the only pixels of the last block's map that the caller reads, numbered row by row; the others
                may be anything.
        """
        x = images_BCSS.contiguous(memory_format=torch.channels_last)
        x = x.to(torch.float32, copy=True).sub_(self.mean_C1S).div_(self.std_C1S)
        self._visit, self._pixels_BK = visit, pixels_BK
        try:
            self.network(x)
        except _Finished:
            pass
        finally:
            self._visit = self._pixels_BK = None

    def _finish_at_pixels(self, module: nn.Module, inputs: Any) -> None:
        """Before the last block: compute it only at the needed pixels, if possible, and end the pass."""
        if self._visit is None or self._pixels_BK is None:
            return
        activation = cpu_kernels.residual_at(module, first_tensor(inputs), self._pixels_BK)
        if activation is not None:
            self._visit(len(self.blocks) - 1, activation)
            raise _Finished

    def _hook(self, number: int) -> Callable[..., None]:
        layout, last = self.blocks[number].layout, number == len(self.blocks) - 1

        def observe(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._visit is None:
                return
            self._visit(number, to_grid(first_tensor(output), layout))
            # torch.export tracks module calls, so the pass must not be cut short; it removes unused code by itself.
            if last and not torch.compiler.is_exporting():
                raise _Finished

        return observe

    def _discover(self, names: list[str], image_size: int) -> list[Block]:
        """Run one image to learn the order, shapes and layouts of the blocks."""
        calls: Counter[str] = Counter()
        try:
            shapes = {name: output.shape for name, output in self._run_once(names, image_size, calls).items()}
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = one_line(error) or type(error).__name__
            raise ConfigError(f"data.image_size={image_size} does not suit this backbone: {reason}") from None
        if not shapes:
            raise ConfigError(
                f"backbone.blocks matches only modules that are never called, such as {names[0]!r}: name some that are."
            )
        found: list[Block] = []
        for name, shape in shapes.items():
            if calls[name] > 1:
                raise ConfigError(
                    f"backbone.blocks matches {name!r}, which is called {calls[name]} times for an image: "
                    "name modules that are called once."
                )
            layout = _layout(shape, self.network.get_submodule(name))
            if layout is None:
                raise ConfigError(
                    f"backbone.blocks matches {name!r}, whose output {tuple(shape)} is not a feature map: "
                    "name modules that return [B, C, H, W] or tokens."
                )
            channels = shape[1] if layout == "BCHW" else shape[-1]
            side = math.isqrt(shape[1]) if layout == "BNC" else shape[2]
            found.append(Block(name, channels, layout, side))
        return found

    @torch.inference_mode()
    def _run_once(
        self, names: list[str], image_size: int, calls: Counter[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """The named modules' outputs for one image of fixed noise, in execution order; sets ``largest_bytes``.

        Args:
            calls: counts the calls of each module.
        """
        outputs: dict[str, torch.Tensor] = {}

        def weigh(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self.largest_bytes = max(self.largest_bytes, 4 * output.numel())

        def recorder(name: str) -> Callable[..., None]:
            def record(module: nn.Module, inputs: Any, output: Any) -> None:
                if calls is not None:
                    calls[name] += 1
                # Cloned: the next layer may modify it in place.
                outputs.setdefault(name, first_tensor(output).clone())

            return record

        noise = torch.Generator().manual_seed(0)
        image = torch.randn(1, 3, image_size, image_size, generator=noise)
        handles = [self.network.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
        handles += [module.register_forward_hook(weigh) for module in self.network.modules()]
        try:
            self.network(image)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


def _row_of(rgb: tuple[float, ...], image_size: int) -> torch.Tensor:
    """An RGB colour in 0..1, scaled to 0..255 and repeated as a row of pixels ``[3, 1, S]``, channels last.

    Broadcasting a whole row vectorises well on CPUs; broadcasting three numbers over every pixel does not.
    """
    pixels_SC = torch.tensor(rgb).mul(255.0).repeat(image_size, 1)
    return pixels_SC.T[:, None]


def first_tensor(output: Any) -> torch.Tensor:
    """A module's output, or the first tensor in it if it is a (nested) tuple or list."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output


def _layout(shape: torch.Size, module: nn.Module) -> str | None:
    """The axes of a module's output for one image; None if that is not one map (in MobileViT, a batch of parts)."""
    if shape[:1] != (1,):
        return None
    if len(shape) == 3:
        return "BNC"
    if len(shape) != 4:
        return None
    if shape[1] == shape[2] and (shape[3] != shape[2] or CHANNELS_LAST.search(type(module).__name__)):
        return "BHWC"
    return "BCHW" if shape[2] == shape[3] else None


def to_grid(output: torch.Tensor, layout: str) -> torch.Tensor:
    """Any block output -> ``[B, C, H, W]``; leading class and register tokens are dropped."""
    if layout == "BCHW":
        return output
    if layout == "BHWC":
        return output.permute(0, 3, 1, 2)
    side = int(output.shape[1] ** 0.5)
    patches = output[:, output.shape[1] - side * side :]
    return patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def find_blocks(network: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the modules to observe: those that match ``patterns``, or without any, the outermost residual blocks.

    Raises:
        ConfigError: no module matches, or only some of the blocks are of a known class.
    """
    names = [name for name, _ in network.named_modules() if name]
    if patterns:
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not chosen:
            raise ConfigError(f"backbone.blocks={patterns} matches no module; there are, for example, {names[:8]}.")
        return chosen
    blocks = [name for name, module in network.named_modules() if type(module).__name__ in BLOCK_CLASSES]
    outermost = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    if not outermost:
        raise ConfigError(
            f"backbone.blocks is empty and {type(network).__name__} has no residual blocks of a known class: "
            f"name the modules to observe by globs, for example among {names[:8]}."
        )
    if unknown := _unknown_beside(network, outermost):
        raise ConfigError(
            f"backbone.blocks is empty and {type(network).__name__} has blocks of an unknown class beside known ones, "
            f"such as {unknown!r}: name the modules to observe by globs, for example among {outermost[:8]}."
        )
    return outermost


def _unknown_beside(network: nn.Module, blocks: list[str]) -> str | None:
    """The first module beside ``blocks`` in a list that has several weighted layers, but is not one of them."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in blocks):
        module = network.get_submodule(parent)
        if not isinstance(module, (nn.Sequential, nn.ModuleList)):
            continue
        for name, child in module.named_children():
            full = f"{parent}.{name}" if parent else name
            layers = sum(isinstance(each, (nn.Conv2d, nn.Linear)) for each in child.modules())
            if full not in blocks and layers > 1:
                return full
    return None


def build_backbone(name: str, weights: str, patterns: list[str], image_size: int, seed: int) -> Backbone:
    """Build a frozen backbone by name; ``weights`` and ``patterns`` as in ``backbone.weights`` and ``.blocks``.

    Args:
        image_size: side of the input images, in pixels.
        seed: of random weights, where nothing is loaded.

    Raises:
        ConfigError: an unknown name, a missing package, weights that cannot be downloaded or found, or whatever
            :class:`Backbone` refuses.
        ArtifactError: a weight file that is damaged or belongs to another network.
    """
    network, mean, std, state = build_network(name, weights, seed, image_size)
    return Backbone(network, patterns, image_size, mean, std, state)
