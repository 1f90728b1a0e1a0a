"""``trajdist score``: unlabelled images -> scores.jsonl, anomaly maps, pictures; streamed, sharded, resumable.

Shape suffixes: B images, H W grid, L steps, S pixels per side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from trajdist.artifacts import fingerprint
from trajdist.data.decode import TRANSFORM
from trajdist.data.loader import (
    ImageBatch,
    in_threads,
)
from trajdist.data.sources import PICTURES, SCORED
from trajdist.errors import ArtifactError, ConfigError, DataError, os_errors
from trajdist.files import exists, hold, read_object, remove_unfinished, write_json
from trajdist.runtime.processes import to_device
from trajdist.runtime.progress import Progress
from trajdist.scoring import pictures, residuals
from trajdist.scoring.detector import CellScores, Detector
from trajdist.scoring.job import Scoring
from trajdist.scoring.output import (
    Row,
    count_rows,
    failed_positions,
    keep_rows,
    most_anomalous,
    picture_name,
    read_rows,
    replace_rows,
    scored_rows,
    unreadable,
)
from trajdist.screen import on_screen
from trajdist.sharding import Int64s
from trajdist.tables import counted

# Number of unreadable images named on the screen; scores.jsonl has all.
SHOWN = 5
# The transform of output folders that do not name theirs.
FIRST_RECORDED = 4
# Position in the input order, row, and raw map unless the image failed.
Numbered = tuple[int, Row, pictures.Floats | None]
Store = Callable[[list[Numbered]], None]


@dataclass(frozen=True)
class Scored:
    """One scored image, on the process that scored it.

    Attributes:
        position: its place in the input order.
        pixels_SS3: uint8, as the backbone saw it.
        cells_HW: float32 scores of the first detector, standardised.
        energies_L: the blocks' energies at the hottest place.
    """

    position: int
    row: Row
    pixels_SS3: pictures.Pixels
    cells_HW: pictures.Floats
    energies_L: pictures.Floats


def score(job: Scoring) -> None:
    """Score all images of the source that an earlier command has not scored; every process of the job calls it.

    Raises:
        ArtifactError: the output folder cannot be written.
        ConfigError: the output folder holds the scores of something else.
    """
    num_images = len(job.source)

    def prepare() -> tuple[int, list[int]]:
        with _writing(job.out):
            return _prepare_out(job)

    def close() -> None:
        with _writing(job.out):
            job.maps.close()

    done, failed = job.processes.main_knows(prepare)
    if done < num_images:
        _walk(job, np.arange(num_images), done, partial(_append, job))
    if failed:
        _try_again(job, failed)
    job.processes.main_does(close)


def _walk(job: Scoring, order: Int64s, cursor: int, store: Store) -> None:
    """Score the images at these positions in batches; the main process stores each step's rows, in input order."""
    plan = job.plan(len(order))
    with Progress(job.console, "scoring", plan.num_images, cursor) as progress:
        for step, batch in zip(plan.steps(cursor), job.loader(plan, cursor, order), strict=True):
            slots = plan.micro_batch(step, 0, job.processes.rank)
            scored = list(score_batch(job, batch, order[slots.start : slots.stop].tolist()))
            _draw_all(job, scored)
            rows = sorted(job.processes.gather(_rows(job, scored, batch)), key=lambda row: row[0])
            job.processes.main_does(partial(store, rows))
            progress.advance(step.stop)


def _try_again(job: Scoring, failed: list[int]) -> None:
    """Score the images that an earlier command could not read, and replace the rows of those that can be read now."""
    found: dict[int, Row] = {}

    def store(rows: list[Numbered]) -> None:
        found.update({position: row for position, row, cells_HW in rows if cells_HW is not None})
        with _writing(job.out):
            job.maps.write([(position, cells_HW) for position, _, cells_HW in rows])

    def replace() -> None:
        if found:
            with _writing(job.out):
                replace_rows(job.out, found)

    _walk(job, np.array(failed), 0, store)
    job.processes.main_does(replace)


def _writing(out: Path) -> AbstractContextManager[None]:
    return os_errors(f"--out {str(out)!r} cannot be written", fix="free some space and run the same command again")


def _draw_all(job: Scoring, scored: list[Scored]) -> None:
    def draw_each() -> None:
        with _writing(job.out):
            in_threads(lambda image: _draw(job, image), scored, job.drawing_threads)

    job.processes.all_do(draw_each)


def score_batch(job: Scoring, batch: ImageBatch, positions: Sequence[int]) -> Iterator[Scored]:
    """Score a batch of the images at ``positions``; unreadable ones are left out."""
    results = job.scorer.score_batch(to_device((batch.images,), job.processes.device)[0])
    on_cpu = [CellScores(*(part.cpu() for part in vars(result).values())) for result in results]
    p_values = [d.images.p_values(r.images_B) for d, r in zip(job.scorer.detectors, on_cpu, strict=True)]
    for slot, position in enumerate(positions):
        if not batch.weights[slot]:
            continue
        first = on_cpu[0]
        hottest = int(first.cells_BHW[slot].argmax())
        energies_L = first.energies_BHWL[slot].flatten(0, 1)[hottest].numpy()
        yield Scored(
            position,
            _row(job, position, [r.images_B[slot].item() for r in on_cpu], [p[slot].item() for p in p_values])
            | (_explanation(job, energies_L, hottest) if job.options.explain else {}),
            batch.images[slot].permute(1, 2, 0).numpy(),
            first.cells_BHW[slot].numpy(),
            energies_L,
        )


def _row(job: Scoring, position: int, scores: list[float], p_values: list[float]) -> Row:
    """A row of scores.jsonl. Of several adapters, the best-fitting is the one that finds the image least anomalous."""
    row: Row = {
        "image": job.source.name(position),
        "score": scores[0],
        "p_value": p_values[0],
        "is_anomalous": scores[0] >= job.thresholds[0],
    }
    if len(scores) > 1:
        names = [detector.name for detector in job.scorer.detectors]
        row["adapters"] = {
            name: {"score": score, "p_value": p_value}
            for name, score, p_value in zip(names, scores, p_values, strict=True)
        }
        row["best_adapter"] = names[_best_fitting(job.scorer.detectors, scores, p_values)]
    return row


def _best_fitting(detectors: Sequence[Detector], scores: Sequence[float], p_values: Sequence[float]) -> int:
    """Index of the detector with the largest p-value, or of equal ones the lowest score.

    With n clean images no p-value is below 1 / (n + 1), so if an image is anomalous to all, the detector with the
    fewest clean images would win. Therefore p-values below what that one can reach count as equal.
    """
    least = max(detector.images.least_p_value for detector in detectors)
    return min(range(len(scores)), key=lambda which: (-max(p_values[which], least), scores[which]))


def _explanation(job: Scoring, energies_L: pictures.Floats, hottest: int) -> Row:
    side = job.scorer.extractor.resolution
    blocks = dict(zip(job.step_names, np.round(energies_L.astype(float), 5).tolist(), strict=True))
    return {"hottest": [hottest // side, hottest % side], "blocks": blocks}


def map_of(job: Scoring, cells_HW: pictures.Floats) -> pictures.Floats:
    """The upsampled map at the size of the image, ``[S, S]``."""
    return residuals.upsample(torch.from_numpy(cells_HW)[None], job.scorer.size)[0].numpy()


def _draw(job: Scoring, image: Scored) -> None:
    """Write the overlay and, with ``explain``, the depth profile as PNGs named after the image."""
    wanted = job.options.overlays
    if wanted == "none" or (wanted == "anomalous" and not image.row["is_anomalous"]):
        return
    stem = picture_name(image.row["image"])
    panel = pictures.panel(image.pixels_SS3, map_of(job, image.cells_HW), *job.map_range)
    (job.out / PICTURES / f"{stem}.png").write_bytes(pictures.png(panel))
    if job.options.explain:
        profile = pictures.profile(np.sqrt(image.energies_L))  # As in the report.
        (job.out / PICTURES / f"{stem}.depth.png").write_bytes(pictures.png(profile))


def _rows(job: Scoring, scored: list[Scored], batch: ImageBatch) -> list[Numbered]:
    """The rows and maps of this process's batch. An image's number in the source is its position."""
    found: list[Numbered] = [(image.position, image.row, image.cells_HW) for image in scored]
    return found + [(number, _failed_row(job, number, why), None) for number, why in batch.failures]


def _append(job: Scoring, rows: list[Numbered]) -> None:
    """Append a step's rows, given in input order, and fill in their maps."""
    with _writing(job.out), open(job.out / "scores.jsonl", "a", encoding="utf-8") as handle:
        job.maps.write([(position, cells_HW) for position, _, cells_HW in rows])
        handle.writelines(json.dumps(row) + "\n" for _, row, _ in rows)


def _failed_row(job: Scoring, position: int, reason: str) -> Row:
    return {
        "image": job.source.name(position),
        "score": None,
        "p_value": None,
        "is_anomalous": None,
        "error": reason,
    }


def _identity(job: Scoring) -> dict[str, Any]:
    """What must be unchanged for an interrupted scoring to resume."""
    return {
        "images": job.source.fingerprint,
        "files": job.source.stamp(),
        "num_images": len(job.source),
        "transform": TRANSFORM,
        "detectors": [fingerprint(d.residual.state_dict(), {"name": d.name}) for d in job.scorer.detectors],
        "false_alarm_rates": job.rates,
        "thresholds": [str(threshold) for threshold in job.thresholds],
        "explain": job.options.explain,
        "overlays": job.options.overlays,
    }


def _prepare_out(job: Scoring) -> tuple[int, list[int]]:
    """Bring the output folder to its state after the last whole step.

    Returns:
        The number of images done by then, and the positions of the unreadable ones among them.
    """
    _claim_out(job)
    done, plan = 0, job.plan(len(job.source))
    if job.maps.is_there and (rows := count_rows(job.out)) and _has_same_names(job):
        done = plan.num_images if rows >= plan.num_images else rows - rows % plan.global_batch
    keep_rows(job.out, done)
    job.maps.open()
    failed = failed_positions(job.out) if done else []
    if done:
        again = f", and {len(failed)} unreadable ones are tried again" if failed else ""
        job.console.print(f"{done - len(failed)} images are scored already{again}: resuming")
    return done, failed


def _has_same_names(job: Scoring) -> bool:
    """Not if ``score`` scored the folder ``test`` of what ``evaluate`` measures, or the other way round."""
    return next(read_rows(job.out))["image"] == job.source.name(0)


def _claim_out(job: Scoring) -> None:
    """Create the output folder and record what it is for.

    Raises:
        ArtifactError: it cannot be made or written.
        ConfigError: it holds the scores of something else.
    """
    marker, identity = job.out / SCORED, _identity(job)
    with os_errors(f"--out {str(job.out)!r} cannot be made", fix="name a folder that can be written"):
        (job.out / PICTURES).mkdir(parents=True, exist_ok=True)
    job.lock = hold(job.out / ".lock")
    if job.lock is None:
        raise ArtifactError(
            f"--out {str(job.out)!r} is being written by another command: wait for it, or name another."
        )
    remove_unfinished(job.out / "scores.jsonl")
    if exists(marker) and (found := {"transform": FIRST_RECORDED, **read_object(marker)}) != identity:
        raise ConfigError(f"--out {str(job.out)!r} {_difference(found, identity)}: name another folder.")
    write_json(marker, identity)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first difference between what an output folder holds and what is wanted, as the end of a sentence."""
    if found.keys() != wanted.keys():
        return "was written by another version of trajdist"
    rates, asked = (json.dumps(each["false_alarm_rates"]).strip("[]") for each in (found, wanted))
    said = {
        "num_images": f"holds the scores of {found['num_images']} images, and there are {wanted['num_images']} now",
        "images": "holds the scores of another set of as many images",
        "files": "holds the scores of images of the same names in another folder, or before they changed",
        "transform": "was made by another version of trajdist, which turns images into pixels in another way",
        "detectors": "was made with another run, phase or adapter",
        "false_alarm_rates": f"was made for a false-alarm rate of {rates}, which is {asked} now",
        "thresholds": "was made with another calibration of the run",
        "explain": f"was made with{'' if found['explain'] else 'out'} --explain",
        "overlays": f"was made with --overlays {found['overlays']}, which is {wanted['overlays']} now",
    }
    return next(words for key, words in said.items() if found[key] != wanted[key])


def tell_unreadable(job: Scoring) -> None:
    """Report the first images that could not be read; the main process calls it.

    Raises:
        DataError: none could be read.
    """
    rows, count = unreadable(job.out, SHOWN)
    if not count:
        return
    named = "; ".join(f"{on_screen(row['image'])} ({row['error']})" for row in rows)
    more = f"; and {count - SHOWN} more, see scores.jsonl" if count > SHOWN else ""
    if count == len(job.source):
        raise DataError(f"none of the {count} images of {job.images_title!r} could be read: {named}{more}.")
    job.console.print(f"{count} of {len(job.source)} images could not be read: {named}{more}")


def score_table(job: Scoring) -> Table:
    """What the main process prints at the end."""
    verdicts = Counter(None if row["score"] is None else bool(row["is_anomalous"]) for row in read_rows(job.out))
    title = f"{counted(len(job.source), 'image')}, {verdicts[True]} anomalous, {verdicts[None]} unreadable"
    table = Table(title=title, title_justify="left")
    table.add_column("most anomalous", overflow="fold")
    for column in ("score", "p-value"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for _, row in most_anomalous(scored_rows(job.out), 10):
        alarm = "anomalous" if row["is_anomalous"] else ""
        table.add_row(on_screen(row["image"]), f"{row['score']:.3f}", told_p_value(row["p_value"]), alarm)
    return table


def told_p_value(p_value: float) -> str:
    """A p-value with four decimals, or two digits if it is small: it is never 0."""
    return f"{p_value:.4f}" if p_value >= 0.001 else f"{p_value:.2g}"
