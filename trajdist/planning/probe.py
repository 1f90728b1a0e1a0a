"""How fast this machine is: a few seconds of decoding, and of forward and backward passes without weight updates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from trajdist.config import Config
from trajdist.data.base import ImageSource
from trajdist.data.loader import SlotDataset, resolve_threads
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.models.losses import trajectory_losses
from trajdist.runtime.allocator import keep_freed_memory
from trajdist.sharding import Selection, Slots

# A measurement ends after this many seconds, or this many images.
LIMIT_S = 1.5
LIMIT_IMAGES = 128
BATCH = 8


@dataclass(frozen=True)
class Rates:
    """Rates in images/s; None where not measured.

    Attributes:
        decode: of one reader: a worker, or the process itself if it has none.
        backbone, model: of one process; the model's includes the backward pass.
        training: of one process, as given by the user instead of measured.
        device_is_here: False if this machine lacks the device that is planned for.
    """

    decode: float | None = None
    backbone: float | None = None
    model: float | None = None
    training: float | None = None
    device_is_here: bool = True

    def of_training(self, workers: int) -> tuple[float | None, str]:
        """Images/s of one process, and its bottleneck."""
        if self.training is not None:
            return self.training, "given"
        if self.backbone is None or self.model is None:
            return None, "unmeasured" if self.device_is_here else "unknown"
        slower = "backbone" if self.backbone <= self.model else "model"
        device = 1 / (1 / self.backbone + 1 / self.model)
        if self.decode is None:
            return device, slower
        if workers == 0:
            # Without workers, decoding does not overlap with the rest.
            return 1 / (1 / device + 1 / self.decode), "decode" if self.decode < device else slower
        return min(device, workers * self.decode), "decode" if workers * self.decode < device else slower


def measure(
    config: Config,
    source: ImageSource,
    selection: Selection,
    extractor: TrajectoryExtractor,
    model: nn.Module,
    device_name: str,
    precision: str,
    workers: int,
) -> Rates:
    """Measure on the configured images. The model's weights do not change; it and the extractor end up on the CPU."""
    settings = config.data.of_phase(selection.phase)
    threads = resolve_threads(config.data.num_workers, workers)
    dataset = SlotDataset(source, selection.train, config.data.image_size, settings.fit, threads=threads)
    batch = dataset[Slots(0, 0, min(BATCH, selection.num_train), BATCH)]
    decode = _decode_rate(dataset, selection.num_train)
    if device_name == "cuda" and not torch.cuda.is_available():
        return Rates(decode=decode, device_is_here=False)
    device = torch.device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    extractor.to(device, config.memory.images_per_pass)
    model.to(device)
    backbone, step = _step_rates(extractor, model.train(), batch.images.to(device), precision)
    extractor.to(torch.device("cpu"))
    model.cpu().zero_grad()
    return Rates(decode, backbone, step)


def _decode_rate(dataset: SlotDataset, num_images: int) -> float | None:
    """Images read, decoded and made square per second; None if none could be read."""
    images, started = 0, time.perf_counter()
    for start in range(0, min(num_images, LIMIT_IMAGES), BATCH):
        batch = dataset[Slots(0, start, min(start + BATCH, num_images), BATCH)]
        images += int(batch.weights.sum())
        if time.perf_counter() - started > LIMIT_S:
            break
    return images / (time.perf_counter() - started) or None


def _step_rates(
    extractor: TrajectoryExtractor, model: nn.Module, images: torch.Tensor, precision: str
) -> tuple[float, float]:
    """Images/s of the backbone, and of forward and backward through the model."""
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    valid_LD = extractor.projection.valid_LD

    def trajectories() -> torch.Tensor:
        with torch.autocast(images.device.type, kind, enabled=precision != "no"):
            return extractor(images)

    target_NLD = trajectories().flatten(0, 2)

    def step() -> None:
        with torch.autocast(images.device.type, kind, enabled=precision != "no"):
            reconstruction = model(target_NLD)
        trajectory_losses(reconstruction, target_NLD, valid_LD, len(images), 1.0).loss.sum().backward()
        model.zero_grad()

    return len(images) / _seconds(trajectories, images.device), len(images) / _seconds(step, images.device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds per call, not counting the first."""
    work()
    _wait(device)
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < LIMIT_S / 2:
        work()
        _wait(device)
        calls += 1
    return (time.perf_counter() - started) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
