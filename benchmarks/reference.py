"""The baseline for trajdist: the same training in plain PyTorch, either streaming or collecting all trajectories first.

Images, backbone, blocks, grid and model come from a trajdist config. Activations stay NCHW float32; those of a batch
are kept in a list until the forward pass is complete; channels are reduced by averaging groups; Adam trains on every
place; and each step reads its loss. The C library's allocator keeps its default settings.

Shape suffixes: B images, C channels, S pixels per side, N places of a batch, L blocks, D channels of a trajectory.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trajdist.config import Config
from trajdist.data.decode import to_square
from trajdist.data.loader import resolve_workers
from trajdist.data.sources import open_source
from trajdist.extraction.backbones import Block, first_tensor, to_grid
from trajdist.extraction.networks import IMAGENET_MEAN, IMAGENET_STD, build_network
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.runtime import allocator
from trajdist.runtime.processes import device_type
from trajdist.saved import bundle

M_MMAP_THRESHOLD = -3


@contextlib.contextmanager
def usual_allocator() -> Iterator[None]:
    """Temporarily undo trajdist's allocator settings, with the values that glibc's dynamic thresholds grow to."""
    usual = {allocator.M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * 2**20, allocator.M_TRIM_THRESHOLD: 64 * 2**20}
    with contextlib.suppress(AttributeError):
        for name, value in usual.items():
            ctypes.CDLL(None).mallopt(name, value)
    allocator.trim()
    yield
    allocator.keep_freed_memory()


def repeated(images: str | None, count: int, folder: Path) -> Path:
    """A folder of ``count`` images, repeating those of ``images`` (by default scikit-image's photographs)."""
    folder.mkdir()
    source = open_source(images or "skimage:photos", "IMAGES")
    files = []
    for number in range(min(count, len(source))):
        files.append(folder / f"{number:06d}.jpg")
        source.load(number, None).convert("RGB").resize((256, 256)).save(files[-1], quality=90)
    for number in range(len(files), count):
        (folder / f"{number:06d}.jpg").symlink_to(files[number % len(files)])
    return folder


class Pixels(Dataset[torch.Tensor]):
    """The images of a folder, normalised float32 ``[3, S, S]``."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._source, self._size = open_source(str(folder), "IMAGES"), config.data.image_size

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> torch.Tensor:
        square = np.array(to_square(self._source.load(index, self._size), self._size, "crop"))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (torch.from_numpy(square).permute(2, 0, 1).contiguous() / 255.0 - mean) / std


def plain_network(name: str, weights: str, seed: int, image_size: int) -> nn.Module:
    """The network as its library builds it, without trajdist's modifications."""
    network = build_network(name, weights, seed, image_size).network
    return network.eval().requires_grad_(False)


@dataclass
class Reference:
    """Plain PyTorch training of ``model`` on a folder, in two variants.

    Attributes:
        part: the current stage: ``start``, ``collecting`` or ``training``.
    """

    config: Config
    network: nn.Module
    blocks: list[Block]
    model: nn.Module
    loader: DataLoader[torch.Tensor]
    device: torch.device
    part: str = "start"

    @torch.no_grad()
    def trajectories(self, images_BCSS: torch.Tensor) -> torch.Tensor:
        """The trajectories of a batch, float32 ``[N, L, D]``, N = B x places."""
        kept: list[torch.Tensor] = []
        handles = [
            self.network.get_submodule(block.name).register_forward_hook(
                lambda module, inputs, output, layout=block.layout: kept.append(to_grid(first_tensor(output), layout))
            )
            for block in self.blocks
        ]
        self.network(images_BCSS.to(self.device))
        for handle in handles:
            handle.remove()
        side, width = self.config.model.spatial_resolution, self.config.model.feature_dim
        pooled = [F.adaptive_avg_pool2d(activation, side).flatten(2).transpose(1, 2) for activation in kept]
        return torch.stack([F.adaptive_avg_pool1d(one, width) for one in pooled], dim=2).flatten(0, 1)

    def train_step(self, optimizer: torch.optim.Optimizer, batch_NLD: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(self.model(batch_NLD).output_NLD, batch_NLD)
        loss.backward()
        optimizer.step()
        torch.cuda.empty_cache()
        return loss.item()

    def stream(self) -> float:
        """Train for one epoch, computing trajectories batch by batch; returns seconds."""
        started, self.part = time.perf_counter(), "training"
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        for images in self.loader:
            self.train_step(optimizer, self.trajectories(images))
        return time.perf_counter() - started

    def collect(self, epochs: int = 1) -> tuple[float, float]:
        """Collect all trajectories, then train on them for ``epochs``; returns the seconds of each part."""
        started, self.part = time.perf_counter(), "collecting"
        collected = torch.cat([self.trajectories(images).cpu() for images in self.loader])
        between, self.part = time.perf_counter(), "training"
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        for batch in self._batches(collected, epochs):
            self.train_step(optimizer, batch.to(self.device))
        return between - started, time.perf_counter() - between

    def _batches(self, collected: torch.Tensor, epochs: int) -> Iterator[torch.Tensor]:
        size = self.config.data.imagenet.batch_size * self.config.model.spatial_resolution**2
        for _ in range(epochs):
            for chosen in torch.randperm(len(collected)).split(size):
                yield collected[chosen]


def reference(config: Config, extractor: TrajectoryExtractor, folder: Path) -> Reference:
    """The baseline for a config, with the blocks of ``extractor``."""
    settings, device = config.backbone, torch.device(device_type())
    workers = resolve_workers(config.data.num_workers, 1, device.type)
    loader = DataLoader(Pixels(config, folder), config.data.imagenet.batch_size, shuffle=True, num_workers=workers)
    return Reference(
        config,
        plain_network(settings.name, settings.weights, config.seed, config.data.image_size).to(device),
        extractor.backbone.blocks,
        bundle.new_model(config.model, *extractor.projection.valid_LD.shape).to(device).train(),
        loader,
        device,
    )
