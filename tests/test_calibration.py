"""Conformal p-values and thresholds: never too small, as often wrong as asked for, whatever the processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import write_images
from scipy.stats import betabinom

from trajdist.cli import main
from trajdist.config_files import load_config
from trajdist.data.sources import open_source
from trajdist.saved.rundir import RunDir
from trajdist.scoring.calibration import QuantileSketch
from trajdist.scoring.histogram import ScoreHistogram
from trajdist.training.selection import Phase1Images

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


@pytest.mark.parametrize("count", [0, 2, 6, 99])
def test_the_rate_that_users_are_told_flags_something(count):
    """The reciprocal of the number of clean scores would be too small a rate by one score, and so may a rounded one."""
    ours = sketch(np.arange(count))
    assert ours.p_values(torch.tensor([1e9])) == ours.least_p_value
    assert ours.threshold(ours.least_p_value) < math.inf == ours.threshold(0.999 * ours.least_p_value)
    assert ours.least_p_value <= float(ours.least_rate) < 1.1 * ours.least_p_value


def test_a_clean_score_that_is_not_finite_leaves_the_largest_scores_undeclared():
    ours = sketch([1.0, 2.0, np.inf])
    assert math.isinf(ours.threshold(0.25))
    assert ours.p_values(torch.tensor([1e30, np.nan])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("num_clean", "rate"), [(19, 0.05), (30, 0.1), (99, 0.05), (400, 0.01)])
def test_alarms_of_exchangeable_scores(num_clean, rate):
    """Many calibrations, a few new scores of each: on average as often as asked, and not more often."""
    generator = np.random.default_rng(num_clean)
    repeats, num_new = 300, 50
    alarms = p_alarms = 0
    for _ in range(repeats):
        # One draw for both: nothing but exchangeability is used.
        scores = torch.from_numpy(generator.gamma(2.0, size=num_clean + num_new).astype(np.float32))
        ours = sketch(scores[:num_clean])
        alarms += int((scores[num_clean:] >= ours.threshold(rate)).sum())
        p_alarms += int((ours.p_values(scores[num_clean:]) <= rate).sum())
    assert alarms == p_alarms
    called = math.floor(rate * (num_clean + 1) + 1e-9)
    law = betabinom(num_new, called, num_clean + 1 - called)
    expected, spread = repeats * law.mean(), math.sqrt(repeats * law.var())
    assert expected <= repeats * num_new * rate * (1 + 1e-9)
    assert alarms <= expected + 3.3 * spread
    # All of a bin counts as at least the score: at most 0.1 % of the score's worth of alarms is lost.
    assert alarms >= 0.97 * expected - 3.3 * spread


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_ties_never_raise_more_alarms(rate):
    """Scores of five values only, as of a blank product."""
    generator = np.random.default_rng(7)
    alarms, repeats, num_new = 0, 200, 50
    for _ in range(repeats):
        scores = torch.from_numpy(generator.integers(1, 6, 60 + num_new).astype(np.float32))
        alarms += int((sketch(scores[:60]).p_values(scores[60:]) <= rate).sum())
    called = math.floor(rate * 61)
    law = betabinom(num_new, called, 61 - called)
    assert alarms <= repeats * law.mean() + 3.3 * math.sqrt(repeats * law.var())


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


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("data.domain.num_epochs=7", True),
        ("seed=1", False),
        ("calibration.holdout_fraction=0.31", False),
        ("trajectory.statistics_images=3", False),
        ("data.imagenet.path=skimage:gravel/heldout", False),
    ],
)
def test_what_decides_which_images_are_held_out(debug_run, changed, same):
    """Phase 2 takes the split of Phase 1 over only if it would hold out the same images."""
    config = load_config("debug", [changed])
    source = open_source(config.data.imagenet.path, "data.imagenet.path")
    assert Phase1Images.below(RunDir(debug_run), config).are(source, config) == same


SAYS = "phase 1 may have been trained on images that are held out here"
SMALL = (
    "data.image_size=32",
    "calibration.holdout_fraction=0.3",
    "data.domain.num_epochs=1",
    "data.imagenet.num_epochs=1",
)


@pytest.fixture
def folders(tmp_path) -> Path:
    write_images(tmp_path / "all" / "parts", 10)
    write_images(tmp_path / "others", 11)
    return tmp_path


def held_out_by(run_dir: Path) -> int | None:
    """The phase whose split Phase 2 has taken over."""
    return json.loads((run_dir / "run.json").read_text())["domain"].get("split_of")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [("all", "all/parts", True), ("all/parts", "all", True), ("all", "all", False), ("others", "all", False)],
)
def test_it_is_said_if_phase_1_has_seen_what_phase_2_holds_out(folders, capsys, fresh_accelerate, first, second, says):
    sets = [f"data.imagenet.path={folders / first}", f"data.domain.path={folders / second}"]
    assert main(["run", "debug", f"run_dir={folders / 'run'}", *sets, *SMALL]) == 0
    assert (SAYS in capsys.readouterr().out) == says


def test_phases_of_several_runs_hold_out_the_same_images(folders, capsys, fresh_accelerate):
    """Adapted in another run, or as one of several domains; and what may have been trained on is said."""
    parts, base = folders / "all" / "parts", folders / "base"
    domains = [f"data.domains.{name}.path={folders / path}" for name, path in (("same", parts), ("other", "others"))]
    common = ["debug", f"data.imagenet.path={parts}", *SMALL]
    assert main(["run", *common, f"run_dir={base}", "data.domain.path=null", *domains]) == 0
    assert [held_out_by(base / "domains" / name) for name in ("same", "other")] == [1, None]
    adapt = ["adapt", *common, f"phase1={base}"]
    assert main([*adapt, f"run_dir={folders / 'adapted'}", f"data.domain.path={parts}"]) == 0
    assert held_out_by(folders / "adapted") == 1
    assert SAYS not in capsys.readouterr().out
    # With another seed they hold out others. Where Phase 1's images are now does not matter.
    (folders / "loop").symlink_to("loop")
    another = [f"run_dir={folders / 'another'}", f"data.domain.path={parts}", "data.imagenet.path=loop", "seed=1"]
    assert main([*adapt, *another]) == 0
    assert held_out_by(folders / "another") is None
    assert SAYS in capsys.readouterr().out
