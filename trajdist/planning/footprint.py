"""How many bytes a phase will need, counted before anything of that size is allocated.

The real code of a training step runs on fake tensors, which have shapes but no data, while every storage that is
created or freed is counted: that gives the peak for any batch size, device and precision on any machine.

Shape suffixes: B images, P places, N = B x P rows, L steps, D channels of a trajectory, W = L x D, S image
side.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trajdist.config import Config
from trajdist.data.loader import ImageBatch
from trajdist.data.trajectory_cache import Cached
from trajdist.extraction.projection import BlockMoments, pca_whitening
from trajdist.extraction.trajectory import TrajectoryExtractor, update_moments
from trajdist.planning.task import autocast, plan_task
from trajdist.runtime.clock import Clock
from trajdist.saved import bundle
from trajdist.scoring.residuals import PlaceMoments, ResidualModel
from trajdist.training.feed import Feed, Stream
from trajdist.training.train import place_draw


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that operations created. Views count once, ``known`` tensors never.

    Attributes:
        now: bytes alive now.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self._peak = 0, 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def take(self) -> int:
        """The peak since the last call; the next one starts from what is alive now."""
        peak, self._peak = self._peak, self.now
        return peak

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self._peak = max(self._peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Sizes:
    """Sizes of a phase's modules, independent of the batch: bytes, numbers of weights, and channels of every step."""

    backbone_bytes: int
    projection_bytes: int
    model_bytes: int
    backbone_parameters: int
    model_parameters: int
    trained_parameters: int
    trained_tensors: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of each part, on top of weights and optimizer state, for one batch size.

    Attributes:
        images_bytes, trajectories_bytes: of a batch.
        backbone, model: of a training step: the backbone's forward, and the model's forward and backward.
        statistics, residuals: of one batch in the passes over clean images.
    """

    images_bytes: int
    trajectories_bytes: int
    backbone: int
    model: int
    statistics: int
    residuals: int

    @property
    def step(self) -> int:
        return max(self.backbone, self.model)


class Rehearsal:
    """The modules of one phase on fake tensors, to run steps with any number of images.

    Args:
        modules: real ones; their weights are replaced by fake ones, in place.
        precision: ``no``, ``bf16`` or ``fp16``, as in the run.
        micro_batches: per optimizer step; from the second one on, gradients exist from the start.
        domains: number of adapters trained at once.
        beside: images of other domains that share the backbone's pass, per image of the largest batch.
        shared_gradients: whether DistributedDataParallel keeps the gradients in buckets all the time.
    """

    def __init__(
        self,
        config: Config,
        phase: int,
        modules: Modules,
        *,
        precision: str,
        micro_batches: int,
        shared_gradients: bool,
        domains: int = 1,
        beside: float = 0.0,
    ) -> None:
        self._domains, self._beside = domains, beside
        self.config, self.phase, self._precision = config, phase, precision
        self._micro_batches, self._shared_gradients = min(2, micro_batches), shared_gradients
        self._mode = FakeTensorMode()
        self.extractor, self.model = modules.extractor, modules.model.train()
        self.extractor.rehearses = True
        for module in (self.extractor.backbone, self.extractor.projection, self.model):
            self._become_fake(module)
        self.widths, self._contrasts = self.extractor.projection.widths, config.contrasts(phase)
        with self._mode:
            self.task = plan_task(config, phase, self.extractor, self.model)
        self.sizes = self._measure_sizes()

    def _become_fake(self, module: nn.Module) -> None:
        """Replace every parameter and buffer, in place, by a fake one of the same shape."""
        with self._mode:
            for part in module.modules():
                fake = {name: _like(weight) for name, weight in part._parameters.items() if weight is not None}
                frozen = [name for name in fake if not part.get_parameter(name).requires_grad]
                part._parameters |= {name: nn.Parameter(weight, name not in frozen) for name, weight in fake.items()}
                part._buffers |= {name: _like(value) for name, value in part._buffers.items() if value is not None}

    def _residual_model(self) -> ResidualModel:
        return ResidualModel(self.widths, self.extractor.resolution)

    def _place_moments(self) -> PlaceMoments:
        return PlaceMoments(self.extractor.resolution**2, sum(self.widths), torch.device("cpu"))

    def _measure_sizes(self) -> Sizes:
        trained = [weight.numel() for weight in self.task.module.parameters() if weight.requires_grad]
        network = self.extractor.backbone.network
        return Sizes(
            backbone_bytes=bytes_of(network),
            projection_bytes=bytes_of(self.extractor.projection),
            model_bytes=self._domains * bytes_of(self.model),
            backbone_parameters=sum(weight.numel() for weight in network.parameters()),
            model_parameters=self._domains * sum(weight.numel() for weight in self.model.parameters()),
            trained_parameters=self._domains * sum(trained),
            trained_tensors=self._domains * len(trained),
            channels=tuple(self.extractor.projection.channels),
        )

    def peaks(self, batch_size: int) -> Peaks:
        """Count one training step, and one batch of each pass over clean images, of ``batch_size`` images."""
        with self._counting() as live:
            images = self._images(batch_size)
            statistics = self._statistics(images, live) if self.phase == 1 else 0
            residuals = self._residuals(images, live)
        with self._counting() as live:
            batches = [self._batch(batch_size)]
            if self._beside:
                batches.append(self._batch(math.ceil(self._beside * batch_size)))
            images_bytes = live.now
            trajectories_bytes, backbone, model = self._step(batches, live)
        return Peaks(images_bytes, trajectories_bytes, backbone, model, statistics, residuals)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[LiveBytes]:
        modules = (self.extractor.backbone, self.extractor.projection, self.model)
        weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        with self._mode, LiveBytes(weights) as live:
            yield live
        self.task.module.zero_grad()

    def _images(self, batch_size: int) -> torch.Tensor:
        size = self.config.data.image_size
        return torch.zeros(batch_size, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)

    def _autocast(self) -> torch.autocast:
        # Fake tensors are on the CPU whatever the device is: only the width of the data type matters.
        return autocast("cpu", self._precision)

    def _step(self, batches: list[ImageBatch], live: LiveBytes) -> tuple[int, int, int]:
        """Bytes of the trajectories, peaks of the backbone and of the model, gradients included.

        The first batch is trained on while the trajectories of the other domains' batches wait.
        """
        backbone, model, trajectories_bytes = 0, 0, 0
        device = torch.device("cpu")
        for weight in self.task.module.parameters():
            weight.grad = torch.zeros_like(weight) if self._shared_gradients and weight.requires_grad else None
        for _ in range(self._micro_batches):
            live.take()
            feed = Feed(self.extractor, device, self._autocast, Clock(device))
            branches = [feed.add(Stream([batch])) for batch in batches]
            batch, trajectories = next(branches[0])
            trajectories_bytes = trajectories.untyped_storage().nbytes()
            backbone = max(backbone, live.take())
            self.task.loss(trajectories, batch, self._precision).backward()
            model = max(model, live.take())
            del trajectories
            feed.close()
        return trajectories_bytes, backbone, model

    def _batch(self, count: int) -> ImageBatch:
        """A batch as the run's loader makes it; if there is to be a cache, it is still empty."""
        images = self._images(2 * count if self._contrasts else count)
        weights, digest = torch.ones(count), torch.zeros(())
        if self._contrasts:
            coverage = torch.zeros(count, self.extractor.resolution**2)
            return ImageBatch(images, weights, digest, [], coverage=coverage)
        length, width = self.extractor.projection.valid_LD.shape
        draw = place_draw(self.config, self.phase, self.extractor)
        chosen = draw.count if draw else self.extractor.resolution**2
        places = torch.zeros(count, chosen, dtype=torch.int64) if draw else None
        cached = None
        if self.config.cache.dir:
            found = torch.zeros(0, chosen, length, width, dtype=torch.bfloat16)
            none, all_slots = torch.zeros(0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
            cached = Cached(found, none, all_slots, all_slots, all_slots)
        return ImageBatch(images, weights, digest, [], places, cached)

    @torch.no_grad()
    def _statistics(self, images: torch.Tensor, live: LiveBytes) -> int:
        """Peak of the statistics pass, in the precision of training."""
        live.take()
        cpu = torch.device("cpu")
        moments = [BlockMoments(channels, cpu) for channels in self.extractor.projection.channels]
        with self._autocast():
            update_moments(moments, self.extractor, images, torch.ones(len(images)))
        return live.take()

    @torch.no_grad()
    def _residuals(self, images: torch.Tensor, live: LiveBytes) -> int:
        """Peak of the two passes over residuals, in float32 as in scoring."""
        live.take()
        entries, moments, residual = sum(self.widths), self._place_moments(), self._residual_model()
        for use in (lambda rows: moments.update(rows, torch.ones(len(images))), residual.energies):
            target_NLD = self.extractor(images).flatten(0, 2)
            error_NW = (target_NLD - self.model(target_NLD).output_NLD.float()).flatten(1)
            use(error_NW[:, :entries].clone())
            del target_NLD, error_NW
        return live.take()

    def fit_peak(self) -> int:
        """Peak bytes of the float64 matrices made on the host after the passes: eigenvectors and whitening."""
        with self._mode, LiveBytes() as live, torch.no_grad():
            if self.phase == 1:
                widest = max(self.sizes.channels)
                # Full width: subspace iteration depends on the data, and falls back to the full decomposition.
                pca_whitening(torch.zeros(widest, widest, dtype=torch.float64), widest)
            # LAPACK's workspace for eigenvectors (dsyevd), invisible to torch: 2 n^2 float64 numbers.
            eigen = live.take()
            workspace = 2 * 8 * max(self.sizes.channels) ** 2 if self.phase == 1 else 0
            self._residual_model().fit(self._place_moments())
            whitening = live.take()
        return max(eigen + workspace, whitening)


def bytes_of(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class Modules(NamedTuple):
    """The real modules of a phase, untrained."""

    extractor: TrajectoryExtractor
    model: nn.Module


def build_modules(config: Config, phase: int) -> Modules:
    """Build the extractor and the model of a phase. Nothing is downloaded: bytes do not depend on the weights.

    Raises:
        UserError: what the run itself would raise about the backbone, the blocks or the adapter.
    """
    weights = "none" if config.backbone.weights == "DEFAULT" else config.backbone.weights
    backbone = config.backbone.model_copy(update={"weights": weights})
    extractor = bundle.new_extractor(config.model_copy(update={"backbone": backbone}))
    model = bundle.new_model(config.model, *extractor.projection.valid_LD.shape)
    if phase == 1:
        return Modules(extractor, model)
    # PEFT takes longer to import than torch, and Phase 1 does not need it.
    from trajdist.saved import lora

    return Modules(extractor, lora.attach(model, config.domain_adaptation.lora, ""))
