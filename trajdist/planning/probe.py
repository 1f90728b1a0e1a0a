"""How fast this machine is: a few seconds of decoding, and of forward and backward passes without weight updates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trajdist.config import Config
from trajdist.data.base import ImageSource
from trajdist.data.drawing import DefectDraw
from trajdist.data.loader import ImageBatch, SlotDataset, resolve_threads
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.planning.footprint import Modules
from trajdist.planning.task import PlannedTask, autocast, plan_task
from trajdist.runtime.allocator import keep_freed_memory
from trajdist.runtime.processes import to_device
from trajdist.sharding import Selection, Slots
from trajdist.training.train import place_draw

# A measurement ends after this many seconds, or this many images.
LIMIT_S = 1.5
LIMIT_IMAGES = 128
BATCH = 8
# Backbone and model are slower on small batches, so they get the run's own, up to this many images.
LARGEST_STEP = 32


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
    modules: Modules,
    device_name: str,
    precision: str,
    workers: int,
) -> Rates:
    """Measure on the configured images. The modules' weights do not change; they end up on the CPU."""
    extractor, model = modules
    dataset = _dataset(config, source, selection, extractor, workers)
    slots = min(LARGEST_STEP, config.data.of_phase(selection.phase).batch_size)
    batch = dataset[Slots(0, 0, min(slots, selection.num_train), slots)]
    decode = _decode_rate(dataset, selection.num_train)
    if device_name == "cuda" and not torch.cuda.is_available():
        return Rates(decode=decode, device_is_here=False)
    device = torch.device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    extractor.to(device, config.memory.images_per_pass)
    task = plan_task(config, selection.phase, extractor, model.to(device).train())
    backbone, step = _step_rates(task, extractor, to_device(batch, device), precision)
    extractor.to(torch.device("cpu"))
    model.cpu().zero_grad()
    return Rates(decode, backbone, step)


def _dataset(
    config: Config, source: ImageSource, selection: Selection, extractor: TrajectoryExtractor, workers: int
) -> SlotDataset:
    """The batches as the run has them: of some places only, or with drawn defects, if so configured."""
    phase, threads = selection.phase, resolve_threads(config.data.num_workers, workers)
    size, fit = config.data.image_size, config.data.of_phase(phase).fit
    defects = DefectDraw(extractor.resolution, config.seed, phase) if config.contrasts(phase) else None
    draw = None if defects else place_draw(config, phase, extractor)
    return SlotDataset(source, selection.train, size, fit, draw=draw, defects=defects, threads=threads)


def _decode_rate(dataset: SlotDataset, num_images: int) -> float | None:
    """Images read, decoded, made square and drawn on per second; None if none could be read."""
    images, started = 0, time.perf_counter()
    for start in range(0, min(num_images, LIMIT_IMAGES), BATCH):
        batch = dataset[Slots(0, start, min(start + BATCH, num_images), BATCH)]
        images += int(batch.weights.sum())
        if time.perf_counter() - started > LIMIT_S:
            break
    return images / (time.perf_counter() - started) or None


def _step_rates(
    task: PlannedTask, extractor: TrajectoryExtractor, batch: ImageBatch, precision: str
) -> tuple[float, float]:
    """Images/s of the backbone, and of forward and backward through the model. Drawn copies do not count."""
    device, places = batch.images.device, batch.places

    def extract() -> torch.Tensor:
        with autocast(device.type, precision):
            return extractor(batch.images) if places is None else extractor.at(batch.images, places)

    trajectories = extract()

    def step() -> None:
        task.loss(trajectories, batch, precision).backward()
        task.module.zero_grad()

    count = len(batch.weights)
    return count / _seconds(extract, device), count / _seconds(step, device)


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
