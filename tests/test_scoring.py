"""``trajdist score``: rows in input order whatever the processes and kills; alarms as often as asked."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from images import noise, write_images
from jobs import REPOSITORY, launch, start
from outcome import read, read_rows, write_rows
from PIL import Image
from safetensors.numpy import load_file
from scipy.stats import betabinom
from sklearn.metrics import average_precision_score, roc_auc_score

import trajdist
import trajdist.scoring.report
import trajdist.scoring.score
from trajdist.artifacts import read_document, read_tensors, write_tensors
from trajdist.cli import main
from trajdist.data.sources import open_source
from trajdist.errors import TrainingError
from trajdist.scoring import job
from trajdist.scoring import score as walking
from trajdist.scoring.histogram import ScoreHistogram
from trajdist.scoring.output import most_anomalous, picture_name, scored_rows
from trajdist.scoring.pictures import outline, overlay
from trajdist.scoring.report import GALLERY, calmest_besides, mistakes
from trajdist.scoring.residuals import upsample
from trajdist.scoring.score import _row, told_p_value
from trajdist.scoring.scorer import Scorer

COUNT, DAMAGED = 11, 5


def score(run_dir: Path, images: Path | str, out: Path, *options: str) -> int:
    return main(["score", str(run_dir), str(images), "--out", str(out), *options])


def read_maps(out: Path) -> np.ndarray:
    tensors = load_file(out / "maps.safetensors")
    assert set(tensors) == {"maps"}
    return tensors["maps"]


def drawn(out: Path) -> set[str]:
    return {file.name for file in (out / "maps").iterdir()}


def assert_same_scores(one: Path, other: Path) -> None:
    """Up to the last digits, which depend on how many images are in a batch."""
    assert [row["image"] for row in read_rows(one)] == [row["image"] for row in read_rows(other)]
    for mine, theirs in zip(read_rows(one), read_rows(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["is_anomalous"] == theirs["is_anomalous"]
        for key in ("score", "p_value"):
            assert mine[key] == (theirs[key] and pytest.approx(theirs[key], rel=1e-4, abs=1e-4))
    np.testing.assert_allclose(read_maps(one), read_maps(other), rtol=1e-3, atol=1e-3)
    assert {str(file.relative_to(one)) for file in one.rglob("*")} == {
        str(file.relative_to(other)) for file in other.rglob("*")
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Crops of gravel and one file that is no picture, in folders; names that sort otherwise than numbers."""
    folder = tmp_path_factory.mktemp("images")
    source = open_source("skimage:gravel/heldout", "source")
    (folder / "b").mkdir()
    for index in range(COUNT):
        place = folder / ("b" if index > 6 else "") / f"{index}.png"
        source.load(index, None).resize((64, 64)).save(place)
    (folder / f"{DAMAGED}.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def scored(debug_run, images, tmp_path_factory) -> Path:
    """One process, several batches, everything written."""
    out = tmp_path_factory.mktemp("scored") / "out"
    assert score(debug_run, images, out, "--explain", "--batch-size", "4", "--false-alarm-rate", "0.4") == 0
    return out


# -------------------------------------------------------------------------------------------------- the rows


def test_one_row_per_image_in_input_order(scored, images):
    names = sorted(str(file.relative_to(images)) for file in images.rglob("*.png"))
    assert [row["image"] for row in read_rows(scored)] == names
    assert len(names) == COUNT


def test_the_fields_of_a_row(scored):
    for row in read_rows(scored):
        assert row.keys() >= {"image", "score", "p_value", "is_anomalous"}
        if row["image"] == f"{DAMAGED}.png":
            assert row.keys() == {"image", "score", "p_value", "is_anomalous", "error"}
            assert [row[key] for key in ("score", "p_value", "is_anomalous")] == [None] * 3
            assert "cannot identify" in row["error"]
        else:
            assert row.keys() == {"image", "score", "p_value", "is_anomalous", "hottest", "blocks"}
            assert math.isfinite(row["score"])
            assert 0 < row["p_value"] <= 1


def test_the_threshold_and_the_p_value_agree(scored):
    rows = [row for row in read_rows(scored) if row["score"] is not None]
    assert [row["is_anomalous"] for row in rows] == [row["p_value"] <= 0.4 for row in rows]
    assert {row["is_anomalous"] for row in rows} == {True, False}, "the set is to show both"
    assert min(row["score"] for row in rows if row["is_anomalous"]) > max(
        row["score"] for row in rows if not row["is_anomalous"]
    )


def test_explained_blocks_are_those_of_the_hottest_place(scored, debug_run, images):
    scorer = trajdist.load(debug_run, device="cpu")
    names = [block.name for block in scorer.extractor.backbone.blocks]
    maps = read_maps(scored)
    for position, row in enumerate(read_rows(scored)):
        if row["score"] is None:
            continue
        y, x = row["hottest"]
        assert maps[position, y, x] == maps[position].max()
        pixels = torch.from_numpy(np.asarray(Image.open(images / row["image"])).copy()).permute(2, 0, 1)[None]
        energies = scorer.score_batch(pixels)[0].energies_BHWL[0, y, x]
        assert list(row["blocks"]) == names
        np.testing.assert_allclose(list(row["blocks"].values()), energies, rtol=1e-3, atol=1e-4)


def test_maps_are_those_of_the_api(scored, debug_run, images):
    maps, rows = read_maps(scored), read_rows(scored)
    assert (maps.shape, maps.dtype) == ((COUNT, 4, 4), np.float32)
    scorer = trajdist.load(debug_run, device="cpu")
    for position, row in enumerate(rows):
        if row["score"] is None:
            assert np.isnan(maps[position]).all()
        else:
            expected = scorer([Image.open(images / row["image"])]).maps[0]
            shown = upsample(torch.from_numpy(maps[position : position + 1]), 64)[0]
            np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-3)
            # 4 % of 16 places is the hottest one.
            assert maps[position].max() == pytest.approx(row["score"], rel=1e-5)


def test_a_damaged_image_changes_no_other_row(scored, debug_run, images, tmp_path, fresh_accelerate):
    shutil.copytree(images, tmp_path / "sound")
    (tmp_path / "sound" / f"{DAMAGED}.png").unlink()
    options = ("--explain", "--batch-size", "4", "--false-alarm-rate", "0.4")
    assert score(debug_run, tmp_path / "sound", tmp_path / "out", *options) == 0
    alone = {row["image"]: row["score"] for row in read_rows(tmp_path / "out")}
    both = {row["image"]: row["score"] for row in read_rows(scored) if row["score"] is not None}
    assert both == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_no_more_images_at_once_than_asked(debug_run, images, tmp_path, monkeypatch, fresh_accelerate):
    """Nor for the pictures of the report."""
    sizes, plain = [], Scorer.score_batch
    monkeypatch.setattr(Scorer, "score_batch", lambda self, batch: sizes.append(len(batch)) or plain(self, batch))
    assert score(debug_run, images, tmp_path / "out", "--batch-size", "3", "--overlays", "none") == 0
    assert max(sizes) == 3
    assert len(sizes) == 2 * 4


def test_nothing_but_damaged_images(debug_run, tmp_path, capsys, fresh_accelerate):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    noise(0).save(tmp_path / "images" / "b.png")
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "images" / "b.png").read_bytes()[:60])
    assert score(debug_run, tmp_path / "images", tmp_path / "out") == 3
    assert [row["score"] for row in read_rows(tmp_path / "out")] == [None, None]
    assert np.isnan(read_maps(tmp_path / "out")).all()
    said = capsys.readouterr()
    assert "2 unreadable" in said.out
    assert "none of the 2 images" in said.err
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_row_counts_only_once_its_map_is_on_the_disk(debug_run, images, tmp_path, monkeypatch, capsys):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trajdist.scoring.output.sync_contents", full)
    assert score(debug_run, images, tmp_path / "out") == 4
    assert "cannot be written (No space left on device): free some space" in capsys.readouterr().err
    assert not read_rows(tmp_path / "out")


# ---------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("which", ["all", "anomalous", "none"])
def test_overlays(debug_run, scored, images, tmp_path, fresh_accelerate, which):
    options = ("--false-alarm-rate", "0.4", "--overlays", which)
    assert score(debug_run, images, tmp_path, *options) == 0
    rows = [row for row in read_rows(scored) if row["score"] is not None]
    wanted = {"all": rows, "anomalous": [row for row in rows if row["is_anomalous"]], "none": []}[which]
    assert drawn(tmp_path) == {f"{picture_name(row['image'])}.png" for row in wanted}
    assert 0 < sum(row["is_anomalous"] for row in rows) < len(rows)


def test_pictures_show_the_image_and_its_map(scored, images):
    rows = [row for row in read_rows(scored) if row["score"] is not None]
    names = {picture_name(row["image"]) for row in rows}
    assert drawn(scored) == {f"{name}{end}" for name in names for end in (".png", ".depth.png")}
    assert len(names) == len(rows)
    for row in rows:
        with Image.open(scored / "maps" / f"{picture_name(row['image'])}.png") as panel:
            shown = np.asarray(panel.convert("RGB")).astype(int)
        original = np.asarray(Image.open(images / row["image"])).astype(int)
        np.testing.assert_array_equal(shown[:, :64], original)


def test_an_outline_runs_along_the_edge_of_the_mask():
    mask = np.zeros((12, 12), bool)
    mask[4:9, 3:8] = True
    traced = np.asarray(outline(Image.new("RGB", (12, 12)), mask)).any(-1)
    expected = np.zeros((12, 12), bool)
    expected[3:10, 3:8] = expected[4:9, 2:9] = True
    expected[5:8, 4:7] = False
    np.testing.assert_array_equal(traced, expected)
    assert not np.asarray(outline(Image.new("RGB", (12, 12)), np.zeros((12, 12), bool))).any()


def test_an_overlay_is_brightest_where_the_map_is():
    """Clear places are the image in grey, darkened; the hot one takes on the map's brightest colour."""
    map_SS = np.zeros((64, 64), np.float32)
    map_SS[16:32, 32:48] = 1.0
    image = np.asarray(noise(3, 64))
    shown = np.asarray(overlay(image, map_SS, 0.0, 1.0)).astype(int)
    brightness = shown.sum(-1).reshape(4, 16, 4, 16).mean((1, 3))
    assert np.unravel_index(brightness.argmax(), (4, 4)) == (1, 2)
    spread = shown.max(-1) - shown.min(-1)
    assert spread[map_SS == 1].min() > spread[map_SS == 0].max()


def in_report(out: Path) -> dict:
    page = (out / "report.html").read_text(encoding="utf-8")
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_an_image_that_is_gone_is_missing_from_the_pictures_alone(debug_run, images, tmp_path, monkeypatch):
    """As in the folder of a camera that keeps the last hour."""
    copied = Path(shutil.copytree(images, tmp_path / "images"))
    report = trajdist.scoring.report.report

    def late(job: Any) -> None:
        (copied / "3.png").unlink()
        report(job)

    monkeypatch.setattr("trajdist.scoring.report.report", late)
    assert score(debug_run, copied, tmp_path / "out") == 0
    shown = in_report(tmp_path / "out")
    assert {row["image"] for row in shown["rows"]} >= {"3.png", "4.png"}
    pictured = {picture["row"]["image"] for picture in shown["most_anomalous"]}
    assert "3.png" not in pictured
    assert "4.png" in pictured


@pytest.mark.parametrize("out", ["found", "."])
def test_the_output_folder_may_lie_among_the_images(debug_run, images, tmp_path, out):
    """Its pictures are not scored the next time, and an interrupted scoring goes on."""
    copied = Path(shutil.copytree(images, tmp_path / "images"))
    assert score(debug_run, copied, copied / out, "--batch-size", "4") == 0
    rows = read_rows(copied / out)
    assert len(rows) == COUNT
    write_rows(copied / out, rows[:8])
    assert score(debug_run, copied, copied / out, "--batch-size", "4") == 0
    assert [row["image"] for row in read_rows(copied / out)] == [row["image"] for row in rows]
    assert score(debug_run, copied, tmp_path / "elsewhere") == 0
    assert [row["image"] for row in read_rows(tmp_path / "elsewhere")] == [row["image"] for row in rows]


def test_the_report_shows_each_image_once(scored):
    """Of fewer than fill one gallery, none is left for the other."""
    shown = in_report(scored)
    assert len(shown["most_anomalous"]) == len({picture["row"]["image"] for picture in shown["most_anomalous"]})
    assert len(shown["most_anomalous"]) == COUNT - 1
    assert shown["least_anomalous"] == []


@pytest.mark.parametrize("count", [5, 12, 20, 24, 100])
@pytest.mark.parametrize("score_of", [lambda number: number % 7, lambda number: 1], ids=["some", "all alike"])
def test_the_calmest_besides_the_most_anomalous(tmp_path, count, score_of):
    rows = [{"image": f"{number}.png", "score": score_of(number)} for number in range(count)]
    write_rows(tmp_path, rows)
    gallery = most_anomalous(scored_rows(tmp_path), GALLERY)
    calmest = calmest_besides(gallery, tmp_path)
    shown = [position for position, _ in [*gallery, *calmest]]
    assert len(shown) == len(set(shown)) == min(count, 2 * GALLERY)
    left = [row["score"] for position, row in enumerate(rows) if position not in shown[: len(gallery)]]
    assert [row["score"] for _, row in calmest] == sorted(left)[:GALLERY]


@pytest.mark.parametrize(
    ("num_missed", "num_alarms", "shown"),
    [(0, 0, (0, 0)), (3, 2, (3, 2)), (20, 2, (10, 2)), (2, 20, (2, 10)), (20, 20, (6, 6))],
)
def test_mistakes_are_the_lowest_misses_and_the_highest_alarms(tmp_path, num_missed, num_alarms, shown):
    kinds = ["crack", "good"] * 25

    class Kinds:
        def kind(self, position: int) -> str:
            return kinds[position]

    missed, alarms = list(range(0, 2 * num_missed, 2)), list(range(1, 2 * num_alarms, 2))
    right = [position for position, kind in enumerate(kinds) if kind == "crack" and position not in missed]
    rows = [
        {"image": str(position), "score": (position * 7) % 50, "is_anomalous": position in (*alarms, *right)}
        for position in range(50)
    ]
    rows.append({"image": "unreadable", "score": None})
    write_rows(tmp_path, rows)
    found = mistakes(tmp_path, Kinds())
    scores = [row["score"] for _, row in found]
    assert scores[: shown[0]] == sorted(rows[position]["score"] for position in missed)[: shown[0]]
    assert scores[shown[0] :] == sorted((rows[p]["score"] for p in alarms), reverse=True)[: shown[1]]


def test_names_of_pictures_are_flat_short_and_unlike():
    names = ["a/b.png", "a__b.png", "a_b.png", "a/_b.png", "a_/b.png", "a_u_ub.png", "x" * 300 + ".png", "ä" * 140]
    names += ["x" * 301 + ".png", "y/" * 120 + "z.png", "a\0b.png"]
    flat = [picture_name(name) for name in names]
    assert len(set(flat)) == len(names)
    assert all(not {"/", "\0"} & set(name) and len(f"{name}.depth.png".encode()) <= 255 for name in flat)


def test_a_name_that_is_no_unicode(debug_run, tmp_path, fresh_accelerate):
    folder = write_images(tmp_path / "images", 2)
    os.rename(folder / "0001.png", os.fsencode(folder) + b"/caf\xe9.png")
    assert score(debug_run, folder, tmp_path / "out") == 0
    assert [row["image"] for row in read_rows(tmp_path / "out")] == ["0000.png", "caf\udce9.png"]
    assert len(drawn(tmp_path / "out")) == 2


@pytest.mark.parametrize("name", ["[bold]a.png", "x[/bold].png", ":smile:.png"])
def test_a_name_that_looks_like_markup(debug_run, tmp_path, capsys, fresh_accelerate, name):
    """``x[/bold].png`` is ``bold].png`` in the folder ``x[``."""
    file = tmp_path / "images" / name
    file.parent.mkdir(parents=True)
    noise(0).save(file)
    assert score(debug_run, tmp_path / "images", tmp_path / "out") == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", ["[red]out", "out[/red]"])
def test_an_output_folder_that_looks_like_markup(debug_run, tmp_path, capsys, fresh_accelerate, name):
    folder = write_images(tmp_path / "images", 1)
    assert score(debug_run, folder, tmp_path / name) == 0
    assert str(tmp_path / name / "report.html") in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- several processes


def test_two_processes_write_what_one_does(debug_run, scored, images, tmp_path):
    """They go on after the 4 images that one process did; of 11, one is damaged, and the last step is not full."""
    out = tmp_path / "out"
    shutil.copytree(scored, out, ignore=shutil.ignore_patterns("maps", "maps.safetensors", "report.html"))
    shutil.copytree(scored / "maps", out / "maps", ignore=lambda _, names: [name for name in names if name > "4"])
    (out / "scores.jsonl").write_text("".join((scored / "scores.jsonl").read_text().splitlines(True)[:4]))
    maps = read_maps(scored)
    maps[4:] = 0.0
    raw = (scored / "maps.safetensors").read_bytes()
    (out / "maps.safetensors").write_bytes(raw[: -maps.nbytes] + maps.tobytes())
    options = ("--explain", "--batch-size", "2", "--false-alarm-rate", "0.4")
    done = launch(["score", debug_run, images, "--out", out, *options], num_processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threshold") == 1
    assert "4 images are scored already" in done.stdout
    assert_same_scores(out, scored)


def test_more_processes_than_images(debug_run, scored, images, tmp_path):
    done = launch(["score", debug_run, images / "3.png", "--out", tmp_path], num_processes=2)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path)
    assert row["image"] == "3.png"
    expected = {row["image"]: row for row in read_rows(scored)}["3.png"]
    assert row["score"] == pytest.approx(expected["score"], rel=1e-4)
    assert read_maps(tmp_path).shape == (1, 4, 4)
    assert drawn(tmp_path) == {"3.png.png"}


def test_an_error_under_a_launcher_is_one_sentence(images, tmp_path):
    done = launch(["score", tmp_path / "nothing", images, "--out", tmp_path / "out"], num_processes=2, timeout_s=60)
    assert done.returncode != 0
    assert done.stderr.count("trajdist: ") == 1
    assert "name a run whose Phase 1 is done" in done.stderr
    assert "[rank1]: Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("there", "told"),
    [(6, "(6 on process 1, 5 on process 0)"), ("renamed", "(5 on process 1, 5 on process 0, by other names)")],
)
def test_processes_that_see_other_images(debug_run, tmp_path, there, told):
    """As in a folder that is being filled."""
    write_images(tmp_path / "here" / "images", 5)
    write_images(tmp_path / "there" / "images", 5 if there == "renamed" else there)
    if there == "renamed":
        (tmp_path / "there" / "images" / "0004.png").rename(tmp_path / "there" / "images" / "0005.png")
    env = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "PECULIAR": f"1:folder:{tmp_path / 'there'}"}
    command = ["score", debug_run, "images", "--out", tmp_path / "out"]
    done = launch(command, 2, timeout_s=60, env=env, cwd=tmp_path / "here", module="peculiar")
    assert done.returncode != 0
    assert done.stderr.count("trajdist: ") == 1, done.stderr
    assert f"the images of 'images' are not the same on all processes {told}: wait until" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_something_else_under_a_launcher(debug_run, scored, images, tmp_path):
    shutil.copytree(scored, tmp_path / "out")
    done = launch(["score", debug_run, images, "--out", tmp_path / "out"], num_processes=2, timeout_s=60)
    assert done.returncode != 0
    assert done.stderr.count("trajdist: ") == 1
    assert "[rank1]: Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ going on


def test_killed_and_started_again(debug_run, tmp_path, capsys, fresh_accelerate):
    """Two processes are killed on the way; one goes on."""
    folder = write_images(tmp_path / "images", 70)
    options = ("--batch-size", "1", "--explain", "--overlays")
    command = ["score", debug_run, folder, "--out", tmp_path / "out", *options, "all"]
    job = start(command, num_processes=2)
    rows, deadline = tmp_path / "out" / "scores.jsonl", time.monotonic() + 60
    while not rows.exists() or rows.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < deadline
        assert job.process.poll() is None
        time.sleep(0.002)
    job.kill()
    job.end()
    seen = rows.read_bytes().count(b"\n")
    assert 7 <= seen < 70, "it was to be killed on the way"
    begun = rows.read_bytes()[: rows.read_bytes().index(b"\n")]
    assert score(debug_run, folder, tmp_path / "out", *options, "all") == 0
    assert "images are scored already: resuming" in capsys.readouterr().out
    assert rows.read_bytes().startswith(begun), "what was done is not done again"
    assert score(debug_run, folder, tmp_path / "whole", *options, "all") == 0
    assert_same_scores(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("kept", "torn"), [(0, b'{"im'), (3, b""), (4, b'{"image": "b'), (9, b'{"score": 1.0}')])
def test_going_on_from_any_row(debug_run, scored, images, tmp_path, fresh_accelerate, kept, torn):
    """A kill may tear the last line, and comes before or after the maps of a step."""
    shutil.copytree(scored, tmp_path / "out")
    rows = tmp_path / "out" / "scores.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]) + torn)
    raw = bytearray((scored / "maps.safetensors").read_bytes())
    done = kept - kept % 4
    raw[len(raw) - (COUNT - done) * 64 :] = bytes((COUNT - done) * 64)
    (tmp_path / "out" / "maps.safetensors").write_bytes(raw)
    options = ("--explain", "--batch-size", "4", "--false-alarm-rate", "0.4")
    assert score(debug_run, images, tmp_path / "out", *options) == 0
    assert_same_scores(tmp_path / "out", scored)
    assert rows.read_bytes().count(b"\n") == COUNT
    np.testing.assert_array_equal(read_maps(tmp_path / "out")[:done], read_maps(scored)[:done])


def test_shards_are_scored_as_their_folder_and_go_on(
    debug_run, scored, images, tmp_path, monkeypatch, fresh_accelerate
):
    """Packed from it; interrupted within a shard."""
    shards, out, positions, score_batch = tmp_path / "shards", tmp_path / "out", [], trajdist.scoring.score.score_batch
    assert main(["pack", str(images), str(shards), "--shard-size", "40KB", "--workers", "1"]) == 0
    sizes = open_source(str(shards), "IMAGES").shard_sizes()
    assert len(sizes) > 2
    assert 4 not in np.cumsum(sizes)

    def interrupted(job, batch, places):
        positions.append(list(places))
        if len(positions) == 2:
            raise KeyboardInterrupt
        return score_batch(job, batch, places)

    monkeypatch.setattr(trajdist.scoring.score, "score_batch", interrupted)
    options = ("--explain", "--batch-size", "4", "--false-alarm-rate", "0.4", "--overlays", "none")
    assert score(debug_run, shards, out, *options) == 130
    assert len(read_rows(out)) == 4
    assert score(debug_run, shards, out, *options) == 0
    assert positions == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9, 10]]
    for row, expected in zip(read_rows(out), read_rows(scored), strict=True):
        shard, _, name = row.pop("image").partition("/")
        assert (shards / shard).is_file()
        assert {**row, "image": name} == expected
    np.testing.assert_array_equal(read_maps(out), read_maps(scored))


def test_a_finished_scoring_is_not_repeated(debug_run, scored, images, tmp_path, fresh_accelerate):
    shutil.copytree(scored, tmp_path / "out")
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    (tmp_path / "out" / "report.html").unlink()
    options = ("--explain", "--batch-size", "3", "--false-alarm-rate", "0.4")
    assert score(debug_run, images, tmp_path / "out", *options) == 0
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("kept", "told", "scored_again"),
    [
        (7, "4 images are scored already, and 3 unreadable ones are tried again", [[1, 2], [5]]),
        (5, "2 images are scored already, and 2 unreadable ones are tried again", [[4, 5], [6], [1, 2]]),
    ],
    ids=["finished", "interrupted"],
)
def test_unreadable_images_are_tried_again(
    debug_run, tmp_path, capsys, monkeypatch, fresh_accelerate, kept, told, scored_again
):
    """As after an outage of the disk: two of three can be read now. What could be read is not scored again."""
    folder, out, positions = write_images(tmp_path / "images", 7), tmp_path / "out", []
    sound = {folder / name: (folder / name).read_bytes() for name in ("0001.png", "0002.png", "0005.png")}

    def write(file: Path, raw: bytes) -> None:
        file.write_bytes(raw)
        os.utime(file, (0, 0))  # Files of the same size and age are the same ones.

    for file, raw in sound.items():
        write(file, bytes(len(raw)))
    assert score(debug_run, folder, out, "--batch-size", "2", "--explain") == 0
    lines = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(lines[:kept]))
    write(folder / "0001.png", sound[folder / "0001.png"])
    write(folder / "0005.png", sound[folder / "0005.png"])
    score_batch = trajdist.scoring.score.score_batch

    def recorded(job, batch, places):
        positions.append(list(places))
        return score_batch(job, batch, places)

    monkeypatch.setattr(trajdist.scoring.score, "score_batch", recorded)
    capsys.readouterr()
    assert score(debug_run, folder, out, "--batch-size", "2", "--explain") == 0
    assert positions == scored_again
    assert told in " ".join(capsys.readouterr().out.split())
    assert score(debug_run, folder, tmp_path / "whole", "--explain") == 0
    assert_same_scores(out, tmp_path / "whole")
    assert [row["image"] for row in read_rows(out) if "error" in row] == ["0002.png"]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("more images", f"holds the scores of {COUNT} images, and there are {COUNT + 1} now"),
        ("images", "holds the scores of another set of as many images"),
        ("files", "holds the scores of images of the same names in another folder, or before they changed"),
        ("rate", "was made for a false-alarm rate of 0.4, which is 0.3 now"),
        ("phase", "was made with another run, phase or adapter"),
        ("calibration", "was made with another calibration of the run"),
        ("explain", "was made with --explain"),
        ("overlays", "was made with --overlays all, which is none now"),
        ("transform", "was made by another version of trajdist, which turns images into pixels in another way"),
        ("version", "was written by another version of trajdist"),
    ],
)
def test_scores_of_something_else_are_not_mixed_in(
    debug_run, scored, images, tmp_path, capsys, fresh_accelerate, monkeypatch, other, told
):
    """The one sentence says in what they differ."""
    shutil.copytree(scored, tmp_path / "out")
    marker = tmp_path / "out" / "scoring.json"
    noted = json.loads(marker.read_text())
    if other == "calibration":
        noted["thresholds"] = ["1.5"]
    if other == "transform":
        del noted["transform"]
        monkeypatch.setattr(walking, "TRANSFORM", walking.TRANSFORM + 1)
    if other == "version":
        del noted["files"]
    marker.write_text(json.dumps(noted))
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    folder = images
    if other in ("more images", "images", "files"):
        folder = tmp_path / "images"
        shutil.copytree(images, folder)
    if other == "more images":
        noise(1).save(folder / "zzz.png")
    elif other == "images":
        (folder / "0.png").rename(folder / "zzz.png")
    options = ["--batch-size", "4", "--false-alarm-rate", "0.3" if other == "rate" else "0.4"]
    options += [] if other == "explain" else ["--explain"]
    options += ["--phase", "1"] if other == "phase" else []
    options += ["--overlays", "none"] if other == "overlays" else []
    assert score(debug_run, folder, tmp_path / "out", *options) == 2
    assert capsys.readouterr().err == f"trajdist: --out '{tmp_path / 'out'}' {told}: name another folder.\n"
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_an_image_that_was_changed(debug_run, tmp_path, capsys, fresh_accelerate):
    folder = write_images(tmp_path / "images", 2)
    assert score(debug_run, folder, tmp_path / "out") == 0
    noise(7).save(folder / "0001.png")
    assert score(debug_run, folder, tmp_path / "out") == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_a_batch_is_no_larger_than_the_set(debug_run, tmp_path, fresh_accelerate, monkeypatch):
    sizes, score_batch = [], Scorer.score_batch

    def recorded(scorer, images_BCSS):
        sizes.append(len(images_BCSS))
        return score_batch(scorer, images_BCSS)

    monkeypatch.setattr(Scorer, "score_batch", recorded)
    assert score(debug_run, write_images(tmp_path / "images", 2), tmp_path / "out") == 0
    assert max(sizes) == 2


def test_maps_that_were_lost(debug_run, scored, images, tmp_path, fresh_accelerate):
    """All are scored again: none of the maps is left empty."""
    shutil.copytree(scored, tmp_path / "out")
    (tmp_path / "out" / "maps.safetensors").unlink()
    options = ("--explain", "--batch-size", "4", "--false-alarm-rate", "0.4")
    assert score(debug_run, images, tmp_path / "out", *options) == 0
    assert_same_scores(tmp_path / "out", scored)


# --------------------------------------------------------------------------------------------- what is refused


def test_no_images(debug_run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert score(debug_run, tmp_path / "images", tmp_path / "out") == 3
    assert "holds no images" in capsys.readouterr().err
    assert score(debug_run, tmp_path / "missing", tmp_path / "out") == 3
    assert "missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_out_and_an_adapter_may_lie_at_home(debug_run, tmp_path, monkeypatch, fresh_accelerate, command):
    """The shell replaces ~ after a space alone, so not in --out=~/found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(debug_run / "phase2", tmp_path / "mine" / "phase2")
    images = write_images(tmp_path / "set" / "test" / "good", 2)
    given = images if command == "score" else tmp_path / "set"
    options = ["--out=~/found", "--adapter=~/mine/phase2/adapter"]
    assert main([command, str(debug_run), str(given), *options]) == 0
    assert len(read_rows(tmp_path / "found")) == 2
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_marker(debug_run, images, tmp_path, capsys, fresh_accelerate, text):
    (tmp_path / "scoring.json").write_text(text)
    assert score(debug_run, images, tmp_path) == 4
    assert "scoring.json" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0", "1", "-0.1", "nan", "often"])
def test_a_rate_that_is_none(debug_run, images, tmp_path, capsys, rate):
    with pytest.raises(SystemExit) as caught:
        score(debug_run, images, tmp_path / "out", f"--false-alarm-rate={rate}")
    assert caught.value.code == 2
    assert "--false-alarm-rate" in capsys.readouterr().err


def test_masks_are_not_scored(debug_run, tmp_path, capsys):
    for part in ("test/good", "ground_truth/hole"):
        write_images(tmp_path / "set" / part, 2)
    assert score(debug_run, tmp_path / "set", tmp_path / "out") == 3
    assert (
        f"masks would be scored as images: name a folder of images in it, such as {str(tmp_path / 'set' / 'test')!r}"
        in (capsys.readouterr().err)
    )
    assert not (tmp_path / "out").exists()


def test_masks_further_down_are_not_scored(debug_run, tmp_path, capsys):
    for part in ("test_public/good", "test_public/ground_truth/bad"):
        write_images(tmp_path / "set" / part, 2)
    assert score(debug_run, tmp_path / "set", tmp_path / "out") == 3
    told = capsys.readouterr().err
    assert f"contains {str(tmp_path / 'set' / 'test_public')!r}, a labelled set, and its masks would be scored" in told
    assert "such as" not in told


def test_a_lack_of_memory_is_one_sentence(debug_run, images, tmp_path, capsys, monkeypatch, fresh_accelerate):
    def allocate(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    monkeypatch.setattr(Scorer, "score_batch", allocate)
    assert score(debug_run, images, tmp_path / "out", "--batch-size=6") == 1
    said = capsys.readouterr().err
    assert said.startswith("trajdist: process 0 ran out of memory on cpu ([enforce fail")
    assert said.endswith("): use a --batch-size below 6.\n")


@pytest.mark.parametrize(
    ("device", "mend"),
    [("cpu", r"end other programs\."), ("cuda", "end other programs on it, or set ACCELERATE_USE_CPU=true to score")],
)
def test_a_run_that_does_not_fit_is_one_sentence(monkeypatch, device, mend):
    """On a GPU that other programs have filled, already the weights may be too much."""

    def full(*_):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(job, "load", full)
    processes = SimpleNamespace(rank=0, device=torch.device(device), main_first=lambda make: make())
    with pytest.raises(TrainingError, match=rf"^process 0 ran out of memory on {device} \(.*\): {mend}"):
        job._load("run", job.Options(), processes)


# ------------------------------------------------------------------------------------------ several adapters


@pytest.fixture(scope="module")
def brick(debug_run, tmp_path_factory) -> Path:
    """An adapter to another domain, on the same base."""
    run_dir = tmp_path_factory.mktemp("adapted") / "brick"
    command = ["adapt", "debug", f"run_dir={run_dir}", f"phase1={debug_run}", "data.domain.path=skimage:brick"]
    assert main([*command, "runtime.mixed_precision=no"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def compared(debug_run, brick, tmp_path_factory) -> Path:
    """Six crops of brick, then six of gravel, scored with the adapters for both."""
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("brick", "gravel"):
        source = open_source(f"skimage:{name}/heldout", "source")
        for index in range(6):
            source.load(index, None).save(folder / f"{name}-{index}.png")
    adapters = [option for run in (debug_run, brick) for option in ("--adapter", str(run / "phase2" / "adapter"))]
    assert score(debug_run, folder, folder / "out", *adapters, "--overlays", "none") == 0
    return folder


def test_a_column_per_adapter(compared, debug_run, brick):
    rows = read_rows(compared / "out")
    pictures = [Image.open(compared / row["image"]) for row in rows]
    assert len(rows) == 12
    for name, run in (("run", debug_run), ("brick", brick)):
        alone = trajdist.load(run, device="cpu")(pictures)
        columns = [row["adapters"][name] for row in rows]
        np.testing.assert_allclose([column["score"] for column in columns], alone.scores, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose([column["p_value"] for column in columns], alone.p_values)
    for row in rows:
        assert set(row["adapters"]) == {"run", "brick"}
        assert {key: row[key] for key in ("score", "p_value")} == row["adapters"]["run"], "the first one decides"


def test_the_best_fitting_domain_is_named(compared):
    rows = read_rows(compared / "out")
    for row in rows:
        best = max(row["adapters"].items(), key=lambda item: (item[1]["p_value"], -item[1]["score"]))
        assert row["best_adapter"] == best[0]
    shown = in_report(compared / "out")
    named = {row["image"]: name for row, name in zip(shown["rows"], shown["best_adapters"], strict=True)}
    assert named == {row["image"]: row["best_adapter"] for row in rows}
    assert (shown["summary"]["adapter"], shown["summary"]["compared with"]) == ("run", "brick")
    own = {"brick": "brick", "gravel": "run"}
    assert sum(row["best_adapter"] == own[row["image"].split("-")[0]] for row in rows) >= 10


@pytest.mark.parametrize(
    ("scores", "p_values", "best"),
    [
        ((9.0, 3.0), (1 / 5, 1 / 101), "many"),  # Odd to both, and less so to the one whose p-values reach lower.
        ((3.0, 9.0), (1 / 5, 1 / 101), "few"),
        ((9.0, 3.0), (2 / 5, 1 / 101), "few"),
        ((3.0, 9.0), (1 / 5, 30 / 101), "many"),
    ],
)
def test_the_best_adapter_is_not_the_one_with_the_fewest_images(scores, p_values, best):
    images = {name: SimpleNamespace(least_p_value=1 / (count + 1)) for name, count in (("few", 4), ("many", 100))}
    detectors = [SimpleNamespace(name=name, images=counted) for name, counted in images.items()]
    job: Any = SimpleNamespace(
        source=SimpleNamespace(name=str), thresholds=[1.0, 1.0], scorer=SimpleNamespace(detectors=detectors)
    )
    assert _row(job, 0, list(scores), list(p_values))["best_adapter"] == best


def test_evaluate_measures_each_adapter(compared, debug_run, brick, tmp_path, capsys):
    """Gravel is good; bricks are defects for the adapter to gravel alone."""
    for kind, name in (("good", "gravel"), ("bricks", "brick")):
        for picture in compared.glob(f"{name}-*.png"):
            (tmp_path / "set" / "test" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, tmp_path / "set" / "test" / kind)
    out = tmp_path / "out"
    adapters = [option for run in (debug_run, brick) for option in ("--adapter", str(run / "phase2" / "adapter"))]
    command = ["evaluate", str(debug_run), str(tmp_path / "set"), "--out", str(out), "--overlays", "none", *adapters]
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows, metrics = read_rows(out), read(out, "metrics.json")
    bad = [row["image"].startswith("test/bricks") for row in rows]
    for name in ("run", "brick"):
        scores, measured = [row["adapters"][name]["score"] for row in rows], metrics["adapters"][name]
        assert measured["image_auroc"] == pytest.approx(roc_auc_score(bad, scores), abs=metrics["binning_error"] + 1e-9)
        assert measured["image_ap"] == pytest.approx(average_precision_score(bad, scores), abs=0.02)
        assert measured["num_best"] == sum(row["best_adapter"] == name for row in rows)
        assert f"adapter {name}" in printed
    first, second = metrics["adapters"].values()
    assert first["image_auroc"] == metrics["image_auroc"] > 0.9
    assert second["image_auroc"] < 0.5


def test_adapters_of_runs_that_are_called_alike(debug_run, brick, images, tmp_path, fresh_accelerate):
    shutil.copytree(brick / "phase2", tmp_path / "run" / "phase2")
    adapters = [
        option for run in (debug_run, tmp_path / "run") for option in ("--adapter", str(run / "phase2" / "adapter"))
    ]
    assert score(debug_run, images, tmp_path / "out", *adapters, "--overlays", "none") == 0
    assert all(len(row["adapters"]) == 2 for row in read_rows(tmp_path / "out") if row["score"] is not None)


# ------------------------------------------------------------------------------------------- the guarantee


def alarm_interval(num_clean: int, num_new: int, rate: float) -> tuple[float, float]:
    """What 99.9 % of calibration sets and new images give, were scores continuous: a beta-binomial count."""
    called = math.floor(rate * (num_clean + 1) + 1e-9)
    law = betabinom(num_new, called, num_clean + 1 - called)
    return float(law.ppf(0.0005)), float(law.ppf(0.9995))


CLEAN, FRESH = 200, 400


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory) -> Path:
    """Trained on so few pictures that it knows them by heart, calibrated on 200 others."""
    folder = tmp_path_factory.mktemp("clean")
    write_images(folder / "images", 2 * CLEAN)
    command = ["train", "debug", f"run_dir={folder / 'run'}", f"data.imagenet.path={folder / 'images'}"]
    command += ["data.imagenet.num_samples=20", "data.imagenet.batch_size=20", "calibration.holdout_fraction=0.5"]
    assert main([*command, "runtime.mixed_precision=no", "data.imagenet.num_epochs=1"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def fresh(clean_run, tmp_path_factory) -> Path:
    """400 more pictures of the kind, scored."""
    folder = tmp_path_factory.mktemp("fresh")
    for number in range(FRESH):
        noise(10_000 + number).save(folder / f"{number:04d}.png")
    options = ("--overlays", "none", "--false-alarm-rate", "0.1", "--batch-size", "50")
    assert score(clean_run, folder, folder / "out", *options) == 0
    return folder / "out"


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1, 0.25, 0.5])
def test_false_alarms_of_a_run_are_as_often_as_asked(clean_run, fresh, rate):
    scorer = trajdist.load(clean_run, device="cpu")
    assert scorer.detectors[0].images.count == CLEAN
    assert scorer.detectors[0].held_out
    rows = read_rows(fresh)
    assert len(rows) == FRESH
    low, high = alarm_interval(CLEAN, FRESH, rate)
    assert low <= sum(row["p_value"] <= rate for row in rows) <= high
    if rate == 0.1:
        assert sum(row["is_anomalous"] for row in rows) == sum(row["p_value"] <= rate for row in rows)


def few_clean_scores(run: Path, folder: Path, count: int) -> Path:
    """The run, with a calibration from this many images."""
    shutil.copytree(run / "phase1", folder / "phase1")
    file = folder / "phase1" / "calibration.safetensors"
    histogram = ScoreHistogram()
    histogram.update(torch.arange(1.0, count + 1.0))
    write_tensors(file, read_tensors(file) | histogram.to_tensors("images"), read_document(file))
    return folder


def test_too_few_clean_images_declare_nothing_and_say_so(clean_run, tmp_path, capsys, fresh_accelerate):
    run = few_clean_scores(clean_run, tmp_path / "run", 9)
    folder = write_images(tmp_path / "images", 2)
    assert score(run, folder, tmp_path / "out", "--false-alarm-rate", "0.05", "--overlays", "anomalous") == 0
    assert "9 clean images are too few" in capsys.readouterr().out
    assert not any(row["is_anomalous"] for row in read_rows(tmp_path / "out"))
    assert score(run, folder, tmp_path / "default") == 0
    assert "for a false-alarm rate of 0.1" in capsys.readouterr().out, "the least that 9 images can answer for"


def test_no_p_value_is_told_as_0():
    """With imagenet.yaml 20,000 images are held out."""
    assert [told_p_value(p_value) for p_value in (1.0, 0.0109, 1 / 20_001)] == ["1.0000", "0.0109", "5e-05"]


def test_the_advised_rate_is_enough(clean_run, tmp_path, capsys, fresh_accelerate):
    run = few_clean_scores(clean_run, tmp_path / "run", 6)
    folder = write_images(tmp_path / "images", 1)
    assert score(run, folder, tmp_path / "out", "--false-alarm-rate", "0.01") == 0
    advised = re.search(r"--false-alarm-rate ([\d.]+) or more", capsys.readouterr().out)
    assert advised
    assert score(run, folder, tmp_path / "again", "--false-alarm-rate", advised.group(1)) == 0
    assert "too few" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- what is said besides


def test_unreadable_images_are_named(debug_run, tmp_path, capsys, fresh_accelerate):
    images = write_images(tmp_path / "images", 3)
    (images / "0001.png").rename(images / "\x1b[2J\n.png")
    (images / "\x1bzz.png").write_text("no picture")
    assert score(debug_run, images, tmp_path / "out") == 0
    written = capsys.readouterr().out
    assert "\x1b" not in written, "no terminal clears its screen because of a name"
    said = " ".join(written.split())
    assert r"\x1b[2J\n.png" in said
    assert r"1 of 4 images could not be read: \x1bzz.png (UnidentifiedImageError" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert '"num_unreadable": 1' in page
    assert "zz.png" in page


def test_an_output_folder_serves_one_command_at_a_time(debug_run, tmp_path, capsys, fresh_accelerate):
    images, out = write_images(tmp_path / "images", 3), tmp_path / "out"
    out.mkdir()
    hold = "import pathlib, sys; from trajdist import files; files.hold(pathlib.Path(sys.argv[1])); print(flush=True)"
    command = [sys.executable, "-c", f"{hold}; sys.stdin.read()", str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert score(debug_run, images, out) == 4
        assert "is being written by another command" in capsys.readouterr().err
        other.stdin.close()
    assert score(debug_run, images, out) == 0


def test_scoring_says_when_the_clean_images_were_trained_on(tmp_path, capsys, fresh_accelerate):
    images, run_dir = write_images(tmp_path / "images", 6), tmp_path / "run"
    keys = [f"data.imagenet.path={images}", "data.imagenet.num_samples=-1", "calibration.holdout_fraction=0"]
    assert main(["train", "debug", f"run_dir={run_dir}", *keys]) == 0
    capsys.readouterr()
    assert score(run_dir, images, tmp_path / "out") == 0
    assert "phase1 was trained on these clean images" in " ".join(capsys.readouterr().out.split())
