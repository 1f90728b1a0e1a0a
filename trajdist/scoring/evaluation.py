"""``trajdist evaluate``: labelled images in MVTec layout -> the numbers that papers report.

The images are scored as by ``trajdist score``. Then the saved maps are compared with the masks: pixel scores go into
histograms, so memory does not grow with the images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial, reduce
from itertools import product
from operator import add
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from trajdist.data.labelled import GOOD, LabelledFolder, Truth
from trajdist.data.loader import in_threads
from trajdist.errors import DataError
from trajdist.files import write_json
from trajdist.runtime.progress import Progress
from trajdist.scoring.histogram import ScoreHistogram, histograms_of
from trajdist.scoring.job import Scoring
from trajdist.scoring.metrics import STRICT_LIMIT, TITLES, Curve, PixelScores, bootstrap_interval, curve
from trajdist.scoring.output import read_rows, scored_rows
from trajdist.scoring.report import Labels, defect_scores, report
from trajdist.scoring.score import SHOWN, map_of, score
from trajdist.screen import on_screen
from trajdist.sharding import Slots
from trajdist.tables import counted


def evaluate(job: Scoring, dataset: LabelledFolder) -> dict[str, Any]:
    """Score the labelled set of the job and compute the metrics; every process calls it.

    Returns:
        The metrics, also written to ``metrics.json``; empty on all processes but the main one.

    Raises:
        DataError: a mask cannot be read, or no good image could be scored.
    """
    score(job)
    pixels, unmarked = count_pixels(job, dataset)
    metrics: dict[str, Any] = {}
    job.processes.main_does(lambda: metrics.update(_conclude(job, dataset, pixels, unmarked)))
    return metrics


def count_pixels(job: Scoring, dataset: LabelledFolder) -> tuple[dict[str, PixelScores], list[int]]:
    """Count the pixel scores, over all processes, from the saved maps: a resumed scoring has not seen all images.

    Returns:
        The scores by kind, and the positions of defective images whose masks mark nothing.
    """
    pixels = {kind: PixelScores() for kind in dataset.kinds}
    unmarked: list[int] = []

    def truth_of(position: int) -> Truth:
        return dataset.truth(position, job.scorer.size, job.scorer.fit)

    def add_share(slots: Slots) -> None:
        maps_BHW = job.maps.read(slots.start, slots.stop)
        read = [slot for slot, cells_HW in enumerate(maps_BHW) if not np.isnan(cells_HW).all()]
        truths = in_threads(truth_of, [slots.start + slot for slot in read], job.drawing_threads)
        for slot, truth in zip(read, truths, strict=True):
            position, map_SS = slots.start + slot, torch.from_numpy(map_of(job, maps_BHW[slot]))
            pixels[dataset.kind(position)].update(map_SS, *truth)
            if dataset.has_mask(position) and not truth.regions_SS.any():
                unmarked.append(position)

    plan = job.plan(len(dataset))
    with Progress(job.console, "evaluating", plan.num_images) as progress:
        for step in plan.steps():
            slots = plan.micro_batch(step, 0, job.processes.rank)
            job.processes.all_do(partial(add_share, slots))
            progress.advance(step.stop)
    for scores in pixels.values():
        scores.all_reduce(job.processes.sum_from_host)
    return pixels, sorted(job.processes.gather(unmarked))


def _conclude(
    job: Scoring, dataset: LabelledFolder, pixels: dict[str, PixelScores], unmarked: list[int]
) -> dict[str, Any]:
    """Measure and write ``metrics.json`` and the report."""
    if unmarked:
        named = ", ".join(on_screen(dataset.name(position)) for position in unmarked[:SHOWN])
        more = ", ..." if len(unmarked) > SHOWN else ""
        job.console.print(
            f"{counted(len(unmarked), 'defective image')} with a mask that marks nothing in what is scored ({named}"
            f"{more}): all their pixels count as clean"
        )
    images, alarms, unreadable = count_images(job, dataset)
    metrics = measure(images, alarms, pixels) | {
        "num_unreadable": unreadable,
        "num_unmarked": len(unmarked),
        # JSON has no infinity.
        "threshold": job.thresholds[0] if math.isfinite(job.thresholds[0]) else None,
        "requested_false_alarm_rate": job.rates[0],
    }
    names = [detector.name for detector in job.scorer.detectors]
    if len(names) > 1:
        metrics["adapters"] = compare_adapters(names, job, dataset)
    write_json(job.out / "metrics.json", metrics)
    report(job, Labels(dataset, metrics, images, pixels))
    return metrics


def count_images(job: Scoring, dataset: LabelledFolder) -> tuple[dict[str, ScoreHistogram], dict[str, int], int]:
    """Scores and alarms by kind, and how many images could not be read, from scores.jsonl."""
    alarms, unreadable = dict.fromkeys(dataset.kinds, 0), 0

    def scores() -> Iterator[tuple[str, float]]:
        nonlocal unreadable
        for position, row in enumerate(read_rows(job.out)):
            if row["score"] is None:
                unreadable += 1
                continue
            kind = dataset.kind(position)
            alarms[kind] += row["is_anomalous"]
            yield kind, row["score"]

    images = histograms_of(dataset.kinds, scores())
    return images, alarms, unreadable


def compare_adapters(names: list[str], job: Scoring, dataset: LabelledFolder) -> dict[str, dict[str, Any]]:
    """Image metrics of each adapter, and for how many images it is the best-fitting one, from scores.jsonl."""
    num_best = dict.fromkeys(names, 0)

    def scores() -> Iterator[tuple[tuple[str, bool], float]]:
        for position, row in scored_rows(job.out):
            num_best[row["best_adapter"]] += 1
            is_good = dataset.kind(position) == GOOD
            yield from (((name, is_good), found["score"]) for name, found in row["adapters"].items())

    counts = histograms_of(product(names, (True, False)), scores())
    return {
        name: _measure_images(curve(counts[name, False], counts[name, True])) | {"num_best": num_best[name]}
        for name in names
    }


def measure(
    images: dict[str, ScoreHistogram], alarms: dict[str, int], pixels: dict[str, PixelScores]
) -> dict[str, Any]:
    """All metrics, over all images and for every kind of defect against the good images.

    Raises:
        DataError: no good image could be scored.
    """
    counts = {kind: int(histogram.counts_K.sum()) for kind, histogram in images.items()}
    if not counts[GOOD]:
        raise DataError("none of the good images could be scored: see the errors in scores.jsonl.")
    defects = [kind for kind in images if kind != GOOD]
    num_defective = sum(counts[kind] for kind in defects)
    per_defect = {
        kind: _measure_kind(curve(images[kind], images[GOOD]), pixels[kind] + pixels[GOOD])
        | {"num_images": counts[kind], "num_detected": alarms[kind]}
        for kind in defects
    }
    overall = curve(defect_scores(images), images[GOOD])
    return {
        **_measure_kind(overall, reduce(add, pixels.values())),
        "image_auroc_interval": bootstrap_interval(overall, Curve.area),
        "image_ap_interval": bootstrap_interval(overall, Curve.average_precision),
        "num_images": sum(counts.values()),
        "num_good": counts[GOOD],
        "false_alarm_rate": alarms[GOOD] / counts[GOOD],
        "detection_rate": sum(alarms[kind] for kind in defects) / num_defective if num_defective else None,
        "defects": per_defect,
    }


def _measure_images(images: Curve) -> dict[str, Any]:
    return {
        "image_auroc": images.area(),
        "image_ap": images.average_precision(),
        "image_f1_max": images.best_f1(),
    }


def _measure_kind(images: Curve, pixels: PixelScores) -> dict[str, Any]:
    pixel_curve = pixels.curve()
    return _measure_images(images) | {
        "pixel_auroc": pixel_curve.area(),
        "pixel_ap": pixel_curve.average_precision(),
        "pixel_f1_max": pixel_curve.best_f1(),
        "aupro": pixels.aupro(),
        "aupro_05": pixels.aupro(STRICT_LIMIT),
        "binning_error": max(images.tied_share, pixel_curve.tied_share) / 2,
    }


def metrics_table(metrics: dict[str, Any]) -> Table:
    """Overall, per kind of defect and, if several were compared, per adapter."""
    # Without vertical rules it fits 60 columns; in a narrower terminal names are folded, and numbers stay whole.
    kinds = metrics["defects"]
    detected, count = (sum(kind[key] for kind in kinds.values()) for key in ("num_detected", "num_images"))
    title = _told(metrics, detected, count)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("", overflow="fold")
    for column in ("found", *(key.replace("_", "\n", 1).replace("_", " ") for key in TITLES)):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")

    def add(name: str, found: str, values: dict[str, Any]) -> None:
        table.add_row(name, found, *("-" if values.get(key) is None else f"{values[key]:.3f}" for key in TITLES))

    add("all", f"{detected} of {count}", metrics)
    for name, values in kinds.items():
        add(name, f"{values['num_detected']} of {values['num_images']}", values)
    if adapters := metrics.get("adapters", {}):
        table.add_section()
    for name, values in adapters.items():
        add(f"adapter {name}", f"best for {values['num_best']}", values)
    if metrics["aupro"] is None:
        table.caption = "no mask (ground_truth/<defect>/<name>_mask.png) marks a pixel: there are no pixel metrics"
    return table


def _told(metrics: dict[str, Any], detected: int, count: int) -> str:
    """The decisions in one line: ``detected`` of ``count`` defects, and the false alarms."""
    alarms = round(metrics["false_alarm_rate"] * metrics["num_good"])
    failed = f", {metrics['num_unreadable']} unreadable" if metrics["num_unreadable"] else ""
    of_good = f"{counted(alarms, 'false alarm')} in {counted(metrics['num_good'], 'good image')}"
    return f"{detected} of {counted(count, 'defect')} found, {of_good}{failed}"
