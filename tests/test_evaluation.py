"""``trajdist evaluate``: the numbers of scikit-learn, whatever the processes; what is wrong with a set is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images import noise, write_images
from jobs import launch, start
from outcome import read, read_rows
from PIL import Image
from references import aupro, best_f1, laid_on, shares_of_regions
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score, roc_auc_score

import trajdist.scoring.score
from trajdist.cli import main
from trajdist.data.defects import write_labelled
from trajdist.data.sources import open_source
from trajdist.errors import ArtifactError
from trajdist.scoring.metrics import PixelScores
from trajdist.scoring.output import MapsFile
from trajdist.scoring.report import GALLERY

KEYS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")
KINDS = ("foreign", "scratch", "stain")
CROPS, SIZE = 12, 64
OPTIONS = ("--batch-size", "7", "--overlays", "none", "--false-alarm-rate", "0.25")


def evaluate(run_dir: Path, dataset: Path, out: Path, *options: str) -> int:
    return main(["evaluate", str(run_dir), str(dataset), "--out", str(out), *OPTIONS, *options])


def read_metrics(out: Path) -> dict[str, Any]:
    return read(out, "metrics.json")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Twelve crops of gravel, clean and with one of three defects, in MVTec layout."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "crops").mkdir()
    source = open_source("skimage:gravel/heldout", "source")
    for index in range(CROPS):
        source.load(index, None).save(folder / "crops" / f"{index:02d}.png")
    write_labelled(open_source(str(folder / "crops"), "source"), folder / "labelled")
    return folder / "labelled"


@pytest.fixture(scope="module")
def measured(debug_run, dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "out"
    assert evaluate(debug_run, dataset, out) == 0
    return out


@pytest.fixture
def copied(dataset, tmp_path) -> Path:
    """For tests that spoil it."""
    return Path(shutil.copytree(dataset, tmp_path / "labelled"))


# ------------------------------------------------------------------------------------------- what was scored


def kinds_of(out: Path) -> np.ndarray:
    return np.array([row["image"].split("/")[1] for row in read_rows(out)])


def image_scores(out: Path) -> np.ndarray:
    return np.array([row["score"] for row in read_rows(out)], np.float32)


def pixel_maps(out: Path) -> np.ndarray:
    cells = torch.from_numpy(load_file(out / "maps.safetensors")["maps"])
    return F.interpolate(cells[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0].numpy()


def files_of(out: Path, dataset: Path) -> Iterator[Image.Image]:
    """The masks as they are on the disk."""
    for row in read_rows(out):
        _, kind, name = row["image"].split("/")
        file = dataset / "ground_truth" / kind / name.replace(".png", "_mask.png")
        yield Image.new("L", (SIZE, SIZE)) if kind == "good" else Image.open(file)


def masks_of(out: Path, dataset: Path) -> np.ndarray:
    masks = [mask.resize((SIZE, SIZE), Image.Resampling.NEAREST) for mask in files_of(out, dataset)]
    return np.stack([np.asarray(mask) > 0 for mask in masks])


def shares_of(out: Path, dataset: Path) -> np.ndarray:
    """The parts of the regions on the pixels of the maps."""
    return np.stack([laid_on(shares_of_regions(np.asarray(mask) > 0), SIZE) for mask in files_of(out, dataset)])


def chosen(out: Path, kind: str | None) -> np.ndarray:
    """All images, or the good ones and those of one kind."""
    kinds = kinds_of(out)
    return np.ones(len(kinds), bool) if kind is None else (kinds == kind) | (kinds == "good")


def found(out: Path, kind: str | None) -> dict[str, Any]:
    metrics = read_metrics(out)
    return metrics if kind is None else metrics["defects"][kind]


def assert_like_sklearn(values: dict[str, Any], prefix: str, labels: np.ndarray, scores: np.ndarray) -> None:
    error = values["binning_error"]
    assert values[f"{prefix}_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=error + 1e-9)
    assert values[f"{prefix}_ap"] == pytest.approx(average_precision_score(labels, scores), abs=5e-3)
    exact = best_f1(labels, scores)
    assert exact - 5e-3 <= values[f"{prefix}_f1_max"] <= exact + 1e-9, "never overstated"


# ------------------------------------------------------------------------------------------------ the numbers


def test_the_keys_of_the_contract(measured):
    metrics = read_metrics(measured)
    assert metrics.keys() >= {*KEYS, "num_images", "threshold", "defects", "binning_error"}
    assert set(metrics["defects"]) == set(KINDS)
    for values in (metrics, *metrics["defects"].values()):
        assert all(0 <= values[key] <= 1 for key in KEYS)
        assert 0 <= values["binning_error"] < 0.01
        assert values.keys() >= {*KEYS, "num_images"}


def test_counts_alarms_and_threshold(measured):
    metrics, rows, kinds = read_metrics(measured), read_rows(measured), kinds_of(measured)
    alarms = np.array([row["is_anomalous"] for row in rows])
    assert (metrics["num_images"], metrics["num_good"], metrics["num_unreadable"]) == (2 * CROPS, CROPS, 0)
    assert metrics["requested_false_alarm_rate"] == 0.25
    assert metrics["false_alarm_rate"] == pytest.approx(alarms[kinds == "good"].mean())
    assert metrics["detection_rate"] == pytest.approx(alarms[kinds != "good"].mean())
    np.testing.assert_array_equal(alarms, image_scores(measured) >= metrics["threshold"])
    for kind in KINDS:
        values = metrics["defects"][kind]
        assert (values["num_images"], values["num_detected"]) == (CROPS // 3, alarms[kinds == kind].sum())


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_image_metrics_are_those_of_sklearn(measured, kind):
    which = chosen(measured, kind)
    labels, scores = kinds_of(measured)[which] != "good", image_scores(measured)[which]
    assert_like_sklearn(found(measured, kind), "image", labels, scores)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_pixel_metrics_are_those_of_sklearn(measured, dataset, kind):
    which = chosen(measured, kind)
    masks, shares = masks_of(measured, dataset)[which], shares_of(measured, dataset)[which]
    maps, values = pixel_maps(measured)[which], found(measured, kind)
    assert_like_sklearn(values, "pixel", masks.ravel(), maps.ravel())
    for key, limit in (("aupro", 0.3), ("aupro_05", 0.05)):
        expected = aupro(masks, maps, limit, shares)
        assert values[key] == pytest.approx(expected, abs=values["binning_error"] * 2 / limit + 1e-6), key


def test_intervals_hold_the_estimate(measured):
    metrics = read_metrics(measured)
    for key in ("image_auroc", "image_ap"):
        low, high = metrics[f"{key}_interval"]
        assert 0 <= low <= metrics[key] <= high <= 1
        assert low < high
    # 12 against 12 images: Hanley & McNeil (1982) give a spread of 0.05 to 0.12.
    low, high = metrics["image_auroc_interval"]
    assert 0.1 < high - low < 0.6


def test_the_report_shows_the_same_numbers(measured):
    page = (measured / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.DOTALL).group(1))
    metrics = read_metrics(measured)
    assert [card["value"] for card in data["metrics"]] == pytest.approx([metrics[key] for key in KEYS])
    defects = {one["kind"]: (one["num_detected"], one["num_images"]) for one in data["defects"]}
    assert defects == {kind: (own["num_detected"], own["num_images"]) for kind, own in metrics["defects"].items()}
    low, high = data["map_scale"]["low"], data["map_scale"]["high"]
    assert low < high
    wrong = [row for row in data["rows"] if row["is_anomalous"] == (row["kind"] == "good")]
    assert len(data["mistakes"]) == min(GALLERY, len(wrong))
    assert all(picture["row"] in wrong for picture in data["mistakes"])
    assert {row["image"]: row["kind"] for row in data["rows"]} == dict(
        zip((row["image"] for row in read_rows(measured)), kinds_of(measured).tolist(), strict=True)
    )


def test_the_table_on_the_terminal(debug_run, dataset, measured, tmp_path, capsys, fresh_accelerate):
    assert evaluate(debug_run, dataset, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    for key, value in read_metrics(measured)["defects"]["stain"].items():
        if key in KEYS:
            assert f"{value:.3f}" in shown
    assert all(kind in shown for kind in KINDS)


def test_what_everybody_sees_is_found(debug_run, dataset, tmp_path, fresh_accelerate):
    """Colourful blotches where gravel should be: not a matter of luck."""
    for index in range(6):
        for part in ("test/good", "test/blotch", "ground_truth/blotch"):
            (tmp_path / "set" / part).mkdir(parents=True, exist_ok=True)
        good = Image.open(dataset / f"test/good/{index:03d}.png")
        good.save(tmp_path / f"set/test/good/{index}.png")
        mask = Image.new("L", good.size)
        mask.paste(255, (112, 0, 224, 112))
        Image.composite(noise(index, 224), good, mask).save(tmp_path / f"set/test/blotch/{index}.png")
        mask.save(tmp_path / f"set/ground_truth/blotch/{index}.png")
    assert evaluate(debug_run, tmp_path / "set", tmp_path / "out") == 0
    metrics = read_metrics(tmp_path / "out")
    assert metrics["image_auroc"] == pytest.approx(1.0)
    assert metrics["pixel_auroc"] > 0.8
    assert metrics["image_auroc_interval"] == pytest.approx([1.0, 1.0])


def test_without_masks_images_are_measured(debug_run, copied, measured, tmp_path, capsys, fresh_accelerate):
    shutil.rmtree(copied / "ground_truth")
    assert evaluate(debug_run, copied, copied / "out") == 0
    metrics, expected = read_metrics(copied / "out"), read_metrics(measured)
    assert {key: metrics[key] for key in KEYS if key.startswith("image")} == {
        key: pytest.approx(expected[key]) for key in KEYS if key.startswith("image")
    }
    assert [metrics[key] for key in KEYS if not key.startswith("image")] == [None] * 4
    assert "there are no pixel metrics" in " ".join(capsys.readouterr().out.split())
    assert (copied / "out" / "report.html").is_file()


# ---------------------------------------------------------------------------- processes, again, and broken off


def assert_same_metrics(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Scores differ in their last digits, which may move one into the next bin."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same_metrics(value, other[key])
        elif isinstance(value, int) or value is None:
            assert value == other[key], key
        else:
            assert value == pytest.approx(other[key], abs=1e-3), key


def test_two_processes_measure_what_one_does(debug_run, copied, measured, tmp_path):
    """24 images in steps of 10: the last step leaves slots empty on both. In each one's share a mask marks nothing."""
    for name in ("foreign/000", "scratch/001"):
        Image.new("L", (SIZE, SIZE)).save(copied / "ground_truth" / f"{name}_mask.png")
    options = [*OPTIONS, "--batch-size", "5"]
    done = launch(["evaluate", debug_run, copied, "--out", tmp_path / "out", *options], num_processes=2)
    assert done.returncode == 0, done.stderr
    assert evaluate(debug_run, copied, tmp_path / "alone") == 0
    assert_same_metrics(read_metrics(tmp_path / "out"), read_metrics(tmp_path / "alone"))
    assert read_metrics(tmp_path / "out")["num_unmarked"] == 2
    assert [row["image"] for row in read_rows(tmp_path / "out")] == [row["image"] for row in read_rows(measured)]
    np.testing.assert_allclose(image_scores(tmp_path / "out"), image_scores(measured), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.fixture
def scored_again(monkeypatch) -> list[int]:
    """Positions of the images that are scored, those of the report apart."""
    positions, score_batch = [], trajdist.scoring.score.score_batch

    def recorded(job, batch, places):
        positions.extend(places)
        return score_batch(job, batch, places)

    monkeypatch.setattr(trajdist.scoring.score, "score_batch", recorded)
    return positions


@pytest.mark.parametrize(("kept", "done"), [(24, 24), (13, 7), (0, 0)])
def test_an_evaluation_goes_on(debug_run, dataset, measured, tmp_path, scored_again, fresh_accelerate, kept, done):
    """After the last whole step of 7; the pixels of all images count, and once."""
    out = Path(shutil.copytree(measured, tmp_path / "out"))
    rows = (out / "scores.jsonl").read_bytes()
    (out / "scores.jsonl").write_bytes(b"".join(rows.splitlines(keepends=True)[:kept]))
    (out / "metrics.json").unlink()
    assert evaluate(debug_run, dataset, out) == 0
    assert scored_again == list(range(done, 24))
    assert (out / "scores.jsonl").read_bytes() == rows
    assert (out / "metrics.json").read_bytes() == (measured / "metrics.json").read_bytes()


def test_an_evaluation_that_is_stopped_at_its_masks_goes_on(
    debug_run, dataset, measured, tmp_path, monkeypatch, scored_again, fresh_accelerate
):
    out, counted, update = tmp_path / "out", [], PixelScores.update

    def interrupted(scores: PixelScores, *images: Any) -> None:
        counted.append(images)
        if len(counted) == 10:
            raise KeyboardInterrupt
        update(scores, *images)

    monkeypatch.setattr(PixelScores, "update", interrupted)
    assert evaluate(debug_run, dataset, out) == 130
    assert scored_again == list(range(24))
    assert not (out / "metrics.json").exists()
    assert evaluate(debug_run, dataset, out) == 0
    assert scored_again == list(range(24)), "none twice"
    assert (out / "metrics.json").read_bytes() == (measured / "metrics.json").read_bytes()


def test_an_evaluation_that_was_killed_goes_on_with_other_processes(debug_run, dataset, measured, tmp_path, capsys):
    out = tmp_path / "out"
    options = [*OPTIONS, "--batch-size", "1"]
    job = start(["evaluate", debug_run, dataset, "--out", out, *options], num_processes=2)
    rows, deadline = out / "scores.jsonl", time.monotonic() + 60
    while not rows.exists() or b"\n" not in rows.read_bytes():
        assert time.monotonic() < deadline
        assert job.process.poll() is None
        time.sleep(0.002)
    job.kill()
    job.end()
    assert not (out / "metrics.json").exists()
    begun = rows.read_bytes()[: rows.read_bytes().index(b"\n")]
    assert evaluate(debug_run, dataset, out, "--batch-size", "1") == 0
    assert "images are scored already: resuming" in capsys.readouterr().out
    assert rows.read_bytes().startswith(begun)
    assert_same_metrics(read_metrics(out), read_metrics(measured))


def test_masks_that_were_changed_since(debug_run, copied, tmp_path, scored_again, fresh_accelerate):
    """The images are not scored again, and the masks are those of now."""
    out, mask = tmp_path / "out", copied / "ground_truth" / "stain" / "002_mask.png"
    assert evaluate(debug_run, copied, out) == 0
    before = read_metrics(out)
    with Image.open(mask) as marked:
        turned = marked.transpose(Image.Transpose.ROTATE_180)
    turned.save(mask)
    del scored_again[:]
    assert evaluate(debug_run, copied, out) == 0
    assert scored_again == []
    after = read_metrics(out)
    assert after["pixel_auroc"] != before["pixel_auroc"]
    assert after["image_auroc"] == before["image_auroc"]
    assert_like_sklearn(after, "pixel", masks_of(out, copied).ravel(), pixel_maps(out).ravel())


def test_images_that_can_be_read_again_are_measured(debug_run, copied, tmp_path, fresh_accelerate):
    """As after an outage of the disk."""
    image, out = copied / "test" / "stain" / "002.png", tmp_path / "out"
    sound = image.read_bytes()
    for content in (bytes(len(sound)), sound):
        image.write_bytes(content)
        os.utime(image, (0, 0))  # Files of the same size and age are the same ones.
        assert evaluate(debug_run, copied, out) == 0
    assert read_metrics(out)["num_unreadable"] == 0
    assert_like_sklearn(read_metrics(out), "pixel", masks_of(out, copied).ravel(), pixel_maps(out).ravel())


def test_maps_that_another_machine_does_not_see(tmp_path):
    maps = MapsFile(tmp_path / "maps.safetensors", 3, 4)
    with pytest.raises(ArtifactError, match=r"maps.safetensors' cannot be read \(No such file or directory\): let all"):
        maps.read(0, 2)
    (tmp_path / "maps.safetensors").write_bytes(bytes(200))
    with pytest.raises(ArtifactError, match=r"cannot be read \(it is too short\): let all machines see"):
        maps.read(0, 2)


def test_scored_before_it_was_evaluated(debug_run, dataset, measured, tmp_path, fresh_accelerate):
    """Scored anew: the names in the rows are others."""
    command = ["score", str(debug_run), str(dataset / "test"), "--out", str(tmp_path / "out"), *OPTIONS]
    assert main(command) == 0
    assert evaluate(debug_run, dataset, tmp_path / "out") == 0
    for name in ("metrics.json", "scores.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (measured / name).read_bytes()


def test_an_output_folder_of_another_evaluation(debug_run, copied, measured, tmp_path, capsys, fresh_accelerate):
    out = Path(shutil.copytree(measured, tmp_path / "out"))
    assert evaluate(debug_run, copied, out) == 2
    assert "holds the scores of images of the same names in another folder" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- defective sets


def test_masks_that_mark_nothing_are_told_of(debug_run, copied, tmp_path, capsys, fresh_accelerate):
    for name in ("002", "005"):
        Image.new("L", (SIZE, SIZE)).save(copied / "ground_truth" / "stain" / f"{name}_mask.png")
    assert evaluate(debug_run, copied, tmp_path / "out") == 0
    told = (
        "2 defective images with a mask that marks nothing in what is scored (test/stain/002.png, test/stain/005.png)"
    )
    assert told in " ".join(capsys.readouterr().out.split())
    assert read_metrics(tmp_path / "out")["num_unmarked"] == 2


def test_nothing_but_good_images(debug_run, copied, tmp_path, fresh_accelerate):
    for kind in KINDS:
        shutil.rmtree(copied / "test" / kind)
    assert evaluate(debug_run, copied, tmp_path / "out") == 0
    metrics = read_metrics(tmp_path / "out")
    assert [metrics[key] for key in KEYS] == [None] * len(KEYS)
    assert metrics["image_auroc_interval"] is None
    assert metrics["detection_rate"] is None
    assert (metrics["num_images"], metrics["defects"]) == (CROPS, {})
    assert (tmp_path / "out" / "report.html").is_file()


def test_damaged_images_are_counted_and_left_out(debug_run, copied, tmp_path, fresh_accelerate):
    for name in ("good/000.png", "stain/002.png"):
        assert (copied / "test" / name).is_file()
        (copied / "test" / name).write_bytes(b"no picture")
    assert evaluate(debug_run, copied, tmp_path / "out") == 0
    metrics, rows = read_metrics(tmp_path / "out"), read_rows(tmp_path / "out")
    counts = [metrics[key] for key in ("num_unreadable", "num_good", "num_images")]
    assert counts == [2, CROPS - 1, 2 * CROPS - 2]
    read = np.array([row["score"] is not None for row in rows])
    labels = kinds_of(tmp_path / "out")[read] != "good"
    scores = image_scores(tmp_path / "out")[read]
    assert_like_sklearn(metrics, "image", labels, scores)
    masks, maps = masks_of(tmp_path / "out", copied)[read], pixel_maps(tmp_path / "out")[read]
    assert_like_sklearn(metrics, "pixel", masks.ravel(), maps.ravel())


def test_a_kind_of_which_nothing_can_be_read(debug_run, copied, tmp_path, fresh_accelerate):
    for file in (copied / "test" / "stain").iterdir():
        file.write_bytes(b"")
    assert evaluate(debug_run, copied, tmp_path / "out") == 0
    stain = read_metrics(tmp_path / "out")["defects"]["stain"]
    assert (stain["num_images"], stain["num_detected"]) == (0, 0)
    assert [stain[key] for key in KEYS] == [None] * len(KEYS)


def test_no_good_image_can_be_read(debug_run, copied, tmp_path, capsys, fresh_accelerate):
    for file in (copied / "test" / "good").iterdir():
        file.write_bytes(b"")
    assert evaluate(debug_run, copied, tmp_path / "out") == 3
    assert "none of the good images could be scored" in capsys.readouterr().err


def test_a_missing_mask_is_named(debug_run, copied, tmp_path, capsys):
    (copied / "ground_truth" / "foreign" / "003_mask.png").unlink()
    assert evaluate(debug_run, copied, tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ground_truth/foreign/003_mask.png" in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_mask_is_named(debug_run, copied, tmp_path, capsys, fresh_accelerate):
    (copied / "ground_truth" / "foreign" / "003_mask.png").write_bytes(b"no picture")
    assert evaluate(debug_run, copied, tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ground_truth/foreign/003_mask.png" in error
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_damaged_mask_under_a_launcher_is_one_sentence(debug_run, copied, tmp_path):
    """The process that reads it says it; the other does not wait for it."""
    mask = copied / "ground_truth" / "stain" / "002_mask.png"
    mask.write_text("no picture")
    done = launch(["evaluate", debug_run, copied, "--out", tmp_path / "out", *OPTIONS], num_processes=2, timeout_s=60)
    assert done.returncode != 0
    assert done.stderr.count("trajdist: ") == 1
    assert "002_mask.png" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    assert "[rank1]: Traceback" not in done.stderr


def test_a_folder_without_labels(debug_run, tmp_path, capsys):
    folder = write_images(tmp_path / "images", 2)
    assert evaluate(debug_run, folder, tmp_path / "out") == 3
    assert "has no folder test" in capsys.readouterr().err
    assert evaluate(debug_run, tmp_path / "missing", tmp_path / "out") == 3
    assert "missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_clean_images_for_a_threshold(debug_run, dataset, tmp_path, fresh_accelerate):
    """JSON has no infinity: null, and nothing is called anomalous."""
    assert evaluate(debug_run, dataset, tmp_path / "out", "--false-alarm-rate", "0.001") == 0
    metrics = read_metrics(tmp_path / "out")
    assert metrics["threshold"] is None
    assert (metrics["false_alarm_rate"], metrics["detection_rate"]) == (0.0, 0.0)
    assert metrics["image_auroc"] is not None
