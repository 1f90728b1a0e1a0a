"""A trained run as a function: images in, anomaly maps, scores and p-values out.

Shape suffixes: B images, C colours, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock, RLock
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trajdist.data.decode import Fit, reason, to_square
from trajdist.errors import ArtifactError, ConfigError, DataError, one_line
from trajdist.extraction.trajectory import TrajectoryExtractor, full_precision
from trajdist.files import is_file, is_folder, user_path
from trajdist.saved import bundle
from trajdist.saved.rundir import RunDir, check_has_adapter
from trajdist.scoring import inputs, residuals
from trajdist.scoring.detector import CellScores, Detector

# What to do about a missing file that a phase writes at its end.
GO_ON = "the run is not finished; wait for it, or run its command again to resume it"
COPY = "finish the adapter's run, or copy the file from there"
_LOADING = RLock()  # A model of another package may load one itself.


@dataclass(frozen=True)
class Scores:
    """What the Python API returns, on the CPU.

    Attributes:
        maps: float32 ``[B, S, S]``, anomaly maps at the resolution the backbone sees.
        scores: float32 ``[B]``, one per image.
        p_values: float64 ``[B]``, conformal: the share of clean images, the image itself among them, that score at
            least as high.

    >>> Scores(np.zeros((1, 64, 64), np.float32), np.zeros(1, np.float32), np.ones(1)).maps.shape
    (1, 64, 64)
    """

    maps: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    p_values: npt.NDArray[np.float64]


class Scorer:
    """Scores images with one or several detectors; the backbone runs once. Threads may share it.

    >>> scorer = load(run_dir, device="cpu")
    >>> scorer([image, np.zeros((80, 60, 3), np.uint8)]).scores.shape
    (2,)
    """

    def __init__(self, extractor: TrajectoryExtractor, detectors: Sequence[Detector], size: int, fit: Fit) -> None:
        self.extractor, self.detectors = extractor, list(detectors)
        self.size, self.fit = size, fit
        self.device = torch.device("cpu")
        # A backbone passes its activations to its last caller, so it takes one batch at a time.
        self._extracting = Lock()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a scorer cannot be copied or sent to another process: call trajdist.load there.")

    def to(self, device: torch.device | str) -> Scorer:
        """Move to a device."""
        self.device = torch.device(device)
        self.extractor.to(self.device)
        for detector in self.detectors:
            detector.to(self.device)
        return self

    @torch.no_grad()
    def score_batch(self, images_BCSS: torch.Tensor) -> list[CellScores]:
        """uint8 ``[B, 3, S, S]`` on the device -> one :class:`CellScores` per detector."""
        # As in calibration, even inside the caller's autocast.
        with full_precision(images_BCSS.device.type):
            with self._extracting:
                trajectories = self.extractor(images_BCSS)
            return [detector.score(trajectories) for detector in self.detectors]

    def __call__(self, images: Any, batch_size: int = 32) -> Scores:
        """Score files, PIL images, arrays or tensors with the first detector.

        Args:
            images: any number of file names, PIL images, arrays ``[H, W, 3]`` or ``[H, W]``, or tensors
                ``[3, H, W]`` or ``[H, W]``, of any sizes: integers in 0..255, 16-bit integers, or floats in 0..1. A
                tensor or an array with a leading batch dimension is such a sequence; one picture is a batch of one.
            batch_size: how many go through the backbone at once.

        Raises:
            ConfigError: the batch size is not a positive integer.
            DataError: an image cannot be read, or is not a picture.
        """
        # Integers, including NumPy's, have __index__; floats, text and None do not.
        if not hasattr(batch_size, "__index__") or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r} is not a positive integer: pass one.")
        waiting, parts = enumerate(inputs.several(images)), [self._empty()]
        while batch := list(islice(waiting, batch_size)):
            parts.append(self._score(batch))
        return Scores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _score(self, images: list[tuple[int, Any]]) -> tuple[npt.NDArray[Any], ...]:
        """The arrays of :class:`Scores`."""
        squares = np.stack([self._square(number, image) for number, image in images])
        result = self.score_batch(torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device))[0]
        maps = residuals.upsample(result.cells_BHW, self.size)
        p_values = self.detectors[0].images.p_values(result.images_B)
        return maps.cpu().numpy(), result.images_B.cpu().numpy(), p_values.numpy()

    def _square(self, number: int, image: Any) -> npt.NDArray[np.uint8]:
        """The image as the backbone sees it, ``[S, S, 3]``.

        Raises:
            DataError: it cannot be read, or is not a picture.
        """
        try:
            return to_square(inputs.to_pil(image, self.size), self.size, self.fit)
        except DataError:
            raise
        except Exception as error:  # Pillow reads only now, and can raise anything on malformed bytes.
            name = f"={str(image)!r}" if isinstance(image, (str, Path)) else ""
            raise DataError(
                f"images[{number}]{name} cannot be used ({reason(error)}): leave it out, or replace it."
            ) from error

    def _empty(self) -> tuple[npt.NDArray[Any], ...]:
        return np.zeros((0, self.size, self.size), np.float32), np.zeros(0, np.float32), np.zeros(0, np.float64)


@contextmanager
def _own_defaults() -> Iterator[None]:
    """PyTorch's defaults, whatever the calling program has set: new tensors are float32 and on the CPU.

    The random state is restored. One thread at a time: the default dtype and the random generator are shared by the
    whole process.
    """
    with _LOADING, torch.random.fork_rng(devices=[]), torch.device("cpu"), full_precision("cpu"):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@_own_defaults()
def load(
    run_dir: str | Path,
    adapter: str | Path | Sequence[str | Path] | None = None,
    phase: int | None = None,
    device: str = "auto",
) -> Scorer:
    """Load a run for scoring.

    Args:
        run_dir: a run directory.
        adapter: one or several adapter folders to use instead of the run's own.
        phase: 1 for the unadapted model, 2 for the adapted one; None for the latest phase there is.
        device: a torch device; ``auto`` takes an accelerator if there is one.

    Raises:
        ArtifactError: something is missing, damaged, or belongs to another run.
        ConfigError: phase 1 together with an adapter, the same adapter twice, or an invalid phase or device.

    >>> load(run_dir, phase=1, device="cpu").detectors[0].name
    'phase1'
    """
    if phase not in (None, 1, 2):
        raise ConfigError(f"phase={phase!r} is not a phase: use 1, 2, or None for the latest.")
    if adapter and phase == 1:
        raise ConfigError("phase 1 is the model without an adapter: choose either phase 1 or an adapter.")
    rundir = RunDir(run_dir)
    if not is_file(rundir.trajectory):
        raise ArtifactError(f"{str(run_dir)!r} has no phase1/trajectory.safetensors: name a run whose Phase 1 is done.")
    named = [adapter] if isinstance(adapter, (str, Path)) else adapter or ()
    adapters = [user_path(each) for each in named]
    if not adapters and phase != 1:
        adapters = own_adapters(rundir)
    if phase == 2 and not adapters:
        raise ArtifactError(f"{str(run_dir)!r} has no phase2/adapter: run Phase 2 first, or use --phase 1.")
    # Before the backbone is loaded, which takes longer.
    names = _names(adapters)
    for folder in adapters:
        check_has_adapter(folder)
    extractor = bundle.load_extractor(rundir.trajectory)
    document = bundle.read(rundir.trajectory, bundle.TrajectoryDocument)
    detectors = [_load_adapted(rundir, extractor, *item) for item in names.items()]
    detectors = detectors or [_load_detector(rundir, extractor)]
    scorer = Scorer(extractor, detectors, document.image_size, document.fit)
    return scorer.to(_device(device))


def own_adapters(rundir: RunDir) -> list[Path]:
    """The run's own adapter, or none.

    Raises:
        ArtifactError: it has several, one per domain, or its own is gone.
    """
    if is_folder(rundir.adapter):
        return [rundir.adapter]
    if is_file(rundir.calibration(2)):
        raise ArtifactError(
            f"the adapter {str(rundir.adapter)!r} is gone: restore it, run the training command again to make it "
            "anew, or use phase 1 to do without it."
        )
    if domains := rundir.domains():
        raise ArtifactError(
            f"{str(rundir.path)!r} has an adapter for each of its domains {', '.join(each.name for each in domains)}: "
            f"name the run of one ({domains[0]!s}), adapters ({domains[0] / 'phase2' / 'adapter'!s}), or phase 1 to "
            "score without any."
        )
    return []


def _load_base(rundir: RunDir, extractor: TrajectoryExtractor) -> tuple[nn.Module, str]:
    """The sequence model without adapters, and its fingerprint."""
    model, document = bundle.load_model(_made(rundir.model))
    bundle.check_trajectories(rundir, document, extractor)
    return model, bundle.base_fingerprint(model, document)


def _load_detector(rundir: RunDir, extractor: TrajectoryExtractor) -> Detector:
    model, base = _load_base(rundir, extractor)
    detector = Detector("phase1", model, extractor.projection.valid_LD, extractor.resolution)
    detector.load(_made(rundir.calibration(1)), base)
    return detector


def _made(path: Path, fix: str = GO_ON) -> Path:
    """The path of a file that a phase writes at its end.

    Raises:
        ArtifactError: it is not there.
    """
    if not is_file(path):
        raise ArtifactError(f"{str(path)!r} does not exist: {fix}.")
    return path


def _load_adapted(rundir: RunDir, extractor: TrajectoryExtractor, name: str, adapter: Path) -> Detector:
    # PEFT takes longer to import than torch, and the base model does not need it.
    from trajdist.saved import lora

    model, base = _load_base(rundir, extractor)
    adapted = lora.load_adapter(model, adapter, base)
    detector = Detector(name, adapted, extractor.projection.valid_LD, extractor.resolution)
    detector.adapted = True
    calibration = adapter.parent / "calibration.safetensors"
    own = adapter.resolve() == rundir.adapter.resolve()
    detector.load(_made(calibration, GO_ON if own else COPY), lora.adapter_fingerprint(adapted, base))
    return detector


def _names(adapters: list[Path]) -> dict[str, Path]:
    """Name adapters: ``runs/gravel/phase2/adapter`` is ``gravel``, with as many parents as make it unique.

    Raises:
        ConfigError: the same adapter twice.
    """
    paths = {folder: _without(folder.resolve(), "adapter", "phase2") for folder in adapters}
    if len({folder.resolve() for folder in adapters}) < len(adapters):
        raise ConfigError(f"an adapter is named twice among {[str(folder) for folder in adapters]}: drop one.")
    return {_shortest(path, list(paths.values())) or str(folder.resolve()): folder for folder, path in paths.items()}


def _without(path: Path, *endings: str) -> Path:
    for ending in endings:
        path = path.parent if path.name == ending else path
    return path


def _shortest(path: Path, others: list[Path]) -> str | None:
    """The shortest end of ``path`` that is unique among ``others``, which include ``path``; None if there is none."""
    for count in range(1, len(path.parts) + 1):
        end = path.parts[-count:]
        if sum(other.parts[-count:] == end for other in others) == 1:
            return str(Path(*end))
    return None


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            # Torch may know a device that this machine lacks.
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = one_line(error, 160)
            raise ConfigError(f"device={name!r} cannot be used ({reason}): name cpu, cuda, mps or auto.") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
