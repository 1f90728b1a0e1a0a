"""Binned metrics against exact ones, of scikit-learn or as defined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import aupro, best_f1, laid_on, shares_of_regions
from scipy.stats import binom
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from trajdist.data.regions import BAND, region_shares
from trajdist.errors import ArtifactError
from trajdist.scoring.histogram import MANTISSA_BITS, ScoreHistogram, bins_of, lower_edges, plot_bins
from trajdist.scoring.metrics import Curve, PixelScores, bootstrap_interval, curve

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def histogram(scores) -> ScoreHistogram:
    filled = ScoreHistogram()
    filled.update(torch.as_tensor(np.asarray(scores, np.float32)))
    return filled


def curve_of(scores, labels) -> Curve:
    scores, labels = np.asarray(scores, np.float32), np.asarray(labels, bool)
    return curve(anomalous=histogram(scores[labels]), clean=histogram(scores[~labels]))


def assert_like_sklearn(scores, labels, tolerance: float) -> None:
    ours = curve_of(scores, labels)
    assert ours.area() == pytest.approx(roc_auc_score(labels, scores), abs=tolerance)
    assert ours.average_precision() == pytest.approx(average_precision_score(labels, scores), abs=tolerance)
    assert ours.best_f1() == pytest.approx(best_f1(labels, scores), abs=tolerance)


# ------------------------------------------------------------------------------------------------- the bins


@given(st.lists(FLOATS, min_size=2, max_size=50))
def test_bins_are_in_the_order_of_the_scores(values):
    scores = torch.tensor(sorted(values), dtype=torch.float32)
    bins = bins_of(scores)
    assert (bins.diff() >= 0).all()
    assert (lower_edges(bins) <= scores).all()
    assert (lower_edges(bins + 1) > scores)[scores < 3.4e38].all()
    assert torch.equal(bins_of(lower_edges(bins)), bins)


@given(FLOATS)
def test_a_bin_is_as_narrow_as_promised(value):
    score = torch.tensor([value], dtype=torch.float32)
    bins = bins_of(score)
    lower, upper = lower_edges(bins).double(), lower_edges(bins + 1).double()
    if upper.isfinite():
        smaller = torch.minimum(lower.abs(), upper.abs())
        assert upper - lower <= max(1.01 * 2.0**-MANTISSA_BITS * smaller, 2e-41)


def test_zero_has_one_sign_and_what_is_not_finite_counts_as_the_largest_float():
    assert bins_of(torch.tensor(-0.0)) == bins_of(torch.tensor(0.0))
    largest = torch.finfo(torch.float32).max
    extremes = torch.tensor([-torch.inf, -largest, largest, torch.inf, torch.nan, -torch.nan])
    first, second, *rest = bins_of(extremes).tolist()
    assert first == second
    assert len(set(rest)) == 1
    assert histogram(extremes).counts_K.sum() == 6


def test_parts_added_or_reduced_are_the_whole():
    scores = torch.randn(1000)
    weights = torch.rand(1000)
    whole, left, right = ScoreHistogram(), ScoreHistogram(), ScoreHistogram()
    whole.update(scores.view(10, 100), weights.view(10, 100))
    left.update(scores[:300], weights[:300])
    right.update(scores[300:], weights[300:])
    torch.testing.assert_close((left + right).counts_K, whole.counts_K)
    left.all_reduce(lambda tensor: tensor + right.counts_K)
    torch.testing.assert_close(left.counts_K, whole.counts_K)


def test_weight_zero_does_not_count():
    empty = ScoreHistogram()
    empty.update(torch.tensor([1.0, torch.nan]), torch.zeros(2))
    assert empty.counts_K.sum() == 0


def test_plot_bins_hold_every_score():
    edges, counts = plot_bins({"clean": histogram([0.1, 0.2, 5.0]), "test": histogram([9.0]), "none": histogram([])})
    assert len(edges) == 61
    assert (np.diff(edges) > 0).all()
    assert {name: parts.sum() for name, parts in counts.items()} == {"clean": 3, "test": 1, "none": 0}
    assert np.diff(np.log(edges)).std() < 1e-6, "wide positive ranges are spaced geometrically"


@pytest.mark.parametrize("scores", [[], [0.0], [2.0, 2.0], [-3.0, 4.0]])
def test_plot_bins_of_hardly_anything(scores):
    edges, counts = plot_bins({"test": histogram(scores)})
    assert (np.diff(edges) > 0).all()
    assert counts["test"].sum() == len(scores)


def test_a_histogram_survives_saving(tmp_path):
    saved = histogram([-2.5, 0.0, 0.0, 7.0])
    again = ScoreHistogram.from_tensors(saved.to_tensors("image"), "image", tmp_path)
    assert torch.equal(again.counts_K, saved.counts_K)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image.edges": None}, "lacks"),
        ({"image.counts": torch.tensor([1.0])}, "damaged"),
        ({"image.counts": torch.tensor([1.0, -1.0], dtype=torch.float64)}, "damaged"),
        ({"image.counts": torch.tensor([1.0, torch.nan], dtype=torch.float64)}, "damaged"),
        ({"image.counts": torch.tensor([1.0, 2.0**53], dtype=torch.float64)}, "damaged"),
        ({"image.edges": torch.tensor([1.0, torch.inf])}, "damaged"),
        ({"image.edges": torch.tensor([1.0, 2.0001])}, "other bins"),
        ({"image.edges": torch.tensor([2.0, 1.0])}, "other bins"),
        ({"image.edges": torch.tensor([1.0, 1.0])}, "other bins"),
    ],
)
def test_a_damaged_histogram_is_refused(tmp_path, change, words):
    tensors = {**histogram([1.0, 2.0]).to_tensors("image"), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ArtifactError, match=words):
        ScoreHistogram.from_tensors(tensors, "image", tmp_path / "calibration.safetensors")


# ---------------------------------------------------------------------------------------- image-level metrics


@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_many_scores(offset):
    generator = np.random.default_rng(0)
    labels = generator.random(5000) < 0.2
    scores = (offset + generator.gamma(2.0 + labels)).astype(np.float32)
    assert_like_sklearn(scores, labels, 2e-3)
    ours = curve_of(scores, labels)
    assert abs(ours.area() - roc_auc_score(labels, scores)) <= ours.tied_share / 2 + 1e-12


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=2, max_size=30))
def test_tiny_sets_with_ties_are_exact(pairs):
    scores, labels = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    if labels.any() and not labels.all():
        assert_like_sklearn(scores, labels, 1e-12)


def test_constant_scores_tell_nothing():
    ours = curve_of(np.full(10, 0.7), np.arange(10) < 3)
    assert ours.area() == pytest.approx(0.5)
    assert ours.average_precision() == pytest.approx(0.3)
    assert ours.tied_share == 1
    assert len(ours.roc_points()) == 2
    assert ours.pr_points() == [(0.0, pytest.approx(0.3)), (1.0, pytest.approx(0.3))], "a line, not a dot"


def test_one_class_only():
    anomalous, clean, empty = curve_of([1, 2], [1, 1]), curve_of([1, 2], [0, 0]), curve_of([], [])
    assert [part.area() for part in (anomalous, clean, empty)] == [None] * 3
    assert (anomalous.average_precision(), clean.average_precision(), empty.average_precision()) == (1.0, None, None)
    assert anomalous.best_f1() == 1.0
    assert clean.best_f1() is None
    assert (anomalous.roc_points(), clean.roc_points(), clean.pr_points(), empty.pr_points()) == ([], [], [], [])
    assert bootstrap_interval(clean, Curve.area) is None
    assert all(part.tied_share == 0 for part in (anomalous, clean, empty))


def test_plot_points_are_few_and_trace_the_curve():
    generator = np.random.default_rng(1)
    labels = generator.random(20000) < 0.3
    scores = generator.random(20000) + 0.4 * labels
    ours = curve_of(scores, labels)
    rate, recall = np.array(ours.roc_points()).T
    assert len(rate) <= 200
    assert (rate[0], recall[0], rate[-1], recall[-1]) == (0, 0, 1, 1)
    assert auc(rate, recall) == pytest.approx(ours.area(), abs=2e-3)
    recall, precision = np.array(ours.pr_points()).T
    assert len(recall) <= 200
    assert (recall[0], recall[-1]) == (0, 1)
    assert auc(recall, precision) == pytest.approx(ours.average_precision(), abs=1e-2)


def test_the_bootstrap_covers_and_repeats():
    generator = np.random.default_rng(2)
    labels = np.arange(300) < 100
    scores = generator.normal(labels * 1.0)
    ours = curve_of(scores, labels)
    low, high = bootstrap_interval(ours, Curve.area, num_samples=400)
    assert low < ours.area() < high
    assert (low, high) == bootstrap_interval(ours, Curve.area, num_samples=400)
    # Hanley & McNeil (1982): the standard error of an AUROC of 0.76 from 100 and 200 images is about 0.03.
    assert 0.08 < high - low < 0.16
    drawn = []
    for _ in range(400):
        chosen = np.concatenate([generator.integers(0, 100, 100), generator.integers(100, 300, 200)])
        drawn.append(roc_auc_score(labels[chosen], scores[chosen]))
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx([low, high], abs=0.015)


def test_the_interval_of_a_coin_is_that_of_the_binomial():
    """Half of the defects score above all that is clean, half below: the AUROC is the share drawn of the former."""
    ours = curve_of([1, 3] * 200 + [2], [1, 1] * 200 + [0])
    expected = binom.ppf([0.025, 0.975], 400, 0.5) / 400
    # At 90 % either end would be 0.008 nearer.
    assert bootstrap_interval(ours, Curve.area, num_samples=4000) == pytest.approx(expected, abs=0.004)


def test_a_perfect_score_has_an_interval_of_no_width():
    assert bootstrap_interval(curve_of([1, 2, 8, 9], [0, 0, 1, 1]), Curve.area) == (1.0, 1.0)


# ---------------------------------------------------------------------------------------- pixel-level metrics


def random_maps(seed: int, levels: int | None = None):
    generator = np.random.default_rng(seed)
    masks = generator.random((4, 24, 24)) < 0.12
    masks[3] = False
    maps = (generator.random((4, 24, 24)) + 0.5 * masks).astype(np.float32)
    if levels:
        maps = np.floor(maps * levels).astype(np.float32)
    return maps, masks


def filled_pixels(maps, masks) -> PixelScores:
    pixels = PixelScores()
    for map_SS, mask_SS in zip(maps, masks, strict=True):
        pixels.update(torch.from_numpy(map_SS), mask_SS, region_shares(mask_SS, len(mask_SS)))
    return pixels


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_the_exact_one(levels, limit):
    maps, masks = random_maps(5, levels)
    pixels = filled_pixels(maps, masks)
    assert curve(pixels.regions, pixels.clean).area(limit) == pytest.approx(aupro(masks, maps, limit), abs=1e-3)
    assert pixels.aupro() == pytest.approx(aupro(masks, maps), abs=1e-3)


def test_aupro_weighs_regions_alike():
    maps, masks = np.zeros((1, 10, 10), np.float32), np.zeros((1, 10, 10), bool)
    masks[0, :6, :6] = masks[0, 9, 9] = True
    maps[0, 9, 9] = 1.0
    # Before the first false alarm half of the regions is found; then everything at once.
    assert filled_pixels(maps, masks).aupro() == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_pixels_are_those_of_sklearn_and_add_up():
    maps, masks = random_maps(6)
    whole = filled_pixels(maps, masks)
    parts = filled_pixels(maps[:1], masks[:1]) + filled_pixels(maps[1:], masks[1:])
    reduced = filled_pixels(maps[:2], masks[:2])
    rest = filled_pixels(maps[2:], masks[2:])
    theirs = iter([rest.clean.counts_K, rest.anomalous.counts_K, rest.regions.counts_K])
    reduced.all_reduce(lambda tensor: tensor + next(theirs))
    for pixels in (whole, parts, reduced):
        assert pixels.curve().area() == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-3)
        assert pixels.aupro() == pytest.approx(whole.aupro())


def test_no_regions_no_aupro():
    maps, masks = random_maps(7)
    assert filled_pixels(maps, np.zeros_like(masks)).aupro() is None


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.0, 1.0))
def test_regions_are_those_of_scipy(seed, side, density):
    mask = np.random.default_rng(seed).random((side, side)) < density
    np.testing.assert_array_equal(region_shares(mask, side), shares_of_regions(mask))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.floats(0.0, 1.0))
def test_regions_are_those_of_the_mask_at_its_own_size(seed, height, width, size, density):
    """Laid on a map whose pixels are whole ones of the mask, or parts of one, they are summed, or spread out."""
    mask = np.random.default_rng(seed).random((height * size, width * size)) < density
    shares = shares_of_regions(mask)
    summed = shares.reshape(size, height, size, width).sum((1, 3))
    np.testing.assert_allclose(region_shares(mask, size), summed, atol=1e-12)
    small = mask[:size, :size]
    spread = shares_of_regions(small).repeat(height, 0).repeat(height, 1) / height**2
    np.testing.assert_allclose(region_shares(small, size * height), spread, atol=1e-12)
    np.testing.assert_allclose(region_shares(small, size + 2), laid_on(shares_of_regions(small), size + 2), atol=1e-12)


@pytest.mark.parametrize("empty", [slice(0), slice(BAND), slice(BAND, 2 * BAND), slice(2 * BAND, None)])
def test_regions_of_many_rows(empty):
    mask = np.random.default_rng(0).random((2 * BAND + 88, 2 * BAND + 88)) < 0.3
    mask[empty] = False
    mask[:, :60] = mask[:, -9:] = False
    np.testing.assert_allclose(region_shares(mask, len(mask)), shares_of_regions(mask), rtol=1e-12)
    np.testing.assert_allclose(region_shares(mask, 75), laid_on(shares_of_regions(mask), 75), atol=1e-12)


def test_aupro_of_a_hairline_that_is_missed():
    """In a mask of the map's size it would be so many dots, each with the weight of the defect that is found."""
    truths, maps = [], np.zeros((2, 32, 32), np.float32)
    for number in range(2):
        mask = np.zeros((256, 256), bool)
        if number:
            mask[np.arange(200), np.arange(200)] = True
        else:
            mask[96:160, 96:160] = True
            maps[number, 12:20, 12:20] = 1.0
        truths.append((mask[4::8, 4::8], region_shares(mask, 32)))
    pixels = PixelScores()
    for map_SS, truth in zip(maps, truths, strict=True):
        pixels.update(torch.from_numpy(map_SS), *truth)
    assert pixels.regions.counts_K.sum() == pytest.approx(2)
    # Half of the two is found without a false alarm; then everything at once.
    assert pixels.aupro() == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_a_long_spiral_is_one_region():
    mask = np.zeros((101, 101), bool)
    y = x = 0
    for number, length in enumerate([100, 100, 100] + [side for side in range(98, 2, -2) for _ in range(2)]):
        dy, dx = [(0, 1), (1, 0), (0, -1), (-1, 0)][number % 4]
        for _ in range(length):
            mask[y, x] = True
            y, x = y + dy, x + dx
    assert np.unique(region_shares(mask, 101)[mask]) == pytest.approx([1 / mask.sum()])
