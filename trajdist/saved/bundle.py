"""Saving and loading a trained run: ``phase1/trajectory.safetensors`` and ``phase1/model.safetensors``.

The metadata of each file describes its contents; it is validated against the schemas here before anything is built.

Shape suffixes: L steps, D channels of a trajectory.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from trajdist.artifacts import fingerprint, load_state, read_document, read_tensors, write_tensors
from trajdist.config import Config, Fraction, ImageSize, Layers, Model, Resolution, Seed, Subcells, Width
from trajdist.errors import ArtifactError, ConfigError, first_problem
from trajdist.extraction.backbones import Backbone, build_backbone
from trajdist.extraction.projection import Projection
from trajdist.extraction.trajectory import TrajectoryExtractor, trajectory_steps
from trajdist.models.registry import build_model
from trajdist.plugins import known_model
from trajdist.saved.rundir import RunDir

# Limit on concatenated sub-cell channels: their float64 covariance takes 8 bytes x this squared, half a GiB.
MOST_CHANNELS = 2**13


class Document(BaseModel):
    """Base of the metadata documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1


class TrajectoryDocument(Document):
    """Describes how trajectories are computed; metadata of ``trajectory.safetensors``."""

    kind: Literal["trajectory"] = "trajectory"
    backbone: str
    weights: str
    # Only in older files, and ignored: the blocks that they selected are stored as well.
    patterns: list[str] = Field([], exclude=True)
    seed: Seed
    image_size: ImageSize
    fit: Literal["squash", "crop"]
    projection: Literal["pca", "random"]
    blocks: list[str] = Field(min_length=1, max_length=4096)
    channels: list[int] = Field(min_length=1, max_length=4096)
    spatial_resolution: Resolution
    feature_dim: Width
    subcells: Subcells = 1
    backbone_fingerprint: str
    num_images: int = Field(ge=0)


class ModelDocument(Document):
    """Describes a sequence model and the trajectories it was trained on; metadata of ``model.safetensors``."""

    kind: Literal["model"] = "model"
    type: Annotated[str, AfterValidator(known_model)]
    length: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=65536)
    hidden_dim: Width
    latent_dim: Width
    num_layers: Layers
    num_heads: Width
    dropout: Fraction
    trajectory_fingerprint: str


D = TypeVar("D", bound=Document)


def read(path: Path, schema: type[D]) -> D:
    """Read and validate the metadata of an artifact.

    Raises:
        ArtifactError: missing, damaged, or another kind of artifact.
    """
    document = read_document(path)
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        field, why = first_problem(error)
        kind = schema.__name__.removesuffix("Document").lower()
        raise ArtifactError(f"{str(path)!r} is not a trajdist {kind} ({field or 'metadata'}: {why}).") from None


def trajectory_document(config: Config, extractor: TrajectoryExtractor, num_images: int) -> TrajectoryDocument:
    return TrajectoryDocument(
        backbone=config.backbone.name,
        weights=config.backbone.weights,
        seed=config.seed,
        image_size=config.data.image_size,
        fit=config.data.domain.fit,
        projection=config.trajectory.projection,
        blocks=[block.name for block in extractor.backbone.blocks],
        channels=extractor.projection.channels,
        spatial_resolution=extractor.resolution,
        feature_dim=extractor.projection.feature_dim,
        subcells=extractor.subcells,
        backbone_fingerprint=extractor.backbone.fingerprint,
        num_images=num_images,
    )


def new_extractor(config: Config) -> TrajectoryExtractor:
    """Build the backbone and an unfitted projection from the config.

    Raises:
        ConfigError: the backbone cannot be built, no block is fine enough for the sub-cells, or their channels exceed
            :data:`MOST_CHANNELS`.
    """
    settings = config.backbone
    size = config.data.image_size
    backbone = build_backbone(settings.name, settings.weights, settings.blocks, size, config.seed)
    resolution, subcells = config.model.spatial_resolution, config.trajectory.subcells
    channels = step_channels(backbone, resolution, subcells)
    if subcells > 1 and len(channels) == len(backbone.blocks):
        raise ConfigError(
            f"trajectory.subcells={subcells}, but no block is {subcells} times as fine as "
            f"model.spatial_resolution={resolution}: lower one of them."
        )
    if subcells > 1 and max(channels) > MOST_CHANNELS:
        raise ConfigError(
            f"trajectory.subcells={subcells} concatenates up to {max(channels):,} channels, whose covariance "
            f"does not fit: lower it, or raise model.spatial_resolution={resolution}."
        )
    return TrajectoryExtractor(backbone, Projection(channels, config.model.feature_dim), resolution, subcells)


def step_channels(backbone: Backbone, resolution: int, subcells: int) -> list[int]:
    return [step.channels for step in trajectory_steps(backbone.blocks, resolution, subcells)]


def save_trajectory(path: Path, extractor: TrajectoryExtractor, document: TrajectoryDocument) -> None:
    write_tensors(path, extractor.projection.state_dict(), document.model_dump())


def note_weights(path: Path, weights: str) -> None:
    """Record where the backbone's weights are, which may have moved, for loading the run without its config.

    Raises:
        ArtifactError: the file is missing or damaged, or cannot be written.
    """
    document = read(path, TrajectoryDocument)
    if document.weights != weights:
        write_tensors(path, read_tensors(path), document.model_copy(update={"weights": weights}).model_dump())


def load_extractor(path: Path, weights: str | None = None) -> TrajectoryExtractor:
    """Rebuild a run's extractor; ``weights`` overrides where the backbone's weights are read from.

    Raises:
        ArtifactError: the file is missing or damaged, or the backbone's weights are not those of the run.
        ConfigError: the backbone cannot be built.
    """
    document = read(path, TrajectoryDocument)
    weights = weights or document.weights
    # By the names of its blocks, not by patterns: a later version may recognise more blocks.
    blocks = [glob.escape(name) for name in document.blocks]
    backbone = build_backbone(document.backbone, weights, blocks, document.image_size, document.seed)
    return with_projection(path, backbone, weights)


def with_projection(path: Path, backbone: Backbone, weights: str) -> TrajectoryExtractor:
    """Build a run's extractor from an already loaded backbone and the saved projection.

    Args:
        path: the run's ``trajectory.safetensors``.
        backbone: must have the run's weights.
        weights: where they came from, for the error message.

    Raises:
        ArtifactError: the file is missing or damaged, or the backbone's weights are not those of the run.
    """
    document = read(path, TrajectoryDocument)
    if backbone.fingerprint != document.backbone_fingerprint:
        raise ArtifactError(
            f"the backbone {document.backbone!r} with weights {weights!r} is not the one that "
            f"{str(path)!r} was made with: use the same weights (and the same versions, if they are random)."
        )
    resolution, subcells = document.spatial_resolution, document.subcells
    with torch.device("meta"):
        projection = Projection(step_channels(backbone, resolution, subcells), document.feature_dim)
    load_state(projection, read_tensors(path), path)
    return TrajectoryExtractor(backbone, projection, resolution, subcells)


def trajectory_fingerprint(extractor: TrajectoryExtractor) -> str:
    """Hash of the backbone, blocks, grid and projection together."""
    facts = {"backbone": extractor.backbone.fingerprint, "spatial_resolution": extractor.resolution}
    if extractor.subcells > 1:  # Omitted by default to match fingerprints of older runs.
        facts["subcells"] = extractor.subcells
    return fingerprint(extractor.projection.state_dict(), facts)


def model_document(config: Config, extractor: TrajectoryExtractor) -> ModelDocument:
    length, width = extractor.projection.valid_LD.shape
    settings = config.model.model_dump(exclude={"spatial_resolution", "feature_dim"})
    return ModelDocument(
        **settings, length=length, width=width, trajectory_fingerprint=trajectory_fingerprint(extractor)
    )


def new_model(settings: Model | ModelDocument, length: int, width: int) -> nn.Module:
    """An untrained sequence model for trajectories of ``length`` steps and ``width`` channels."""
    sizes = settings.model_dump(include={"hidden_dim", "latent_dim", "num_layers", "num_heads", "dropout"})
    return build_model(settings.type, length=length, width=width, **sizes)


def save_model(path: Path, model: nn.Module, document: ModelDocument) -> None:
    write_tensors(path, model.state_dict(), document.model_dump())


def load_model(path: Path) -> tuple[nn.Module, ModelDocument]:
    """Rebuild a run's sequence model; shapes are checked before memory is allocated.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    document = read(path, ModelDocument)
    with torch.device("meta"):
        model = new_model(document, document.length, document.width)
    load_state(model, read_tensors(path), path)
    return model, document


def check_trajectories(rundir: RunDir, document: ModelDocument, extractor: TrajectoryExtractor) -> None:
    """Check that a model was trained on the trajectories that ``extractor`` computes.

    Raises:
        ArtifactError: they are not from the same run.
    """
    if document.trajectory_fingerprint != trajectory_fingerprint(extractor):
        raise ArtifactError(
            f"{str(rundir.model)!r} was trained on other trajectories than {str(rundir.trajectory)!r} describes: "
            "restore both from the same run."
        )


def base_fingerprint(model: nn.Module, document: ModelDocument) -> str:
    """Hash of a base model and everything it depends on; stored with adapters."""
    return fingerprint(model.state_dict(), document.model_dump())
