"""``trajdist export``: a trained run as one self-contained file: uint8 images in; maps, scores and p-values out.

It contains everything from normalisation, backbone, pooling and projection to the sequence model (adapter merged),
clean-residual statistics, upsampling and calibration. Only decoding and resizing are left to the caller; the file's
metadata gives the image size and fit.

Shape suffixes: B images, S pixels per side, K occupied bins of the calibration.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from trajdist import __version__
from trajdist.errors import ConfigError, TrainingError, one_line, os_errors
from trajdist.files import is_folder, replacing
from trajdist.scoring import residuals
from trajdist.scoring.calibration import QuantileSketch
from trajdist.scoring.detector import CellScores, Detector
from trajdist.scoring.histogram import bins_of, lower_edges
from trajdist.scoring.scorer import Scorer

Arrays = tuple[np.ndarray[Any, Any], ...]
INPUT, OUTPUTS = "images", ("maps", "scores", "p_values")
METADATA = "trajdist"
FILES = {"onnx": "export.onnx", "torch": "export.pt2"}
# In the units of :func:`unit`. Other kernels round differently; larger differences are errors.
TOLERANCE = 0.01
TRIALS = (1, 3)


class Exported(nn.Module):
    """A scorer with a single detector as a plain module that exporters can trace."""

    upper_K: torch.Tensor
    counts_K: torch.Tensor

    def __init__(self, scorer: Scorer, detector: Detector) -> None:
        super().__init__()
        self.backbone, self.projection = scorer.extractor.backbone, scorer.extractor.projection
        self.model, self.residual = _plain(detector.model), detector.residual
        self._detector = detector.with_model(detector.name, self.model)
        self._extractor, self._size = scorer.extractor, scorer.size
        upper_K, counts_K, total = _table(detector.images)
        self.register_buffer("upper_K", upper_K)
        self.register_buffer("counts_K", counts_K)
        self._total = total

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 ``[B, 3, S, S]`` -> maps, float32 ``[B, S, S]``; scores, float32 ``[B]``; p-values, float64 ``[B]``."""
        trajectories_BHWLD = self._extractor(images)
        result = self._detector.score(trajectories_BHWLD)
        maps_BSS = residuals.upsample(result.cells_BHW, self._size)
        # A clean score counts as >= the image's if its bin's upper edge lies above it, so the whole shared bin counts.
        at_least_B = ((result.images_B[:, None] < self.upper_K) * self.counts_K).sum(1)
        return maps_BSS, result.images_B, (1 + at_least_B) / (self._total + 1)


def _plain(model: nn.Module) -> nn.Module:
    """The model with any PEFT layers merged; avoids importing PEFT for a model that has none."""
    if not hasattr(model, "merge_and_unload"):
        return model
    from trajdist.saved.lora import merged

    return merged(model)


def _table(sketch: QuantileSketch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Upper edges (float32) and counts (float64) of the occupied bins, and the number of clean images."""
    edges_K, counts_K = sketch.histogram.occupied()
    return lower_edges(bins_of(edges_K) + 1), counts_K, sketch.count


class Export(NamedTuple):
    """Result of :func:`export`: the file, and its largest differences from the scorer on trial images, in units."""

    path: Path
    map_difference: float
    score_difference: float


def export(scorer: Scorer, kind: str, path: Path) -> Export:
    """Export the scorer's first detector to one file and compare the file's outputs with the scorer's.

    Args:
        scorer: a loaded run; it is moved to the CPU.
        kind: ``onnx``, or ``torch`` for a ``torch.export`` program.
        path: the output file; written atomically, its folder created if missing.

    Raises:
        ConfigError: a package is missing, or the path is a folder.
        ArtifactError: the file cannot be written.
        TrainingError: the network cannot be exported, or the file gives different results.
    """
    if is_folder(path):
        raise ConfigError(f"--out {str(path)!r} is a folder: name a file, such as {str(path / FILES[kind])!r}.")
    scorer.to("cpu")
    detector = scorer.detectors[0]
    # With requires_grad, the exported program would keep every activation for a backward pass.
    module = Exported(scorer, detector).eval().requires_grad_(False)
    document = {"version": __version__, "size": scorer.size, "fit": scorer.fit, "input": "uint8 [B, 3, S, S], RGB"}
    document |= {"outputs": list(OUTPUTS), "detector": detector.name, "clean_images": detector.images.count}
    writers = {"onnx": _write_onnx, "torch": _write_torch}
    with os_errors(f"{str(path)!r} cannot be written", fix="free some space or name another"):
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        # An earlier export stays until this one has been verified.
        with replacing(path) as part:
            part.touch()  # Exporting takes long: find out first whether the folder can be written.
            run = writers[kind](module, trial_images(scorer.size, 2), part, json.dumps(document))
            return _verify(scorer, run, path)


def _verify(scorer: Scorer, run: Callable[[torch.Tensor], Arrays], path: Path) -> Export:
    """Compare an exported file with the run."""
    differences = [_compare(scorer, run, trial_images(scorer.size, count)) for count in TRIALS]
    # NumPy's maximum is NaN if one of them is, which is never within the tolerance; Python's may be another.
    found = Export(path, *np.max(differences, 0).tolist())
    if not (found.map_difference <= TOLERANCE and found.score_difference <= TOLERANCE):
        raise TrainingError(
            f"the exported file gives other scores (by {found.score_difference:.2g}, maps {found.map_difference:.2g}, "
            f"of which {TOLERANCE:g} may be rounding) and was not kept: try --format torch, or another version of the "
            "exporter."
        )
    return found


def trial_images(size: int, count: int) -> torch.Tensor:
    """Random smooth images with noise, uint8 ``[B, 3, S, S]``; a pure function of ``size`` and ``count``."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (255 * (0.8 * smooth + 0.2 * torch.rand(smooth.shape, generator=generator))).to(torch.uint8)


def _compare(scorer: Scorer, run: Callable[[torch.Tensor], Arrays], images: torch.Tensor) -> tuple[float, float]:
    maps, scores, p_values = run(images)
    result = scorer.score_batch(images)[0]
    expected_maps = residuals.upsample(result.cells_BHW, scorer.size).numpy()
    own = scorer.detectors[0].images.p_values(torch.from_numpy(np.array(scores))).numpy()
    if not np.allclose(own, p_values, rtol=1e-9):
        raise TrainingError("the exported file gives other p-values for the same scores: please report it.")
    differences = np.abs(maps - expected_maps).max(), np.abs(scores - result.images_B.numpy()).max()
    return float(differences[0] / unit(result)), float(differences[1] / unit(result))


def unit(scores: CellScores) -> float:
    """The unit for differences from these scores: a standard deviation, or 1 % of the largest score if that is more.

    Rounding is proportional to the scores, which are huge if clean images hardly differ from one another.
    """
    return max(1.0, float(scores.cells_BHW.abs().max()) / 100)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings and logging about internals; the final comparison decides whether it worked."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _exporting() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Exporters and runtimes raise errors of many types for what they cannot handle.
        raise TrainingError(f"this backbone or model cannot be exported ({one_line(error)}).") from None


def _program(module: Exported, images: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=65536)
    with _exporting(), _quiet(), torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes={"images": {0: batch}}, strict=False)


def _write_torch(module: Exported, images: torch.Tensor, path: Path, document: str) -> Callable[[torch.Tensor], Arrays]:
    content = io.BytesIO()
    program = _program(module, images)
    with _quiet():
        torch.export.save(program, content, extra_files={METADATA: document})
        path.write_bytes(content.getvalue())
        again = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(batch: torch.Tensor) -> Arrays:
        with torch.no_grad():
            return tuple(output.numpy() for output in again(batch))

    return run


def _write_onnx(module: Exported, images: torch.Tensor, path: Path, document: str) -> Callable[[torch.Tensor], Arrays]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format onnx needs the package {error.name}: pip install 'trajdist[onnx]'.") from None
    program = _program(module, images)
    names: dict[str, Sequence[str]] = {"input_names": [INPUT], "output_names": OUTPUTS}
    with _quiet(), _exporting():
        converted = torch.onnx.export(program, (images,), dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
    assert converted is not None
    model = converted.model_proto
    onnx.helper.set_model_props(model, {METADATA: document})
    path.write_bytes(model.SerializeToString())
    with _exporting():
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: tuple(session.run(None, {INPUT: batch.numpy()}))
