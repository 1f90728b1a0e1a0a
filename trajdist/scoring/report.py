"""Collects what goes into the ``report.html`` of a finished scoring."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trajdist.data.labelled import GOOD, LabelledFolder
from trajdist.data.loader import SlotDataset
from trajdist.saved import bundle
from trajdist.saved.rundir import RunDir
from trajdist.scoring import pictures
from trajdist.scoring.histogram import ScoreHistogram, histograms_of, plot_bins
from trajdist.scoring.job import Scoring
from trajdist.scoring.metrics import TITLES, PixelScores, curve
from trajdist.scoring.output import Placed, Row, least_anomalous, most_anomalous, scored_rows, unreadable
from trajdist.scoring.page import (
    CurvePair,
    DefectKind,
    ImageRow,
    MapScale,
    Metric,
    Picture,
    ReportData,
    ScoreBars,
    write_report,
)
from trajdist.scoring.score import Scored, map_of, score_batch
from trajdist.sharding import Slots, picked

TABLE_ROWS, GALLERY, UNREADABLE = 10_000, 12, 100


@dataclass(frozen=True)
class Labels:
    """What is additionally known about a labelled set."""

    dataset: LabelledFolder
    metrics: dict[str, Any]
    images: dict[str, ScoreHistogram]
    pixels: dict[str, PixelScores]


def report(job: Scoring, labels: Labels | None = None) -> None:
    """Write ``report.html`` of a finished scoring; the main process calls it."""
    top = most_anomalous(scored_rows(job.out), TABLE_ROWS)
    gallery = top[:GALLERY]
    bottom = calmest_besides(gallery, job.out)
    wrong = mistakes(job.out, labels.dataset) if labels and np.isfinite(job.thresholds[0]) else []
    scored = _score_again(job, [position for position, _ in (*gallery, *bottom, *wrong)])
    several = len(job.scorer.detectors) > 1

    def drawn(items: list[Placed]) -> list[Picture]:
        return [_picture(job, scored[position], row, labels) for position, row in items if position in scored]

    failed, num_failed = unreadable(job.out, UNREADABLE)
    data = ReportData(
        title=_title(job),
        summary=_summary(job),
        rows=[_image_row(position, row, labels) for position, row in top],
        num_images=len(job.source) - num_failed,
        threshold=job.thresholds[0],
        false_alarm_rate=job.rates[0],
        score_bars=_bars(job, labels),
        metrics=_cards(labels.metrics) if labels else (),
        defects=_defects(labels.metrics) if labels else (),
        curves=_curves(labels) if labels else (),
        blocks=job.step_names,
        map_scale=MapScale(*job.map_range, pictures.COLOURS),
        mistakes=drawn(wrong),
        most_anomalous=drawn(gallery),
        least_anomalous=drawn(bottom),
        best_adapters=[row["best_adapter"] for _, row in top] if several else [],
        unreadable=[(row["image"], row["error"]) for row in failed],
        num_unreadable=num_failed,
    )
    write_report(job.out / "report.html", data)


def _title(job: Scoring) -> str:
    # The run may be the current folder, whose path has no name.
    return f"{os.path.basename(os.path.abspath(RunDir(job.run_dir).path))}: {job.images_title}"


def mistakes(out: Path, dataset: LabelledFolder) -> list[Placed]:
    """Missed defects, lowest scores first, and false alarms, highest first: half of a gallery each, if there are."""

    def wrong(called: bool) -> Iterator[Placed]:
        return (it for it in scored_rows(out) if it[1]["is_anomalous"] == called == (dataset.kind(it[0]) == GOOD))

    missed, alarms = least_anomalous(wrong(False), GALLERY), most_anomalous(wrong(True), GALLERY)
    alarms = alarms[: max(GALLERY // 2, GALLERY - len(missed))]
    return missed[: GALLERY - len(alarms)] + alarms


def calmest_besides(gallery: list[Placed], out: Path) -> list[Placed]:
    """The least anomalous images that are not in ``gallery``, so that no image is shown twice."""
    shown = {position for position, _ in gallery}
    others = [item for item in least_anomalous(scored_rows(out), GALLERY + len(gallery)) if item[0] not in shown]
    return others[:GALLERY]


def _summary(job: Scoring) -> dict[str, str | int | float]:
    detector = job.scorer.detectors[0]
    document = bundle.read(RunDir(job.run_dir).trajectory, bundle.TrajectoryDocument)
    others = [other.name for other in job.scorer.detectors[1:]]
    clean = f"{detector.images.count} clean images{'' if detector.held_out else ', also trained on'}"
    return {
        "run": str(job.run_dir),
        **({"adapter": detector.name} if detector.adapted else {"model": "phase 1, without adapter"}),
        **({"compared with": ", ".join(others)} if others else {}),
        "backbone": document.backbone,
        "grid": f"{document.spatial_resolution} x {document.spatial_resolution}",
        "blocks": len(job.scorer.extractor.backbone.blocks),
        "calibrated on": clean,
    }


def _image_row(position: int, row: Row, labels: Labels | None) -> ImageRow:
    kind = labels.dataset.kind(position) if labels else None
    return ImageRow(row["image"], row["score"], row["p_value"], row["is_anomalous"], kind)


def _picture(job: Scoring, scored: Scored, row: Row, labels: Labels | None) -> Picture:
    overlay = pictures.overlay(scored.pixels_SS3, map_of(job, scored.cells_HW), *job.map_range)
    if labels:
        mask_SS = labels.dataset.mask(scored.position, job.scorer.size, job.scorer.fit)
        overlay = pictures.outline(overlay, mask_SS)
    original = Image.fromarray(scored.pixels_SS3)
    return Picture(
        _image_row(scored.position, row, labels),
        pictures.jpeg(original),
        pictures.jpeg(overlay),
        np.sqrt(scored.energies_L).round(4).tolist(),  # The roots are what the score averages.
    )


def _score_again(job: Scoring, positions: list[int]) -> dict[int, Scored]:
    """Read and score a few images again: their pixels were not kept.

    An image that can no longer be read is left out, as it would be in a scoring.
    """
    numbers = np.array(sorted(set(positions)), np.int64)
    images = SlotDataset(
        job.source,
        partial(picked, numbers),
        job.scorer.size,
        job.scorer.fit,
        threads=job.drawing_threads,
    )
    found: dict[int, Scored] = {}
    # In batches of the user's size, which is known to fit the device.
    for start in range(0, len(numbers), job.options.batch_size):
        part = numbers[start : start + job.options.batch_size].tolist()
        batch = images[Slots(0, start, start + len(part), len(part))]
        found |= {scored.position: scored for scored in score_batch(job, batch, part)}
    return found


def _bars(job: Scoring, labels: Labels | None) -> ScoreBars:
    histograms = {"calibration": job.scorer.detectors[0].images.histogram}
    if labels:
        histograms["good"] = labels.images[GOOD]
        histograms["defects"] = defect_scores(labels.images)
    else:
        scores = (("images", row["score"]) for _, row in scored_rows(job.out))
        histograms |= histograms_of(["images"], scores)
    return ScoreBars(*plot_bins(histograms))


def defect_scores(images: dict[str, ScoreHistogram]) -> ScoreHistogram:
    """Scores of all images that are not good."""
    return reduce(add, (histogram for kind, histogram in images.items() if kind != GOOD), ScoreHistogram())


def _cards(metrics: dict[str, Any]) -> list[Metric]:
    cards = []
    for key, title in TITLES.items():
        low, high = metrics.get(f"{key}_interval") or (None, None)
        cards.append(Metric(title, metrics[key], low, high))
    return cards


def _defects(metrics: dict[str, Any]) -> list[DefectKind]:
    return [
        DefectKind(
            kind, values["num_images"], values["num_detected"], {title: values[key] for key, title in TITLES.items()}
        )
        for kind, values in metrics["defects"].items()
    ]


def _curves(labels: Labels) -> list[CurvePair]:
    images, pixels = (
        curve(defect_scores(labels.images), labels.images[GOOD]),
        reduce(add, labels.pixels.values()).curve(),
    )
    return [
        CurvePair("Images", images.roc_points(), images.pr_points()),
        CurvePair("Pixels", pixels.roc_points(), pixels.pr_points()),
    ]
