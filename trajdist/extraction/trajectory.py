"""Block activations -> trajectories.

Shape suffixes: B images, P places (H x W cells, row by row), C channels of a block or step, L steps, D channels of a
trajectory.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from trajdist.errors import ConfigError
from trajdist.extraction import cpu_kernels
from trajdist.extraction.backbones import Backbone, Block
from trajdist.extraction.cpu_kernels import is_plain, numbered
from trajdist.extraction.projection import BlockMoments, Projection

# Allowed difference between compiled and eager trajectories, relative to these. In half precision the compiler rounds
# at other points and whitening amplifies single values, so root mean squares are compared, step by step: rounding gives
# 0.03 to 0.2, a step of zeros 1.
COMPILED_TOLERANCE, HALF_TOLERANCE = 0.03, 0.5
# On CPUs a pass through the backbone takes as many images as keep its largest activation within PASS_BYTES: in smaller
# passes the threads wait for each other more often; larger ones only take more memory (docs/LOG.md).
PASS_BYTES = 128 * 2**20
# On accelerators it takes as many as kernels can index: CUDA's pooling indexes the elements of a map with 32 bits.
INDEXABLE = 2**31 - 1
# Maximum number of input shapes to compile; each takes seconds. Any beyond these are rare and run eagerly.
MOST_GRAPHS = 16
UNLIMITED = 2**16


@dataclass(frozen=True)
class TrajectoryStep:
    """One step of a trajectory: a block's activation at a place, pooled to one mean or to concatenated sub-cell means.

    Attributes:
        name: of the block, with the number of sub-cells if there are several.
        block: index of the block.
        channels: before the projection, of all sub-cells together.
        subcells: per side of a place.
    """

    name: str
    block: int
    channels: int
    subcells: int = 1


def trajectory_steps(blocks: Sequence[Block], resolution: int, subcells: int) -> list[TrajectoryStep]:
    """The steps through ``blocks``: a block whose map is fine enough gives its sub-cells and then its mean.

    Scoring goes from the deepest step up and counts what each one adds. The mean comes after the sub-cells, so that
    they count only for what they add to it.
    """
    steps = []
    for number, block in enumerate(blocks):
        if 1 < subcells <= block.side / resolution:
            name = f"{block.name} {subcells} x {subcells}"
            steps.append(TrajectoryStep(name, number, subcells**2 * block.channels, subcells))
        steps.append(TrajectoryStep(block.name, number, block.channels))
    return steps


def pool(map_BCHW: torch.Tensor, resolution: int) -> torch.Tensor:
    """Pool an activation to float32 ``[B, resolution**2, C]``: larger maps are averaged, smaller ones interpolated."""
    height, width = map_BCHW.shape[-2:]
    even = height % resolution == width % resolution == 0
    if (height, width) == (resolution, resolution):
        pooled = map_BCHW
    elif even and map_BCHW.is_cuda and not torch.compiler.is_compiling():
        return _pool_even(map_BCHW, resolution)
    elif height >= resolution and width >= resolution:
        pooled = (
            F.adaptive_avg_pool2d(map_BCHW, resolution)
            if even or map_BCHW.device.type != "mps"
            else _pool_uneven(map_BCHW, resolution)
        )
    else:
        pooled = F.interpolate(map_BCHW, (resolution, resolution), mode="bilinear", align_corners=False)
    return pooled.flatten(2).transpose(1, 2).float()


def _pool_even(map_BCHW: torch.Tensor, resolution: int) -> torch.Tensor:
    """As :func:`pool`, where parts are whole pixels: on CUDA two to four times as fast as ``adaptive_avg_pool2d``."""
    parts = map_BCHW.permute(0, 2, 3, 1).unflatten(1, (resolution, -1)).unflatten(3, (resolution, -1))
    return parts.mean((2, 4), dtype=torch.float32).flatten(1, 2)


def _pool_uneven(map_BCHW: torch.Tensor, resolution: int) -> torch.Tensor:
    """``adaptive_avg_pool2d`` by matrix products: MPS supports only sizes that divide evenly."""
    height, width = map_BCHW.shape[-2:]
    rows_RH, columns_RW = (_windows(size, resolution).to(map_BCHW) for size in (height, width))
    return rows_RH @ map_BCHW @ columns_RW.T


def _windows(size: int, resolution: int) -> torch.Tensor:
    """The weights of ``size`` pixels in each of ``resolution`` overlapping windows, ``[resolution, size]``."""
    windows_RS = torch.zeros(resolution, size)
    for number in range(resolution):
        window = slice(number * size // resolution, -(-(number + 1) * size // resolution))
        windows_RS[number, window] = 1 / (window.stop - window.start)
    return windows_RS


def pool_subcells(map_BCHW: torch.Tensor, resolution: int, subcells: int) -> torch.Tensor:
    """Means of the ``subcells**2`` parts of each place, concatenated: ``[B, resolution**2, subcells**2 * C]``."""
    parts_BQC = pool(map_BCHW, resolution * subcells)
    batch, _, channels = parts_BQC.shape
    grid = parts_BQC.reshape(batch, resolution, subcells, resolution, subcells * channels)
    return grid.transpose(2, 3).reshape(batch, resolution**2, -1)


def pool_places(map_BCHW: torch.Tensor, resolution: int, subcells: int, places_BK: torch.Tensor) -> torch.Tensor:
    """As :func:`pool_subcells`, but only at the places with these indices: ``[B, K, subcells**2 * C]``.

    On CPUs in float32 the other places are not read, if the map is channels-last, square and evenly divisible.
    """
    side, parts = map_BCHW.shape[-1], resolution * subcells
    one_by_one = is_plain(map_BCHW) and map_BCHW.is_contiguous(memory_format=torch.channels_last)
    if not one_by_one or map_BCHW.shape[-2] != side or side % parts:
        pooled_BPC = pool_subcells(map_BCHW, resolution, subcells)
        return pooled_BPC.flatten(0, 1)[numbered(places_BK, resolution**2)]
    pixels_PSN = torch.from_numpy(_pixels_of_places(side, resolution, subcells))
    pixels_BKSN = numbered(pixels_PSN[places_BK], side**2)
    sums_RC = F.embedding_bag(pixels_BKSN.flatten(0, 2), map_BCHW.permute(0, 2, 3, 1).flatten(0, 2), mode="sum")
    return (sums_RC / pixels_PSN.shape[-1]).view(*places_BK.shape, -1)


@cache
def _pixels_of_places(side: int, resolution: int, subcells: int) -> npt.NDArray[np.int64]:
    """Indices of the pixels in every sub-cell of every place of a map, ``[P, subcells**2, pixels per sub-cell]``."""
    # An array, as it is cached: a tensor would keep the mode of the first call, such as a plan's fake tensors.
    per_part = side // (resolution * subcells)
    pixels = np.arange(side**2).reshape(resolution, subcells, per_part, resolution, subcells, per_part)
    return pixels.transpose(0, 3, 1, 4, 2, 5).reshape(resolution**2, subcells**2, -1)


class TrajectoryExtractor:
    """Images -> trajectories through a frozen backbone. Only one block's activation is alive at a time.

    Args:
        resolution: places per side of an image.
        subcells: sub-cells per side of a place.

    Attributes:
        images_per_pass: how many images go through the backbone at a time; all before :meth:`choose_pass_size`.
        rehearses: only the last pass of a batch is computed, to count bytes; the other results are zeros.
    """

    def __init__(self, backbone: Backbone, projection: Projection, resolution: int, subcells: int = 1) -> None:
        self.backbone, self.projection, self.resolution = backbone, projection, resolution
        self.subcells, self.steps = subcells, trajectory_steps(backbone.blocks, resolution, subcells)
        self.images_per_pass: int | None = None
        self.compiled = self.rehearses = False
        projection.lay_out()
        self._run: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] = self._trajectories

    def to(self, device: torch.device, images_per_pass: int | None = None) -> TrajectoryExtractor:
        """Move to a device and call :meth:`choose_pass_size` for it."""
        self.backbone.to(device)
        self.projection.to(device)
        self.choose_pass_size(device.type, images_per_pass)
        return self

    def choose_pass_size(self, device_type: str, images_per_pass: int | None = None) -> None:
        """Choose how many images go through the backbone at a time; by default all that kernels can index, on CPUs few.

        On CPUs an uncompiled backbone also switches to the kernels of :mod:`trajdist.extraction.cpu_kernels`.
        """
        most_bytes = PASS_BYTES if device_type == "cpu" else 4 * INDEXABLE
        self.images_per_pass = images_per_pass or max(1, most_bytes // self.backbone.largest_bytes)
        # The compiler prepacks weights itself, from their original place.
        if device_type == "cpu" and not self.compiled:
            cpu_kernels.specialise(self.backbone.network)

    def passes(self, num_images: int) -> list[slice]:
        """Split a batch of ``num_images`` into passes of about equal size; one pass for a symbolic batch size."""
        if self.images_per_pass is None or torch.compiler.is_exporting():
            return [slice(None)]
        count = max(1, -(-num_images // self.images_per_pass))
        ends = [number * num_images // count for number in range(count + 1)]
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def compile(self) -> TrajectoryExtractor:
        """Compile backbone, pooling and projection into one graph (torch.compile) for each of the first input shapes.

        Raises:
            ConfigError: there is no C++ compiler; a later call raises it if a new graph disagrees with eager execution.
        """
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
            raise ConfigError("backbone.compile=true needs a C++ compiler: install g++, or set it to false.")
        # Imported here: it takes as long as importing torch.
        from torch._dynamo import config as dynamo

        compiled = torch.compile(self._trajectories, fullgraph=True, dynamic=False)
        proven: set[tuple[int | bool, ...]] = set()

        def run(images_BCSS: torch.Tensor, places_BK: torch.Tensor | None) -> torch.Tensor:
            half = torch.is_autocast_enabled(images_BCSS.device.type)
            shape = (half, *images_BCSS.shape, *(() if places_BK is None else places_BK.shape))
            if shape not in proven and len(proven) >= MOST_GRAPHS:
                return self._trajectories(images_BCSS, places_BK)
            # Dynamo's own limit counts the graphs of all extractors in the process, and with fullgraph, exceeding it is
            # an error.
            with dynamo.patch(recompile_limit=UNLIMITED):
                result = call_frozen(compiled, images_BCSS, places_BK)
            # Compilers have bugs: every new graph is compared with eager execution once.
            if shape not in proven:
                _check_agreement(result, self._trajectories(images_BCSS, places_BK), half)
                proven.add(shape)
            return result

        self._run, self.compiled = run, True
        cpu_kernels.restore(self.backbone.network)
        return self

    @torch.no_grad()
    def __call__(self, images_BCSS: torch.Tensor) -> torch.Tensor:
        """uint8 images ``[B, 3, S, S]`` -> float32 trajectories ``[B, H, W, L, D]``, H = W = resolution."""
        return self._extract(images_BCSS, None).unflatten(1, (self.resolution, self.resolution))

    @torch.no_grad()
    def at(self, images_BCSS: torch.Tensor, places_BK: torch.Tensor) -> torch.Tensor:
        """Float32 trajectories ``[B, K, L, D]`` at some places of each image, numbered row by row."""
        return self._extract(images_BCSS, places_BK)

    def _extract(self, images_BCSS: torch.Tensor, places_BK: torch.Tensor | None) -> torch.Tensor:
        # Not len(): while exporting it would fix the batch size, whereas shape[0] stays symbolic.
        passes = self.passes(images_BCSS.shape[0])
        # All passes are alike: for counting bytes the last one is enough, as it runs beside the results of all others.
        skipped = passes[:-1] if self.rehearses else []
        parts = [self._blank(images_BCSS[part], places_BK) for part in skipped]
        for part in passes[len(skipped) :]:
            parts.append(self._run(images_BCSS[part], None if places_BK is None else places_BK[part]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _blank(self, images_BCSS: torch.Tensor, places_BK: torch.Tensor | None) -> torch.Tensor:
        length, width = self.projection.valid_LD.shape
        places = self.resolution**2 if places_BK is None else places_BK.shape[1]
        shape = images_BCSS.shape[0], places, length, width
        return torch.zeros(shape, dtype=torch.float32, device=images_BCSS.device)

    def _trajectories(self, images_BCSS: torch.Tensor, places_BK: torch.Tensor | None) -> torch.Tensor:
        """Trajectories of one pass, ``[B, P, L, D]``, or of some places ``[B, K, L, D]``."""
        out_BPLD = self._blank(images_BCSS, places_BK)

        def project(step: int, pooled_BPC: torch.Tensor) -> None:
            projected = self.projection(step, pooled_BPC)
            out_BPLD[:, :, step, : projected.shape[-1]] = projected

        self.observe(images_BCSS, project, places_BK)
        return out_BPLD

    @torch.no_grad()
    def observe(
        self,
        images_BCSS: torch.Tensor,
        visit: Callable[[int, torch.Tensor], None],
        places_BK: torch.Tensor | None = None,
    ) -> None:
        """Run all images through the backbone at once and pool each block's activation as it finishes.

        ``visit(step, pooled)`` gets float32 ``[B, P, C]``, or ``[B, K, C]`` of some places, for every step.
        """
        # Not inference_mode: inference tensors cannot take part in training.
        device = images_BCSS.device.type

        def reduce_at_once(block: int, map_BCHW: torch.Tensor) -> None:
            with full_precision(device):
                for number, step in enumerate(self.steps):
                    if step.block == block:
                        visit(number, self._pool(map_BCHW, step, places_BK))

        self.backbone(images_BCSS, reduce_at_once, self._pixels_of_last(places_BK))

    def _pixels_of_last(self, places_BK: torch.Tensor | None) -> torch.Tensor | None:
        """The pixels of the last block's map that these places are pooled from, ``[B, N]``; None for all."""
        side = self.backbone.blocks[-1].side
        if places_BK is None or self.compiled or places_BK.device.type != "cpu" or side % self.resolution:
            return None
        return torch.from_numpy(_pixels_of_places(side, self.resolution, 1))[places_BK].flatten(1)

    def _pool(self, map_BCHW: torch.Tensor, step: TrajectoryStep, places_BK: torch.Tensor | None) -> torch.Tensor:
        if places_BK is None:
            return pool_subcells(map_BCHW, self.resolution, step.subcells)
        return pool_places(map_BCHW, self.resolution, step.subcells, places_BK)


def update_moments(
    moments: list[BlockMoments], extractor: TrajectoryExtractor, images_BCSS: torch.Tensor, weights_B: torch.Tensor
) -> None:
    """Add uint8 images ``[B, 3, S, S]`` to the moments of every step; images of weight 0 do not count."""
    passes = extractor.passes(len(images_BCSS))
    for part in passes[-1:] if extractor.rehearses else passes:
        weights_N = weights_B[part].repeat_interleave(extractor.resolution**2)

        def visit(step: int, pooled_BPC: torch.Tensor, weights_N: torch.Tensor = weights_N) -> None:
            moments[step].update(pooled_BPC.flatten(0, 1), weights_N)

        extractor.observe(images_BCSS[part], visit)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Turns autocast off; does nothing while exporting, as exported programs have no autocast."""
    exporting = torch.compiler.is_exporting()
    return nullcontext() if exporting else torch.autocast(device_type, enabled=False)


def _check_agreement(compiled: torch.Tensor, plain: torch.Tensor, half: bool) -> None:
    size, tolerance = (_sizes_of_steps, HALF_TOLERANCE) if half else (_largest, COMPILED_TOLERANCE)
    share = size(compiled - plain) / size(plain).clamp_min(1e-12)
    if not bool((share <= tolerance).all()):
        raise ConfigError(
            f"backbone.compile=true gives wrong trajectories here (they differ by {share.max():.2g} of their size, and "
            f"{tolerance:g} is allowed): set it to false, or install another torch."
        )


def _largest(trajectories_BPLD: torch.Tensor) -> torch.Tensor:
    return trajectories_BPLD.abs().max()


def _sizes_of_steps(trajectories_BPLD: torch.Tensor) -> torch.Tensor:
    """Root mean square of each step, ``[L]``."""
    return trajectories_BPLD.square().mean((0, 1, 3)).sqrt()


def call_frozen(
    compiled: Callable[..., torch.Tensor], images_BCSS: torch.Tensor, *rest: torch.Tensor | None
) -> torch.Tensor:
    """Call a compiled function of images and a frozen network, whose weights are constants on CPUs and CUDA.

    CPUs prepack them and fuse activations into convolutions, CUDA casts them to half precision once.
    """
    from torch._inductor import config as inductor

    on_cpu = images_BCSS.device.type == "cpu"
    with inductor.patch(freezing=on_cpu or images_BCSS.is_cuda):
        return compiled(_with_slack(images_BCSS) if on_cpu else images_BCSS, *rest)


def _with_slack(images_BCSS: torch.Tensor) -> torch.Tensor:
    """A channels-last copy with spare memory after it: torch's vectorised loads read past the last channel.

    Nothing is mapped behind a batch that fills its shared memory to the last byte (torch 2.14).
    """
    batch, channels, height, width = images_BCSS.shape
    flat = torch.zeros(images_BCSS.numel() + 64, dtype=images_BCSS.dtype)[:-64]
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(images_BCSS)
