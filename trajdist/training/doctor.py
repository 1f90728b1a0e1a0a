"""What bounds a run, and which setting to change: one sentence from where its time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# The first steps start workers, fill caches and compile: a phase of fewer says little.
ENOUGH_STEPS = 20
# A process that waits this many seconds more of each second for its data than the quickest one holds the others up.
STRAGGLES = 0.10


@dataclass(frozen=True)
class Facts:
    """What the sentence is made from.

    Attributes:
        seconds: of the whole phase, on the main process.
        time: seconds per stage, as :class:`trajdist.runtime.clock.Clock` splits them.
        waits: seconds that each process waited for its images.
        threads: of the process itself that read; a worker beside them would take their place.
        processors: that one process may use.
        overlapping: the backbone runs beside the model (CUDA), so the stages' sum may exceed ``seconds``.
        cacheable: whether setting cache.dir would serve later epochs.
        all_places: whether a smaller train.cell_fraction than 1 would serve.
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


def split(time: Mapping[str, float], seconds: float) -> dict[str, float]:
    """The stages and ``other``, which is the rest of ``seconds``; 0 where stages that overlap leave none."""
    return {**time, "other": max(0.0, seconds - sum(time.values()))}


def shares(facts: Facts) -> dict[str, float]:
    """Every stage's share of the phase. Waiting for data counts where the device was idle meanwhile."""
    found = dict(split(facts.time, facts.seconds))
    if facts.overlapping:
        ahead = found["transfer"] + found["backbone"] + found["projection"]
        behind = found["model"] + found["sync"] + found["optimizer"]
        found["data"] = min(found["data"], max(0.0, facts.seconds - max(ahead, behind)))
    return {stage: value / max(facts.seconds, 1e-9) for stage, value in found.items()}


def diagnose(facts: Facts) -> str:
    """One sentence: what bounds the run and what to change, the costliest avoidable thing first."""
    if facts.steps < ENOUGH_STEPS:
        return f"too short to say what bounds it: {facts.steps} steps, {ENOUGH_STEPS} are needed."
    share = shares(facts)
    behind = max(facts.waits) - min(facts.waits)
    if behind > STRAGGLES * facts.seconds:
        slowest = list(facts.waits).index(max(facts.waits))
        return (
            f"bound by one process: number {slowest} waits {behind:.0f} s longer for its images than the quickest, and "
            "the others wait for it: look at its machine's disk and processors, or raise data.num_workers."
        )
    avoidable = [stage for stage, (limit, _, _) in AVOIDABLE.items() if share[stage] > limit]
    if avoidable:
        stage = max(avoidable, key=lambda name: share[name])
        _, what, advise = AVOIDABLE[stage]
        return f"bound by {what} ({share[stage]:.0%} of the time): {advise(facts)}."
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
    return f"{' and '.join(ways)} make it faster" if ways else "only more processes are faster"


def _lighter_model(facts: Facts) -> str:
    if facts.all_places:
        return "train.cell_fraction=0.25 trains on a quarter of the places of each image"
    return "a smaller model.hidden_dim, from Phase 1 on, makes it faster"


Rule = tuple[float, str, Callable[[Facts], str]]

# Stage: the share of the time from which on it is worth a change of settings, what to call it, and the change.
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
    "checkpoint": (0.10, "writing checkpoints", lambda _: "raise checkpoint.every_steps and checkpoint.every_minutes"),
    "other": (0.30, "what comes between the steps", lambda _: "raise batch_size and logging.every_steps"),
}
