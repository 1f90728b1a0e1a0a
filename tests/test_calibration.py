"""Conformal p-values and thresholds: never too small, as often wrong as asked for, whatever the processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import write_images

from trajdist.cli import main
from trajdist.scoring.calibration import QuantileSketch
from trajdist.scoring.histogram import ScoreHistogram

SCORES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=0, max_size=40)


def sketch(scores) -> QuantileSketch:
    histogram = ScoreHistogram()
    histogram.update(torch.as_tensor(np.asarray(scores, np.float32)))
    return QuantileSketch(histogram)


def exact_p_values(clean, scores) -> np.ndarray:
    clean, scores = np.asarray(clean, np.float32), np.asarray(scores, np.float32)
    return (1 + (clean[None, :] >= scores[:, None]).sum(1)) / (len(clean) + 1)


@settings(max_examples=40)
@given(SCORES, SCORES)
def test_p_values_are_never_too_small(clean, scores):
    ours = sketch(clean).p_values(torch.tensor(scores, dtype=torch.float32)).numpy()
    assert (ours >= exact_p_values(clean, scores)).all()
    assert (ours <= 1).all()


@settings(max_examples=40)
@given(SCORES, SCORES)
def test_p_values_fall_as_scores_rise(clean, scores):
    ours = sketch(clean).p_values(torch.tensor(sorted(scores), dtype=torch.float32))
    assert (ours.diff() <= 0).all()


def test_p_values_are_exact_up_to_the_width_of_a_bin():
    generator = np.random.default_rng(0)
    clean, scores = generator.gamma(3.0, size=2000), generator.gamma(3.0, size=2000)
    ours = sketch(clean).p_values(torch.from_numpy(scores)).numpy()
    assert (ours <= exact_p_values(clean, scores * (1 - 1.1e-3))).all()
    assert ours.min() >= 1 / 2001


@settings(max_examples=40)
@given(SCORES, SCORES, st.floats(0.001, 1))
def test_threshold_and_p_value_are_one_decision(clean, scores, rate):
    ours = sketch(clean)
    scores_N = torch.tensor([*scores, *clean, 1e30], dtype=torch.float32)
    assert torch.equal(scores_N >= ours.threshold(rate), ours.p_values(scores_N) <= rate)


def test_too_few_images_declare_nothing():
    clean = np.arange(99)
    assert math.isinf(sketch(clean).threshold(0.0099))
    assert 98 < sketch(clean).threshold(0.01) <= 98.1
    assert math.isinf(sketch([]).threshold(0.5))
    assert sketch([]).p_values(torch.tensor([1e9])) == 1


def test_a_clean_score_that_is_not_finite_leaves_the_largest_scores_undeclared():
    ours = sketch([1.0, 2.0, np.inf])
    assert math.isinf(ours.threshold(0.25))
    assert ours.p_values(torch.tensor([1e30, np.nan])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_realised_false_alarms_are_what_was_asked_for(rate):
    generator = np.random.default_rng(1)
    num_clean, num_new, alarms = 400, 400, 0
    repeats = 40
    for _ in range(repeats):
        threshold = sketch(generator.lognormal(size=num_clean)).threshold(rate)
        alarms += (generator.lognormal(size=num_new) >= threshold).sum()
    # Given one calibration set the rate is itself random: both draws add to the variance of the total.
    spread = math.sqrt(rate * (1 - rate) * (1 / num_new + 1 / num_clean) / repeats)
    realised = alarms / (repeats * num_new)
    assert realised <= rate + 3 * spread
    assert realised >= rate - 1 / num_clean - 3 * spread - 0.002 * rate


def test_p_values_of_clean_scores_are_spread_evenly():
    generator = np.random.default_rng(2)
    p_values = sketch(generator.normal(size=3000)).p_values(torch.from_numpy(generator.normal(size=3000))).numpy()
    for rate in (0.01, 0.1, 0.5, 0.9):
        assert abs((p_values <= rate).mean() - rate) < 4 * math.sqrt(2 * rate * (1 - rate) / 3000)


def test_two_processes_ask_one_sketch():
    first, second = sketch([1.0, 2.0]), sketch([3.0])
    first.histogram.all_reduce(lambda tensor: tensor + second.histogram.counts_K)
    assert first.count == 3
    assert first.p_values(torch.tensor([2.0])) == 0.75


@pytest.mark.parametrize(("first", "says"), [("all", True), ("all/parts", False), ("others", False)])
def test_it_is_said_if_phase_1_has_seen_what_phase_2_holds_out(tmp_path, capsys, fresh_accelerate, first, says):
    parts = write_images(tmp_path / "all" / "parts", 10)
    write_images(tmp_path / "others", 10)
    sets = [f"data.imagenet.path={tmp_path / first}", f"data.domain.path={parts}", "calibration.holdout_fraction=0.3"]
    assert main(["run", "debug", f"run_dir={tmp_path / 'run'}", *sets, "data.image_size=32"]) == 0
    said = "phase 1 was trained on images that are held out here" in capsys.readouterr().out
    assert said == says
