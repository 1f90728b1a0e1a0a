"""The configuration: every key, its default and its bounds, in one place.

:mod:`trajdist.config_files` reads YAML and overrides; here pydantic types and checks the result.
Config objects stop at the builders: classes elsewhere take plain keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from trajdist.plugins import BUILT_IN, installed_models, known_model


def _no_word(value: object) -> object:
    """Refuse YAML's ``yes`` and ``off``, which would count as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("input should be a number, not a yes or no")
    return value


def _not_none(value: int) -> int:
    if value == 0:
        raise ValueError("input leaves nothing to train on, use -1 for all images")
    return value


NUMBER = BeforeValidator(_no_word)
NumSamples = Annotated[int, Field(ge=-1, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_none), NUMBER]
PositiveInt = Annotated[int, Field(gt=0), NUMBER]
NaturalInt = Annotated[int, Field(ge=0), NUMBER]
# Of layers and batches: larger ones could not be allocated anyway.
Width = Annotated[int, Field(gt=0, le=65536), NUMBER]
Layers = Annotated[int, Field(ge=0, le=256), NUMBER]
Resolution = Annotated[int, Field(gt=0, le=1024), NUMBER]
Subcells = Annotated[int, Field(gt=0, le=16), NUMBER]
ImageSize = Annotated[int, Field(ge=16, le=16384), NUMBER]
Seed = Annotated[int, Field(ge=0, lt=2**32), NUMBER]
Fraction = Annotated[float, Field(ge=0, lt=1), NUMBER]
# Infinity switches a limit off; an infinite rate or weight would make every loss infinite.
Limit = Annotated[float, Field(gt=0), NUMBER]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER]
# It becomes a folder of the run directory.
DomainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]

# The image set that each phase trains on, below ``data``.
SETS = {1: "imagenet", 2: "domain"}

# A key marked FREE may change when a run is resumed: it does not change what is learned from an image.
FREE: dict[str, Any] = {"resume": "free"}


def _yaml_no(value: object) -> object:
    """YAML 1.1 reads a bare ``no`` as false; here it is the word."""
    return "no" if value is False else value


def _list_models(schema: dict[str, Any]) -> None:
    schema["enum"] = [*BUILT_IN, *sorted(installed_models())]


class Section(BaseModel):
    """A group of keys. Unknown keys are errors; the docstring below a key is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ImageSet(Section):
    """A set of images and how training walks through it."""

    path: str | None = Field(None, json_schema_extra=FREE)
    """A folder (searched recursively), tar shards, `s3://...`, `hf:NAME:SPLIT` or `skimage:NAME`: see docs/data.md."""
    batch_size: Width = 32
    """Images per process and micro-batch."""
    num_samples: NumSamples = -1
    """Images to train on: a seeded random subset, stratified by class where classes are known; -1 for all."""
    num_epochs: PositiveInt = Field(1, json_schema_extra=FREE)
    """Passes over the images."""
    gradient_accumulation_steps: Width = 1
    """Micro-batches per optimizer step."""
    fit: Literal["squash", "crop"] = "squash"
    """How images are made square: `squash` ignores the aspect ratio, `crop` takes the largest central square."""


class ImagenetSet(ImageSet):
    """Photographs are cropped, as when the backbone was trained; in a domain's images, every place matters."""

    fit: Literal["squash", "crop"] = "crop"
    """`crop` or `squash`, see data.domain.fit. Training only: scoring always uses data.domain.fit."""


class Data(Section):
    """Where the images are and how they are read."""

    imagenet: ImagenetSet = ImagenetSet()
    """Phase 1."""
    domain: ImageSet = ImageSet()
    """Phase 2."""
    domains: dict[DomainName, ImageSet] = Field({}, json_schema_extra=FREE)
    """Several domains by name (`{road: {path: ...}}`), adapted to in one job; unset keys come from `data.domain`."""
    image_size: ImageSize = 224
    """Height and width of the backbone's input, in pixels."""
    num_workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024), NUMBER] = Field("auto", json_schema_extra=FREE)
    """Decoding workers per training process; `auto`: one per spare core (at most 16), or threads if none is spare."""
    read_retries: NaturalInt = Field(3, json_schema_extra=FREE)
    """How often a read that fails with a transient I/O error is retried, with growing pauses."""
    shuffle_window: NaturalInt = 16
    """Tar shards that are read and shuffled together; 0, or at least the number of shards, shuffles everything."""
    cache_dir: str | None = Field(None, json_schema_extra=FREE)
    """A folder on a local disk for copies of remote shards (not cache.dir); null reads images over the network."""
    cache_gib: Limit = Field(100.0, json_schema_extra=FREE)
    """Maximum size of those copies, in GiB; the least recently used are evicted first."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), NUMBER] = Field(0.05, json_schema_extra=FREE)
    """Maximum share of unreadable images, which are skipped and listed; beyond it, the run stops."""

    def of_phase(self, phase: int) -> ImageSet:
        """The image set that a phase trains on."""
        settings: ImageSet = getattr(self, SETS[phase])
        return settings

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, tree: Any) -> Any:
        """A domain has the keys of ``data.domain`` that it does not set itself."""
        if not isinstance(tree, Mapping) or not all(
            isinstance(tree.get(key), Mapping) for key in ("domain", "domains")
        ):
            return tree
        shared = {key: value for key, value in tree["domain"].items() if key != "path"}
        domains = {
            name: {**shared, **own} if isinstance(own, Mapping) else own for name, own in tree["domains"].items()
        }
        return {**tree, "domains": domains}


class Backbone(Section):
    """The frozen network whose block activations are observed."""

    name: str = "resnet50"
    """A torchvision classification model, `timm:NAME`, or `efficientnet_lite0`."""
    weights: str = "DEFAULT"
    """`DEFAULT` (pretrained), `none` (random, seeded), or a .safetensors, .pt or .pth file."""
    blocks: list[str] = []
    """Glob patterns of the modules to observe; if empty, residual blocks are recognised by their classes' names."""
    compile: bool = Field(False, json_schema_extra=FREE)
    """Compile the backbone, and on CUDA the model (torch.compile): faster, slower start; needs a C++ compiler."""


class Model(Section):
    """The trajectories and the sequence model that learns them."""

    type: Annotated[str, AfterValidator(known_model)] = Field("autoencoder", json_schema_extra=_list_models)
    """The architecture: `autoencoder`, `vae`, `transformer`, or one registered by an installed package."""
    hidden_dim: Width = 512
    """Width of the hidden layers."""
    latent_dim: Width = 128
    """Width of the bottleneck that a whole trajectory is compressed to."""
    num_layers: Layers = 2
    """Hidden layers in the encoder, and the same number in the decoder; an autoencoder with 0 is linear."""
    num_heads: Width = 4
    """Attention heads (transformer); must divide hidden_dim."""
    dropout: Fraction = 0.0
    """Dropout in the hidden layers during training."""
    spatial_resolution: Resolution = 7
    """Grid cells per side: every block's feature map is pooled to this grid."""
    feature_dim: Width = 128
    """Channels that each block is projected to."""


class Trajectory(Section):
    """How block activations are reduced to `model.feature_dim` channels."""

    projection: Literal["pca", "random"] = "pca"
    """`pca` whitens along the principal components; `random` projects onto random orthonormal directions."""
    subcells: Subcells = 1
    """If n > 1, blocks at least n times finer than the grid are used twice: as n x n sub-cells and as their mean."""
    statistics_images: PositiveInt = 10000
    """Maximum number of images in each statistics or calibration pass."""


class Train(Section):
    """Optimization in Phase 1; Phase 2 shares all but the learning rate and the weight decay."""

    learning_rate: Rate = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Weight = 1e-4
    """Decoupled weight decay, on weight matrices only."""
    warmup_fraction: Fraction = 0.05
    """Share of the training over which the learning rate warms up; then it decays along a cosine."""
    max_grad_norm: Limit = 1.0
    """Maximum gradient norm (clipping)."""
    cell_fraction: Annotated[float, Field(gt=0, le=1), NUMBER] = 1.0
    """Share of each image's grid cells that a step trains on, redrawn every epoch; scoring uses all of them."""
    kl_weight: Weight = 1.0
    """Weight of the VAE's KL term; 1 is the evidence lower bound (ELBO)."""
    kl_warmup_fraction: Fraction = 0.2
    """Share of the training over which the KL weight rises from 0."""


class Lora(Section):
    """The low-rank adapter of Phase 2 (PEFT)."""

    rank: Width = 8
    """Rank of the update of each adapted matrix."""
    alpha: Rate = 16
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: list[str] | str = "all-linear"
    """`all-linear`, a list of module names (suffixes), or a regular expression."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilized LoRA)."""
    use_dora: bool = False
    """Adapt direction and magnitude separately (DoRA)."""
    learning_rate: Rate = 1e-3
    """Peak learning rate of AdamW in Phase 2."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay in Phase 2."""


class DomainAdaptation(Section):
    """Phase 2."""

    enabled: bool | None = Field(None, json_schema_extra=FREE)
    """Whether `run` goes on to Phase 2; null means: if data.domain.path or data.domains is set."""
    objective: Literal["reconstruction", "contrast"] = "reconstruction"
    """`reconstruction` as in Phase 1; `contrast` trains the score to separate drawn defects from clean cells."""
    lora: Lora = Lora()
    """The adapter."""


class Calibration(Section):
    """What is learned about clean images at the end of each phase."""

    holdout_fraction: Fraction = 0.1
    """Share of the images held out of training, for p-values and thresholds; at most `trajectory.statistics_images`."""


class Checkpoint(Section):
    """When the state of the training is saved."""

    every_steps: PositiveInt = Field(1000, json_schema_extra=FREE)
    """Optimizer steps between checkpoints."""
    every_minutes: Limit = Field(15.0, json_schema_extra=FREE)
    """Minutes between checkpoints, if that comes first."""
    keep: PositiveInt = Field(2, json_schema_extra=FREE)
    """How many of the newest checkpoints to keep."""


class Validation(Section):
    """Evaluation of the weights between epochs, on images that they were not trained on."""

    every_epochs: NaturalInt = 0
    """Epochs between validations (the last epoch is always validated); 0 turns it off. See docs/validation.md."""
    path: str | None = None
    """Labelled images (MVTec layout) to measure AUROC on; image AUROC then decides which weights are best."""
    keep: Literal["best", "last"] = "best"
    """Which weights the phase ends with: those of the best validation, or the last ones."""


class EarlyStopping(Section):
    """Ending a phase before its last epoch."""

    patience: NaturalInt = 0
    """Validations without improvement after which the phase ends; 0 turns it off."""


class Ema(Section):
    """A moving average of the weights."""

    decay: Fraction = 0.0
    """EMA decay per step, such as 0.999, rising to it; averaged weights are validated and saved. 0 turns it off."""


class Logging(Section):
    """What is logged during training."""

    every_steps: PositiveInt = Field(20, json_schema_extra=FREE)
    """Optimizer steps between lines of metrics.jsonl; losses stay on the device in between."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field([], json_schema_extra=FREE)
    """Experiment trackers: `tensorboard`, `wandb`, `trackio`, `mlflow`; each needs its extra. See docs/tracking.md."""


class Cache(Section):
    """Trajectories kept on disk, so that later epochs need no backbone."""

    dir: str | None = Field(None, json_schema_extra=FREE)
    """A folder, best on a local disk, for trajectories rounded to bfloat16; null recomputes them every epoch."""
    max_gib: Limit = Field(100.0, json_schema_extra=FREE)
    """Maximum size of one image set's trajectories in a folder, in GiB; images beyond it are recomputed."""


class Memory(Section):
    """Memory options."""

    images_per_pass: PositiveInt | None = Field(None, json_schema_extra=FREE)
    """Images per backbone pass; null: as many as keep its largest activation in 32-bit indices, on CPUs in 128 MiB."""
    empty_cache_every: NaturalInt = Field(0, json_schema_extra=FREE)
    """Steps between calls to the allocator's empty_cache; 0 never calls it (references are dropped either way)."""


class Runtime(Section):
    """The machine."""

    mixed_precision: Annotated[Literal["auto", "no", "bf16", "fp16"], BeforeValidator(_yaml_no)] = "auto"
    """`auto` takes Accelerate's setting, or else bf16 on CUDA; float32 where bf16 is emulated, and for fp16 on CPUs."""
    deterministic: bool = Field(False, json_schema_extra=FREE)
    """Use deterministic algorithms only (slower on CUDA)."""
    detect_anomaly: bool = Field(False, json_schema_extra=FREE)
    """Autograd names the operation that first produced a NaN gradient (slow)."""
    timeout_s: Annotated[float, Field(gt=0, le=1e7), NUMBER] = Field(1800.0, json_schema_extra=FREE)
    """Seconds after which a process waiting for a lost or hung peer gives up."""


class Config(Section):
    """Everything a run needs to know."""

    run_dir: str = Field("runs/default", json_schema_extra=FREE)
    """Where the run writes all its output."""
    phase1: str | None = Field(None, json_schema_extra=FREE)
    """A run directory (or its phase1 folder) whose Phase 1 `adapt` builds on; null means run_dir's own."""
    seed: Seed = 0
    """Determines the order of the images, the initial weights and all noise."""
    data: Data = Data()
    """Images."""
    backbone: Backbone = Backbone()
    """Frozen backbone."""
    trajectory: Trajectory = Trajectory()
    """Projection."""
    model: Model = Model()
    """Sequence model."""
    train: Train = Train()
    """Optimization."""
    domain_adaptation: DomainAdaptation = DomainAdaptation()
    """Phase 2."""
    calibration: Calibration = Calibration()
    """Calibration."""
    validation: Validation = Validation()
    """Validation."""
    early_stopping: EarlyStopping = EarlyStopping()
    """Early stopping."""
    ema: Ema = Ema()
    """Average of the weights."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    logging: Logging = Logging()
    """Logs."""
    cache: Cache = Cache()
    """Cache."""
    memory: Memory = Memory()
    """Memory."""
    runtime: Runtime = Runtime()
    """Machine."""

    @property
    def adapts(self) -> bool:
        """Whether `run` goes on to Phase 2: if `enabled` is unset, whether there is a domain."""
        enabled = self.domain_adaptation.enabled
        return bool(self.data.domain.path or self.data.domains) if enabled is None else enabled

    def contrasts(self, phase: int) -> bool:
        """Whether a phase trains on clean images and on copies with a drawn defect."""
        return phase == 2 and self.domain_adaptation.objective == "contrast"


def domain_config(config: Config, name: str) -> Config:
    """The complete config of one of several domains, whose run directory lies below that of ``config``."""
    data = config.data.model_copy(update={"domain": config.data.domains[name], "domains": {}})
    run_dir = str(Path(config.run_dir) / "domains" / name)
    return config.model_copy(update={"run_dir": run_dir, "phase1": config.run_dir, "data": data})
