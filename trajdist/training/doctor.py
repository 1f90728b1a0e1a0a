"""Advises which setting to change: for more speed, from where a run's time went, and for less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trajdist.config import SETS, Config

# The first steps start workers, fill caches and compile, so the timings of a shorter phase are not representative.
ENOUGH_STEPS = 20
# A process is a straggler if it waits for data longer than the fastest one does by this fraction of the phase.
STRAGGLES = 0.10
# The device waits for the host if it had nothing left to do before this fraction of the batches.
STARVES = 0.8


@dataclass(frozen=True)
class Facts:
    """The measurements and settings that the diagnosis is based on.

    Attributes:
        seconds: duration of the whole phase, on the main process.
        steps: optimizer steps of the phase.
        time: seconds per stage, as :class:`trajdist.runtime.clock.Clock` splits them.
        waits: seconds that each process waited for its images, by rank.
        workers: decoding processes per training process.
        threads: decoding threads inside the training process; workers would replace them, not add to them.
        processors: number that one process may use.
        overlapping: the backbone runs concurrently with the model (CUDA), so the stages may add up to more than
            ``seconds``.
        compiled: whether the backbone is compiled.
        cacheable: whether setting cache.dir would speed up later epochs.
        half_precision: whether mixed precision is on.
        all_places: every place is trained on, so that lowering train.cell_fraction would help.
        idle_share: as in :class:`trajdist.runtime.clock.Clock`.
    """

    seconds: float
    steps: int
    time: Mapping[str, float]
    waits: Sequence[float]
    workers: int
    threads: int
    processors: int
    overlapping: bool
    compiled: bool
    cacheable: bool
    half_precision: bool
    all_places: bool
    idle_share: float


def split(time: Mapping[str, float], seconds: float) -> dict[str, float]:
    """The stages plus ``other``, the rest of ``seconds``; 0 if overlapping stages leave nothing."""
    return {**time, "other": max(0.0, seconds - sum(time.values()))}


def shares(facts: Facts) -> dict[str, float]:
    """Each stage's fraction of the phase. Waiting for data counts only if the device was idle meanwhile."""
    found = dict(split(facts.time, facts.seconds))
    if facts.overlapping:
        ahead = found["transfer"] + found["backbone"] + found["projection"]
        behind = found["model"] + found["sync"] + found["optimizer"]
        found["data"] = min(found["data"], max(0.0, facts.seconds - max(ahead, behind)))
    return {stage: value / max(facts.seconds, 1e-9) for stage, value in found.items()}


def diagnose(facts: Facts) -> str:
    """One sentence: the bottleneck and what to change.

    Stragglers come first, then the most expensive avoidable stage, then the model and the backbone themselves.
    """
    if facts.steps < ENOUGH_STEPS:
        return f"too short to say what bounds it: {facts.steps} steps, {ENOUGH_STEPS} are needed."
    if not any(facts.time.values()):
        return "not measured: it was resumed after its last step."
    share = shares(facts)
    behind = max(facts.waits) - min(facts.waits)
    if behind > STRAGGLES * facts.seconds:
        slowest = list(facts.waits).index(max(facts.waits))
        return (
            f"bound by one process: number {slowest} waits {behind:.0f} s longer for its images than the quickest, and "
            "the others wait for it: look at its machine's disk and processors, or raise data.num_workers."
        )
    avoidable = [stage for stage, (limit, _, _) in AVOIDABLE.items() if share[stage] > limit]
    starved = facts.idle_share > STARVES
    if starved:
        avoidable = [stage for stage in avoidable if stage in CLOSER_REASONS]
    if avoidable:
        stage = max(avoidable, key=lambda name: share[name])
        _, what, advise = AVOIDABLE[stage]
        return f"bound by {what} ({share[stage]:.0%} of the time): {advise(facts)}."
    if starved:
        return (
            "bound by the host, which launches kernels more slowly than the device runs them "
            f"({facts.idle_share:.0%} of the batches found it idle): {_larger_launches(facts)}."
        )
    frozen = share["backbone"] + share["projection"]
    if share["model"] > frozen:
        return f"bound by the trained model ({share['model']:.0%} of the time): {_lighter_model(facts)}."
    return f"at its limit, the backbone's forward ({frozen:.0%} of the time): {_lighter_backbone(facts)}."


def _more_data(facts: Facts) -> str:
    if facts.workers < facts.processors - 1 and not facts.threads:
        return f"raise data.num_workers (now {facts.workers}, {facts.processors} processors per process){_keep(facts)}"
    return (
        f"the {facts.processors} processors per process are all used: ask for more of them, or store the images no "
        f"larger than data.image_size needs{_keep(facts)}"
    )


def _keep(facts: Facts) -> str:
    return ", or set cache.dir: later epochs read no images" if facts.cacheable else ""


def _lighter_backbone(facts: Facts) -> str:
    ways = [] if facts.compiled else ["backbone.compile=true"]
    if facts.cacheable:
        ways.append("cache.dir=DIR (epochs from the second on do without it)")
    if facts.overlapping and not facts.half_precision:
        ways.append("runtime.mixed_precision=bf16")
    if not ways:
        return "only more processes make it faster"
    return f"{' and '.join(ways)} {'makes' if len(ways) == 1 else 'make'} it faster"


def _larger_launches(facts: Facts) -> str:
    return "raise batch_size" + ("" if facts.compiled else ", or set backbone.compile=true")


def _lighter_model(facts: Facts) -> str:
    if facts.all_places:
        return "train.cell_fraction=0.25 trains on a quarter of the places of each image"
    return "a smaller model.hidden_dim, from Phase 1 on, makes it faster"


Rule = tuple[float, str, Callable[[Facts], str]]

# Stage: the fraction of the time above which it is worth a change of settings, its name, and the advice.
AVOIDABLE: dict[str, Rule] = {
    "data": (0.20, "waiting for images", _more_data),
    "transfer": (0.20, "copying images to the device", lambda _: "lower data.image_size"),
    "projection": (0.25, "the projection", lambda _: "lower model.feature_dim, or set backbone.compile=true"),
    "sync": (
        0.20,
        "processes waiting for each other",
        lambda _: "raise batch_size or gradient_accumulation_steps, so that they meet less often",
    ),
    "optimizer": (0.25, "the optimizer", lambda _: "raise batch_size or gradient_accumulation_steps"),
    "validation": (0.20, "validation", lambda _: "raise validation.every_epochs"),
    "checkpoint": (0.10, "writing checkpoints", lambda _: "raise checkpoint.every_steps and checkpoint.every_minutes"),
    "other": (0.30, "what comes between the steps", lambda _: "raise batch_size and logging.every_steps"),
}

# The stages that say more closely why a device is idle.
CLOSER_REASONS = ("data", "sync", "validation", "checkpoint", "other")


def smaller(config: Config, phase: int, device_type: str) -> str:
    """How to reduce the memory of a phase on such a device, as the end of a sentence."""
    key, batch_size = f"data.{SETS[phase]}", config.data.of_phase(phase).batch_size
    # On CPUs the default is less than the batch, by an amount that is not known here.
    in_a_pass = config.memory.images_per_pass or (1 if device_type == "cpu" else batch_size)
    fixes = []
    if in_a_pass > 1:
        fixes.append(f"set memory.images_per_pass={in_a_pass // 2} or less and run the same command again")
    if device_type == "cpu":
        fixes.append("lower data.num_workers and run the same command again")
    if batch_size > 1:
        fixes.append(
            f"start a new run with a smaller {key}.batch_size and {key}.gradient_accumulation_steps raised to match"
        )
    chosen = ", or ".join(fixes or ["start a new run with a smaller backbone or data.image_size"])
    return f"{chosen} (trajdist plan --memory finds what fits)"
