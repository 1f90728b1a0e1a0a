"""Block activations -> trajectories, and the streaming statistics that the projection is made from.

Shape suffixes: B images, P places (H x W cells, row by row), C channels of a block or step, L steps, D channels of a
trajectory, N rows.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from trajdist import cpu_kernels
from trajdist.backbones import Backbone, Block
from trajdist.eigen import leading_eigenvectors
from trajdist.errors import ConfigError
from trajdist.linear import laid_out, linear

Reduce = Callable[[torch.Tensor], torch.Tensor]

# Eigenvalues below this share of a block's mean variance are noise: they are not blown up to unit variance.
EIGENVALUE_FLOOR = 1e-4
# Compiled and plain trajectories may differ by this share of the largest: half precision rounds in other places.
COMPILED_TOLERANCE = 0.03
# On CPUs as many images pass the backbone at a time as have activations of this size: larger ones are no faster, only
# larger, and in the heap they leave gaps behind.
PASS_BYTES = 32 * 2**20
# Sizes of batch that are compiled, each for seconds; a run has few, and those beyond are rare ones.
MOST_GRAPHS = 16
UNLIMITED = 2**16


@dataclass(frozen=True)
class Step:
    """One step of a trajectory: what a block says of a place, as a mean or as sub-cells side by side.

    Attributes:
        name: the block's, with the number of sub-cells if there are several.
        block: its number.
        channels: before the projection.
        subcells: per side.
    """

    name: str
    block: int
    channels: int
    subcells: int = 1


def trajectory_steps(blocks: Sequence[Block], resolution: int, subcells: int) -> list[Step]:
    """The steps through ``blocks``: of one whose map is fine enough, its sub-cells, then its mean.

    The mean counts as the deeper one: what the sub-cells add to it is told apart from it (:mod:`trajdist.residuals`).
    """
    steps = []
    for number, block in enumerate(blocks):
        if 1 < subcells <= block.side / resolution:
            name = f"{block.name} {subcells} x {subcells}"
            steps.append(Step(name, number, subcells**2 * block.channels, subcells))
        steps.append(Step(block.name, number, block.channels))
    return steps


def pool(map_BCHW: torch.Tensor, resolution: int) -> torch.Tensor:
    """Pool an activation to ``[B, resolution**2, C]``: means of larger maps, bilinear samples of smaller ones."""
    height, width = map_BCHW.shape[-2:]
    if (height, width) == (resolution, resolution):
        pooled = map_BCHW
    elif height >= resolution and width >= resolution:
        pooled = F.adaptive_avg_pool2d(map_BCHW, resolution)
    else:
        pooled = F.interpolate(map_BCHW, (resolution, resolution), mode="bilinear", align_corners=False)
    return pooled.flatten(2).transpose(1, 2).float()


def pool_subcells(map_BCHW: torch.Tensor, resolution: int, subcells: int) -> torch.Tensor:
    """Means of the ``subcells**2`` parts of each place, side by side: ``[B, resolution**2, subcells**2 * C]``."""
    parts_BQC = pool(map_BCHW, resolution * subcells)
    batch, _, channels = parts_BQC.shape
    grid = parts_BQC.reshape(batch, resolution, subcells, resolution, subcells * channels)
    return grid.transpose(2, 3).reshape(batch, resolution**2, -1)


class Projection(nn.Module):
    """One affine map per step, from its channels to ``feature_dim`` numbers. Steps with fewer channels are padded.

    Attributes:
        valid_LD: bool, which numbers of a trajectory are real and not padding.
    """

    valid_LD: torch.Tensor

    def __init__(self, channels: list[int], feature_dim: int) -> None:
        super().__init__()
        self.channels, self.feature_dim = list(channels), feature_dim
        widths = [min(count, feature_dim) for count in channels]
        for step, (count, width) in enumerate(zip(channels, widths, strict=True)):
            self.register_buffer(f"mean_{step}", torch.zeros(count))
            self.register_buffer(f"matrix_{step}", torch.zeros(count, width))
        # On the CPU whatever the default device: nothing fills it in later.
        valid_LD = torch.arange(feature_dim, device="cpu")[None, :] < torch.tensor(widths, device="cpu")[:, None]
        self.register_buffer("valid_LD", valid_LD, persistent=False)

    def forward(self, step: int, pooled_BPC: torch.Tensor) -> torch.Tensor:
        """Project the pooled activation of a step, float32 ``[B, P, C]``, to ``[B, P, min(C, D)]``."""
        # Subtracting first keeps the digits that a large mean would swallow.
        centred_BPC = pooled_BPC - self.get_buffer(f"mean_{step}")
        return linear(centred_BPC, self.get_buffer(f"matrix_{step}").T)

    def lay_out(self) -> None:
        """Keep the matrices in memory as their products read them."""
        for step in range(len(self.channels)):
            matrix_CD = self.get_buffer(f"matrix_{step}")
            self.register_buffer(f"matrix_{step}", laid_out(matrix_CD))

    def set_step(self, step: int, mean_C: torch.Tensor, matrix_CD: torch.Tensor) -> None:
        self.get_buffer(f"mean_{step}").copy_(mean_C)
        self.get_buffer(f"matrix_{step}").copy_(matrix_CD)


class TrajectoryExtractor:
    """Images -> trajectories through a frozen backbone. One block's activation exists at a time."""

    def __init__(self, backbone: Backbone, projection: Projection, resolution: int, subcells: int = 1) -> None:
        self.backbone, self.projection, self.resolution = backbone, projection, resolution
        self.subcells, self.steps = subcells, trajectory_steps(backbone.blocks, resolution, subcells)
        self.images_per_pass: int | None = None
        self.compiled = False
        projection.lay_out()
        self._run: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] = self._trajectories

    def to(self, device: torch.device) -> TrajectoryExtractor:
        """Move to a device."""
        self.backbone.to(device)
        self.projection.to(device)
        self.suit(device.type)
        return self

    def suit(self, device_type: str, images_per_pass: int | None = None) -> None:
        """Choose how many images pass the backbone at a time; by default all of a batch, on CPUs a few.

        On CPUs the backbone also takes the ways of :mod:`trajdist.cpu_kernels`.
        """
        if images_per_pass is None and device_type == "cpu":
            images_per_pass = max(1, PASS_BYTES // self.backbone.largest_bytes)
        self.images_per_pass = images_per_pass
        # A compiler packs by itself, and reads the weights where they were.
        if device_type == "cpu" and not self.compiled:
            cpu_kernels.adopt(self.backbone.network)

    def passes(self, num_images: int) -> list[slice]:
        """A batch of so many images cut into passes of about the same size."""
        if self.images_per_pass is None or torch.compiler.is_exporting():
            return [slice(None)]
        count = max(1, -(-num_images // self.images_per_pass))
        ends = [number * num_images // count for number in range(count + 1)]
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def compile(self) -> TrajectoryExtractor:
        """Compile backbone, pooling and projection to one graph (torch.compile) for each of the first few batch sizes.

        Raises:
            ConfigError: there is no compiler.
        """
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
            raise ConfigError("backbone.compile=true needs a C++ compiler: install g++, or set it to false.")
        # It takes as long to import as torch does.
        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        compiled = torch.compile(self._trajectories, fullgraph=True, dynamic=False)
        proven: set[tuple[int, ...]] = set()

        def run(images_BCSS: torch.Tensor, places_BK: torch.Tensor | None) -> torch.Tensor:
            on_cpu = images_BCSS.device.type == "cpu"
            shape = (*images_BCSS.shape, *(() if places_BK is None else places_BK.shape))
            if shape not in proven and len(proven) >= MOST_GRAPHS:
                return self._trajectories(images_BCSS, places_BK)
            # On CPUs, constant weights are laid out once and activations fused into convolutions. Dynamo's own limit
            # counts the graphs of all extractors of the process together, and ends it.
            with inductor.patch(freezing=on_cpu), dynamo.patch(recompile_limit=UNLIMITED):
                result = compiled(_with_slack(images_BCSS) if on_cpu else images_BCSS, places_BK)
            # Compilers err now and then: every new graph is held against the plain computation once.
            if shape not in proven:
                _check_agreement(result, self._trajectories(images_BCSS, places_BK))
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
        """Trajectories of some places of each image, ``[B, K, L, D]``; places are numbered row by row."""
        return self._extract(images_BCSS, places_BK)

    def _extract(self, images_BCSS: torch.Tensor, places_BK: torch.Tensor | None) -> torch.Tensor:
        # len() of a batch of any size is a number to an exporter, its shape is not.
        passes = self.passes(images_BCSS.shape[0])
        parts = [self._run(images_BCSS[part], None if places_BK is None else places_BK[part]) for part in passes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _trajectories(self, images_BCSS: torch.Tensor, places_BK: torch.Tensor | None) -> torch.Tensor:
        """``[B, P, L, D]``, or of some places ``[B, K, L, D]``."""
        length, width = self.projection.valid_LD.shape
        places = self.resolution**2 if places_BK is None else places_BK.shape[1]
        out_BPLD = torch.zeros(images_BCSS.shape[0], places, length, width, device=images_BCSS.device)
        rows_BK = None if places_BK is None else self._rows(places_BK)

        def project(step: int, pooled_BPC: torch.Tensor) -> None:
            if rows_BK is not None:
                pooled_BPC = pooled_BPC.flatten(0, 1)[rows_BK]
            projected = self.projection(step, pooled_BPC)
            out_BPLD[:, :, step, : projected.shape[-1]] = projected

        self.observe(images_BCSS, project)
        return out_BPLD

    def _rows(self, places_BK: torch.Tensor) -> torch.Tensor:
        """Numbers of the places among those of all images."""
        first_B = torch.arange(len(places_BK), device=places_BK.device) * self.resolution**2
        return places_BK + first_B[:, None]

    @torch.no_grad()
    def observe(self, images_BCSS: torch.Tensor, visit: Callable[[int, torch.Tensor], None]) -> None:
        """Call ``visit(step, pooled)`` with float32 ``[B, P, C]`` for the steps of each block as it finishes."""
        # No inference mode: its tensors could not take part in training.
        device = images_BCSS.device.type

        def reduce_at_once(block: int, map_BCHW: torch.Tensor) -> None:
            with _full_precision(device):
                for number, step in enumerate(self.steps):
                    if step.block == block:
                        visit(number, pool_subcells(map_BCHW, self.resolution, step.subcells))

        self.backbone(images_BCSS, reduce_at_once)


def update_moments(
    moments: list[BlockMoments], extractor: TrajectoryExtractor, images_BCSS: torch.Tensor, weights_B: torch.Tensor
) -> None:
    """Add a batch of images to the statistics of every step; those of weight 0 do not count."""
    for part in extractor.passes(len(images_BCSS)):
        weights_N = weights_B[part].repeat_interleave(extractor.resolution**2)

        def visit(step: int, pooled_BPC: torch.Tensor, weights_N: torch.Tensor = weights_N) -> None:
            moments[step].update(pooled_BPC.flatten(0, 1), weights_N)

        extractor.observe(images_BCSS[part], visit)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Exported programs have no autocast to be turned off."""
    exporting = torch.compiler.is_exporting()
    return nullcontext() if exporting else torch.autocast(device_type, enabled=False)


def _check_agreement(compiled: torch.Tensor, plain: torch.Tensor) -> None:
    difference, scale = (compiled - plain).abs().max(), plain.abs().max()
    if not bool(difference <= COMPILED_TOLERANCE * scale):
        raise ConfigError(
            f"backbone.compile=true gives other trajectories here (they differ by {difference:.2g} of {scale:.2g}): "
            "set it to false, or install another torch."
        )


def _with_slack(images_BCSS: torch.Tensor) -> torch.Tensor:
    """A channels-last copy with some room behind it: padded loads of torch's vector code read past the last channel.

    Behind a batch that fills its shared memory to the last byte there is nothing to read (torch 2.14).
    """
    batch, channels, height, width = images_BCSS.shape
    flat = torch.zeros(images_BCSS.numel() + 64, dtype=images_BCSS.dtype)[:-64]
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(images_BCSS)


class BlockMoments:
    """Streaming count, mean and scatter matrix of one block's channels (Chan, Golub & LeVeque 1983).

    Each batch is centred on its own mean before it is multiplied, so float32 products lose nothing to a large mean;
    sums are kept in float64 where the device has it.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.count = torch.zeros((), dtype=kind, device=device)
        self.mean_C = torch.zeros(channels, dtype=kind, device=device)
        self.scatter_CC = torch.zeros(channels, channels, dtype=kind, device=device)

    def update(self, rows_NC: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Add rows; a row of weight 0 does not count."""
        count = weights_N.sum()
        mean_C = (weights_N @ rows_NC) / count.clamp(min=1)
        centred_NC = (rows_NC - mean_C) * weights_N[:, None]
        self._merge(count.to(self.count), mean_C.to(self.count), linear(centred_NC.T, centred_NC.T))

    def _merge(self, count: torch.Tensor, mean_C: torch.Tensor, scatter_CC: torch.Tensor) -> None:
        total = (self.count + count).clamp(min=1)
        delta_C = mean_C - self.mean_C
        # In place: the matrix of a wide block is larger than all else that a batch needs.
        self.scatter_CC += scatter_CC
        self.scatter_CC.addr_(delta_C * (self.count * count / total), delta_C)
        self.mean_C += delta_C * (count / total)
        self.count += count

    def all_reduce(self, sum_over_processes: Reduce) -> None:
        """Merge the moments of all processes, each about the mean of all."""
        count = sum_over_processes(self.count.clone())
        mean_C = sum_over_processes(self.mean_C * self.count) / count.clamp(min=1)
        delta_C = self.mean_C - mean_C
        self.scatter_CC = sum_over_processes(self.scatter_CC.addr_(delta_C * self.count, delta_C))
        self.count, self.mean_C = count, mean_C

    @property
    def covariance_CC(self) -> torch.Tensor:
        """Covariance with divisor N."""
        return self.scatter_CC / self.count.clamp(min=1)

    @property
    def variance_C(self) -> torch.Tensor:
        """The covariance's diagonal."""
        return self.scatter_CC.diagonal() / self.count.clamp(min=1)


def pca_whitening(covariance_CC: torch.Tensor, width: int) -> torch.Tensor:
    """``[C, width]``: the leading principal directions, each scaled to unit variance. Signs are fixed."""
    values, vectors = leading_eigenvectors(covariance_CC.cpu().double(), width)
    floor = EIGENVALUE_FLOOR * covariance_CC.diagonal().mean().cpu().double()
    strongest = vectors.abs().argmax(0)
    signs = torch.sign(vectors[strongest, torch.arange(vectors.shape[1])])
    scale = torch.rsqrt(torch.maximum(values, floor).clamp(min=1e-12))
    return vectors * signs * scale


def random_projection(covariance_CC: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """``[C, width]``: orthonormal random directions of the standardised channels, each scaled to unit variance."""
    generator = torch.Generator().manual_seed(seed)
    covariance = covariance_CC.cpu().double()
    deviation = covariance.diagonal().clamp(min=1e-12).sqrt()
    gaussian = torch.randn(len(deviation), width, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(gaussian).Q / deviation[:, None]
    variance = torch.einsum("cd,ce,ed->d", directions, covariance, directions)
    return directions * torch.rsqrt(variance.clamp(min=1e-12))


def fit_projection(projection: Projection, moments: list[BlockMoments], kind: str, seed: int) -> None:
    """Set every step's map from its moments; ``kind`` as in ``trajectory.projection``."""
    for step, moment in enumerate(moments):
        width = min(projection.channels[step], projection.feature_dim)
        covariance = moment.covariance_CC
        if kind == "pca":
            matrix = pca_whitening(covariance, width)
        else:
            matrix = random_projection(covariance, width, seed + step)
        projection.set_step(step, moment.mean_C.float().cpu(), matrix.float())
