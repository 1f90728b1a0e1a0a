"""A dry run: how much memory, disk and time a config will need, before anything is queued. Trains nothing.

Bytes are counted on tensors without data (``footprint``), rates are measured for a few seconds (``probe``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from trajdist import launcher
from trajdist.config import SETS, Config, domain_config
from trajdist.data.base import ImageSource
from trajdist.data.loader import resolve_workers
from trajdist.data.trajectory_cache import TrajectoryCache
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.files import GIB
from trajdist.planning import probe
from trajdist.planning.budget import FLOAT, Budget, measure_bases, saved_copies
from trajdist.planning.footprint import Rehearsal, build_modules
from trajdist.planning.probe import Rates
from trajdist.runtime.processes import device_type, supported_precision
from trajdist.sharding import Plan, Selection
from trajdist.tables import Cells, counted, format_seconds, phase_table
from trajdist.training.selection import draw_selection, training_plan
from trajdist.training.session import naming

# Batches that each loader worker has ready or in progress.
BATCHES_IN_STOCK = 2
# Bytes per record in metrics.jsonl and in ledger.jsonl, per tensor entry in a file, and of a checkpoint's JSON files.
METRIC_BYTES, LEDGER_BYTES, ENTRY_BYTES, STATE_BYTES = 350, 160, 100, 3000


@dataclass(frozen=True)
class Options:
    """What to plan for.

    Attributes:
        memory_bytes: of the device, to find the largest batch size; None skips the search.
        processes: in the whole job; None takes the launcher's number.
        device: ``cpu`` or ``cuda``; None takes what a run would use here.
        images_per_s: training rate of one process; None measures it.
        measure: whether to measure rates.
    """

    memory_bytes: int | None = None
    processes: int | None = None
    device: str | None = None
    images_per_s: float | None = None
    measure: bool = True


def make_plan(
    config: Config, sources: dict[str, ImageSource], phases: Sequence[int], options: Options
) -> dict[str, Any]:
    """Plan the phases: ``{"phase1": {...}, "phase2": {...}}``, ready for JSON.

    Raises:
        UserError: what the run itself would raise about the config, the backbone or the images.
    """
    device = options.device or default_device()
    # On an accelerator the figure is that of torch's allocator, which excludes Python and its libraries.
    bases = measure_bases(config, sorted(phases)) if device == "cpu" else dict.fromkeys(sorted(phases), 0)
    plans = {}
    for phase, base_bytes in bases.items():
        trainings = _planned(config, sources, phase)
        plans[f"phase{phase}"] = _plan_phase(config, trainings, phase, options, base_bytes)
    return plans


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a phase: that of one domain if there are several, else the only one."""

    name: str
    config: Config
    source: ImageSource
    selection: Selection


def _planned(config: Config, sources: dict[str, ImageSource], phase: int) -> list[PlannedTraining]:
    """All trainings that a phase runs at once."""
    own = {"": (config, SETS[phase])}
    if phase == 2 and config.data.domains:
        own = {name: (domain_config(config, name), f"domains.{name}") for name in config.data.domains}
    trainings = []
    for name, (settings, set_name) in own.items():
        source = sources[set_name]
        with naming(name):
            selection = draw_selection(settings, phase, source, settings.trajectory.statistics_images)
        trainings.append(PlannedTraining(name, settings, source, selection))
    return trainings


def _plan_phase(
    config: Config, trainings: list[PlannedTraining], phase: int, options: Options, base_bytes: int
) -> dict[str, Any]:
    device = options.device or default_device()
    world = options.processes or launcher.world()
    walks = [training_plan(training.config, training.selection, world, world) for training in trainings]
    # The training with the largest batch leads: the others' batches share its pass through the backbone.
    number = max(range(len(walks)), key=lambda each: walks[each].slots)
    lead, walk = trainings[number], walks[number]
    local_world = launcher.local_world(world)
    workers = resolve_workers(config.data.num_workers, local_world, device)
    mixed_precision = supported_precision(config.runtime.mixed_precision, device)

    modules = build_modules(config, phase)
    rates = Rates(training=options.images_per_s)
    if options.measure and options.images_per_s is None:
        rates = probe.measure(lead.config, lead.source, lead.selection, modules, device, mixed_precision, workers)
    modules.extractor.choose_pass_size(device, config.memory.images_per_pass)
    rehearsal = Rehearsal(
        lead.config,
        phase,
        modules,
        precision=mixed_precision,
        micro_batches=max(each.micro_batches for each in walks),
        shared_gradients=world > 1,
        domains=len(walks),
        beside=sum(each.slots for each in walks) / walk.slots - 1,
    )
    saves_between = any(each.total_steps > config.checkpoint.every_steps for each in walks)
    budget = Budget(rehearsal, base_bytes, device, saves_between)
    cache = _cache(config, trainings, modules.extractor)
    peaks = rehearsal.peaks(walk.slots)
    return {
        "device": device,
        "precision": mixed_precision,
        "num_processes": world,
        "num_workers": workers,
        **_extent(trainings, walks),
        "parameters": {
            "backbone": rehearsal.sizes.backbone_parameters,
            "model": rehearsal.sizes.model_parameters,
            "trainable": rehearsal.sizes.trained_parameters,
        },
        "parts": budget.parts(peaks),
        "peak_memory_bytes": budget.training(peaks),
        "statistics_peak_bytes": budget.statistics(peaks),
        "calibration_peak_bytes": budget.calibration(peaks),
        "required_memory_bytes": budget.required(peaks),
        "loader_bytes": workers * BATCHES_IN_STOCK * peaks.images_bytes,
        "memory_bytes": options.memory_bytes,
        "largest_batch_size": budget.largest_batch(walk.slots, options.memory_bytes),
        **_disk(config, rehearsal, walks, phase),
        "cached_images": cache.images,
        "cache_bytes": cache.size,
        **_time(config, trainings, walks, rates, workers, device, cache),
    }


def _extent(trainings: list[PlannedTraining], walks: list[Plan]) -> dict[str, Any]:
    """Images and steps; for several domains, the sum of the images and the steps of the longest."""
    longest = max(walks, key=lambda walk: walk.total_steps)
    domains = {
        training.name: {"images": walk.num_images, "steps": walk.total_steps, "epochs": walk.num_epochs}
        for training, walk in zip(trainings, walks, strict=True)
    }
    return {
        "images": sum(walk.num_images for walk in walks),
        "held_out_images": sum(training.selection.num_holdout for training in trainings),
        "batch_size": max(walk.slots for walk in walks),
        "global_batch": sum(walk.global_batch for walk in walks),
        "micro_batches": max(walk.micro_batches for walk in walks),
        "steps_per_epoch": longest.steps_per_epoch,
        "steps": longest.total_steps,
        "epochs": longest.num_epochs,
        **({"domains": domains} if len(domains) > 1 else {}),
    }


def default_device() -> str:
    """The device that a run would use on this machine; accelerators other than CUDA are planned as a CPU."""
    return "cuda" if device_type() == "cuda" else "cpu"


def _disk(config: Config, rehearsal: Rehearsal, walks: list[Plan], phase: int) -> dict[str, int]:
    """Bytes of a checkpoint (of all domains together), and the most disk space that the phase takes up."""
    sizes = rehearsal.sizes
    weights = FLOAT * sizes.trained_parameters
    copies = saved_copies(config)
    # AdamW's step count is an entry of its own.
    checkpoint = copies * weights + (copies + 1) * ENTRY_BYTES * sizes.trained_tensors + STATE_BYTES * len(walks)
    entries, places = sum(rehearsal.widths), config.model.spatial_resolution**2
    calibration = FLOAT * entries * (entries + places)
    adopted = sizes.model_bytes + len(walks) * (sizes.projection_bytes + calibration) if len(walks) > 1 else 0
    artifacts = (sizes.model_bytes + sizes.projection_bytes if phase == 1 else weights) + len(walks) * calibration
    lines = sum(walk.total_steps // config.logging.every_steps + 2 * walk.num_epochs for walk in walks)
    # A new checkpoint is complete before the oldest one is deleted.
    saved = max(
        min(config.checkpoint.keep + 1, 2 + walk.total_steps // config.checkpoint.every_steps) for walk in walks
    )
    disk = saved * checkpoint + artifacts + adopted + lines * (METRIC_BYTES + LEDGER_BYTES)
    return {"checkpoint_bytes": checkpoint, "disk_bytes": disk}


class _Cache(NamedTuple):
    """What ``cache.dir`` will hold: images, their bytes, and how many images of the later epochs are read from it."""

    images: int
    size: int
    reads: int


def _cache(config: Config, trainings: list[PlannedTraining], extractor: TrajectoryExtractor) -> _Cache:
    images, size, reads = 0, 0, 0
    for training in trainings:
        # Contrast draws defects into the images themselves.
        if config.cache.dir is None or training.config.contrasts(training.selection.phase):
            continue
        shape = (extractor.resolution**2, *extractor.projection.valid_LD.shape)
        cache = TrajectoryCache(Path(config.cache.dir), {}, len(training.source), shape)
        kept = min(training.selection.num_train, cache.capacity(config.cache.max_gib))
        images, size = images + kept, size + kept * cache.stride
        reads += kept * (training.config.data.of_phase(training.selection.phase).num_epochs - 1)
    return _Cache(images, size, reads)


def _time(
    config: Config,
    trainings: list[PlannedTraining],
    walks: list[Plan],
    rates: Rates,
    workers: int,
    device: str,
    cache: _Cache,
) -> dict[str, Any]:
    """Rates of one process and of the job, in images/s, the job's hours, and its bottleneck."""
    rate, bottleneck = rates.of_training(workers)
    world = walks[0].world
    epoch, images = sum(walk.num_images for walk in walks), sum(walk.total_images for walk in walks)
    # The passes compute no gradients, but take all places: they are about as fast as training.
    passes = sum(_passes(config, training.selection) for training in trainings)
    hours_per_image = 1 / (rate * world) / 3600 if rate else None
    # A cached image costs only the model's time; if only the total rate is known, as much as any other.
    saved = cache.reads * (1 - rate / rates.model) if rate and rates.model else 0.0
    return {
        "decoded_images_per_s": rates.decode,
        "backbone_images_per_s": rates.backbone,
        "model_images_per_s": rates.model,
        "images_per_s": rate * world if rate else None,
        "hours_per_epoch": epoch * hours_per_image if hours_per_image else None,
        "hours": (images + passes - saved) * hours_per_image if hours_per_image else None,
        "bottleneck": bottleneck,
        "advice": advice(bottleneck, workers, device),
    }


def _passes(config: Config, selection: Selection) -> int:
    """Images in passes without training: residuals, places and calibration.

    Before Phase 1 also the statistics; before contrast also the residuals of the base model, once for all restarts.
    """
    sample = min(selection.num_train, config.trajectory.statistics_images)
    held_out = selection.num_holdout or sample
    return (3 if selection.phase == 1 or config.contrasts(selection.phase) else 2) * sample + held_out


def advice(bottleneck: str, workers: int, device: str) -> str:
    """The bottleneck as a sentence, with a remedy."""
    more = "raise data.num_workers, or shrink the files" if workers else "shrink the files, or ask for more processors"
    return {
        "decode": f"decoding by {counted(workers, 'worker') + ' per' if workers else 'the'} process is slowest: {more}",
        "backbone": f"the backbone on the {device} is slowest: more processes, a smaller backbone or data.image_size",
        "model": "the sequence model is slowest: a smaller model.hidden_dim or model.spatial_resolution",
        "given": "the rate was given, not measured",
        "unknown": f"there is no {device} here to measure: give --images-per-second to estimate the hours",
        "unmeasured": "no speed was measured",
    }[bottleneck]


def plan_table(plans: dict[str, dict[str, Any]]) -> Table:
    """The plan as a table, one column per phase."""
    return phase_table("plan", _ROWS, plans)


def _size(count: int) -> str:
    """``1.20 GiB``, ``34.5 MiB``; empty for 0."""
    if not count:
        return ""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _rate(images_per_s: float | None) -> str:
    return f"{images_per_s:,.1f} images/s" if images_per_s else ""


def _hours(hours: float | None) -> str:
    return format_seconds(3600 * hours) if hours is not None else "unknown"


def _largest(plan: dict[str, Any]) -> str:
    size = plan["largest_batch_size"]
    if size is None:
        return ""
    return f"{size:,}" if size else f"none: one image takes more than {_size(plan['memory_bytes'])}"


_PARTS = {
    "base_bytes": "Python and libraries",
    "backbone_bytes": "backbone",
    "projection_bytes": "projection",
    "images_bytes": "images",
    "activations_bytes": "backbone's activations",
    "trajectories_bytes": "trajectories",
    "model_bytes": "model",
    "model_activations_bytes": "model's activations",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "kept_bytes": "average, best and validated",
    "saving_bytes": "writing a checkpoint",
    "statistics_bytes": "statistics",
    "calibration_bytes": "calibration",
}


def _workers(plan: dict[str, Any]) -> str:
    return counted(plan["num_workers"], "worker") if plan["num_workers"] else "no workers"


def _part(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda plan: _size(plan["parts"][name])


_ROWS: Cells = {
    "images": lambda p: f"{p['images']:,} (and {p['held_out_images']:,} held out)",
    "processes": lambda p: f"{p['num_processes']} on {p['device']}, {_workers(p)} each",
    "precision": lambda p: "float32" if p["precision"] == "no" else p["precision"],
    "images per step": lambda p: (
        f"{p['global_batch']:,} ({counted(p['micro_batches'], 'micro-batch', 'micro-batches')})"
    ),
    "steps": lambda p: f"{p['steps']:,} ({counted(p['epochs'], 'epoch')} x {p['steps_per_epoch']:,})",
    "weights": lambda p: f"{p['parameters']['trainable']:,} trained of {p['parameters']['model']:,}",
    "backbone's weights": lambda p: f"{p['parameters']['backbone']:,}",
    **{f"  {title}": _part(name) for name, title in _PARTS.items()},
    "peak while training": lambda p: _size(p["peak_memory_bytes"]),
    "peak of statistics": lambda p: _size(p["statistics_peak_bytes"]),
    "peak of calibration": lambda p: _size(p["calibration_peak_bytes"]),
    "memory needed": lambda p: _size(p["required_memory_bytes"]),
    "largest batch_size": _largest,
    "workers' batches": lambda p: _size(p["loader_bytes"]),
    "checkpoint": lambda p: _size(p["checkpoint_bytes"]),
    "disk": lambda p: _size(p["disk_bytes"]),
    "cache": lambda p: _size(p["cache_bytes"]),
    "decoding, per reader": lambda p: _rate(p["decoded_images_per_s"]),
    "backbone, per process": lambda p: _rate(p["backbone_images_per_s"]),
    "model, per process": lambda p: _rate(p["model_images_per_s"]),
    "all processes": lambda p: _rate(p["images_per_s"]),
    "time per epoch": lambda p: _hours(p["hours_per_epoch"]),
    "time in all": lambda p: _hours(p["hours"]),
    "bottleneck": lambda p: p["bottleneck"] if p["bottleneck"] in ("decode", "backbone", "model") else "",
}
