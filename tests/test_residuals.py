"""From residuals to scores: moments that add up, whitening that makes clean places alike, maps in clean units."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trajdist.extraction.projection import BlockMoments
from trajdist.scoring.residuals import (
    HOTTEST_SHARE,
    PlaceMoments,
    ResidualModel,
    deepest_first,
    image_scores,
    roots,
    upsample,
)

CPU = torch.device("cpu")
WIDTHS = [3, 2, 4]
SIDE = 4
PLACES, ENTRIES = SIDE**2, sum(WIDTHS)


def valid(widths: list[int] = WIDTHS) -> torch.Tensor:
    return torch.arange(max(widths))[None, :] < torch.tensor(widths)[:, None]


def gaussian(seed: int, num_images: int, offset: float = 2.0) -> torch.Tensor:
    """Residuals ``[B, P, F]``: a mean at every place, one covariance of full rank."""
    fixed = torch.Generator().manual_seed(0)
    mix_FF = torch.randn(ENTRIES, ENTRIES, generator=fixed) + 2 * torch.eye(ENTRIES)
    mean_PF = offset * torch.randn(PLACES, ENTRIES, generator=fixed)
    draws = torch.randn(num_images, PLACES, ENTRIES, generator=torch.Generator().manual_seed(seed))
    return draws @ mix_FF + mean_PF


def moments_of(*batches: torch.Tensor) -> PlaceMoments:
    moments = PlaceMoments(PLACES, ENTRIES, CPU)
    for rows_BPF in batches:
        moments.update(rows_BPF.flatten(0, 1), torch.ones(len(rows_BPF)))
    return moments


def reduce_together(*parts: PlaceMoments) -> None:
    """As processes do it: each asks for the same sums in the same order and waits for the others."""
    slots: list[torch.Tensor] = [torch.empty(0)] * len(parts)
    barrier = Barrier(len(parts), timeout=30)

    def add_up(rank: int, tensor: torch.Tensor) -> torch.Tensor:
        slots[rank] = tensor.clone()
        barrier.wait()
        total = sum(slots[1:], slots[0].clone())
        barrier.wait()
        return total

    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda rank: parts[rank].all_reduce(partial(add_up, rank)), range(len(parts))))


def assert_same(one: PlaceMoments, other: PlaceMoments) -> None:
    torch.testing.assert_close(one.mean_PF, other.mean_PF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.covariance_FF, other.covariance_FF, rtol=1e-5, atol=1e-4)
    assert one.images == other.images


def fitted(rows_BPF: torch.Tensor) -> ResidualModel:
    """Both passes of the calibration."""
    model = ResidualModel(valid().sum(1).tolist(), SIDE)
    model.fit(moments_of(rows_BPF))
    usual = BlockMoments(PLACES, CPU)
    usual.update(roots(model.energies(rows_BPF.flatten(0, 1))), torch.ones(len(rows_BPF)))
    model.fit_places(usual)
    return model


# ---------------------------------------------------------------------------------------------- the moments


def test_place_moments_are_those_of_numpy():
    rows_BPF = gaussian(1, 37)
    moments = moments_of(rows_BPF[:5], rows_BPF[5:30], rows_BPF[30:])
    rows = rows_BPF.double().numpy()
    np.testing.assert_allclose(moments.mean_PF, rows.mean(0), atol=1e-5)
    centred = (rows - rows.mean(0)).reshape(-1, ENTRIES)
    np.testing.assert_allclose(moments.covariance_FF, centred.T @ centred / len(centred), rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 23), max_size=6), st.integers(0, 24))
def test_place_moments_do_not_depend_on_batches_or_processes(cuts, border):
    rows_BPF = gaussian(2, 24)
    edges = sorted({0, border, *cuts, 24})
    parts = [(start, rows_BPF[start:stop]) for start, stop in pairwise(edges)]
    first = moments_of(*(part for start, part in parts if start < border))
    second = moments_of(*(part for start, part in parts if start >= border))
    reduce_together(first, second)
    assert_same(second, moments_of(rows_BPF))
    assert_same(first, moments_of(rows_BPF))


def test_images_of_weight_0_do_not_count():
    rows_BPF = gaussian(3, 20)
    weights = torch.tensor([1.0, 0.0] * 10)
    spoilt_BPF = torch.where(weights[:, None, None] > 0, rows_BPF, 1e3)
    moments = PlaceMoments(PLACES, ENTRIES, CPU)
    moments.update(spoilt_BPF[:8].flatten(0, 1), weights[:8])
    moments.update(spoilt_BPF[8:].flatten(0, 1), weights[8:])
    moments.update(spoilt_BPF.flatten(0, 1), torch.zeros(20))
    assert_same(moments, moments_of(rows_BPF[::2]))


def test_moments_of_no_image_are_finite():
    empty = moments_of()
    empty.update(torch.ones(PLACES, ENTRIES), torch.zeros(1))
    assert empty.mean_PF.isfinite().all()
    assert empty.covariance_FF.isfinite().all()


# ------------------------------------------------------------------------------------------------ whitening


def test_fresh_clean_residuals_have_mean_energy_1():
    model = fitted(gaussian(4, 1500))
    energies_BPL = model.energies(gaussian(5, 1500).flatten(0, 1))
    assert energies_BPL.shape == (1500, PLACES, len(WIDTHS))
    # 24,000 places: the mean of a chi-square with 2 degrees of freedom, divided by 2, has a spread of 0.0065.
    np.testing.assert_allclose(energies_BPL.mean((0, 1)), 1.0, atol=0.03)


def test_energies_are_those_of_the_textbook():
    """Of the Cholesky factor, deepest block first: the deepest block's energy is its own Mahalanobis length."""
    rows_BPF = gaussian(6, 300)
    model = fitted(rows_BPF)
    moments = moments_of(rows_BPF)
    covariance = moments.covariance_FF.numpy()
    shrunk = covariance + 0.1 * moments.all.covariance_CC.diagonal().mean().item() * np.eye(ENTRIES)
    residual = gaussian(7, 1)[0].double().numpy() - moments.mean_PF.numpy()
    ends = np.cumsum(WIDTHS)
    found = model.energies(gaussian(7, 1)[0]).double().numpy()[0]
    # From a block to the last one: the length of a part given the deeper ones is a difference of two such.
    lengths, expected = [np.zeros(PLACES)], [0.0]
    for start in (ends - WIDTHS)[::-1]:
        precision = np.linalg.inv(shrunk[start:, start:])
        lengths.append(np.einsum("pf,fg,pg->p", residual[:, start:], precision, residual[:, start:]))
        expected.append(float(np.trace(precision @ covariance[start:, start:])))
    textbook = np.diff(lengths, axis=0) / np.diff(expected)[:, None]
    np.testing.assert_allclose(found, textbook[::-1].T, rtol=2e-3, atol=1e-4)


def test_a_shallow_block_says_nothing_to_the_deeper_ones():
    model = fitted(gaussian(8, 200))
    rows_NF = gaussian(9, 2).flatten(0, 1)
    moved_NF = rows_NF.clone()
    moved_NF[:, : WIDTHS[0]] += 5.0
    before, after = model.energies(rows_NF), model.energies(moved_NF)
    torch.testing.assert_close(after[..., 1:], before[..., 1:])
    assert (after[..., 0] - before[..., 0]).abs().mean() > 0.5
    moved_NF = rows_NF.clone()
    moved_NF[:, -WIDTHS[-1] :] += 5.0
    assert ((model.energies(moved_NF) - before).abs().mean((0, 1)) > 0.01).all(), "a deep one is heard everywhere"


def test_deepest_first():
    assert deepest_first([2, 1, 3]).tolist() == [3, 4, 5, 2, 0, 1]


# ----------------------------------------------------------------------------------------------------- cells


def test_clean_cells_have_mean_0_and_spread_1():
    model = fitted(gaussian(10, 1000))
    cells_BP = model.cells(model.energies(gaussian(11, 1000).flatten(0, 1)))
    assert abs(cells_BP.mean()) < 0.15
    assert cells_BP.std().item() == pytest.approx(1.0, abs=0.15)


def test_cells_are_those_of_the_formula():
    """Half of what is usual at a place and half of the image's median are taken away; places do not vary alike."""
    random = np.random.default_rng(0)
    clean_BP = random.gamma(3.0, np.linspace(0.2, 2.0, PLACES), (200, PLACES))
    usual = BlockMoments(PLACES, CPU)
    usual.update(torch.from_numpy(clean_BP).float(), torch.ones(200))
    model = ResidualModel(WIDTHS, SIDE)
    model.fit_places(usual)
    energies_BPL = random.gamma(2.0, size=(5, PLACES, len(WIDTHS)))
    mean_P = clean_BP.mean(0)
    raw_BP = np.sqrt(energies_BPL).mean(-1) - 0.5 * (mean_P - mean_P.mean())
    median_B1 = np.sort(raw_BP, 1)[:, PLACES // 2 - 1, None]
    expected_BP = (raw_BP - 0.5 * median_B1 - 0.5 * mean_P.mean()) / np.sqrt(clean_BP.var(0).mean())
    np.testing.assert_allclose(model.cells(torch.from_numpy(energies_BPL).float()), expected_BP, rtol=1e-4, atol=1e-5)


def test_a_foreign_place_is_the_hottest():
    model = fitted(gaussian(12, 300))
    rows_BPF = gaussian(13, 16)
    for image in range(16):
        rows_BPF[image, image] += 12.0
    cells_BP = model.cells(model.energies(rows_BPF.flatten(0, 1)))
    assert cells_BP.argmax(1).tolist() == list(range(16))


def test_a_place_that_clean_images_heat_is_excused_in_part():
    """The same energies: less surprising where clean images have them too."""
    model = fitted(gaussian(14, 300))
    model.usual_P.zero_()
    model.usual_P[3] = 1.0
    cells_P = model.cells(torch.ones(1, PLACES, len(WIDTHS)))[0]
    assert cells_P[3] < cells_P[4]
    torch.testing.assert_close(cells_P[:3], cells_P[4:7])


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_is_enough_for_numbers(count):
    """Its residuals are their own mean, and those of two are equally far from it."""
    model = fitted(gaussian(15, count))
    cells_BP = model.cells(model.energies(gaussian(16, 3).flatten(0, 1)))
    assert cells_BP.isfinite().all()
    assert image_scores(cells_BP).max() < 1e4
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_images_that_are_all_the_same():
    """No variance at all, as of a mock-up's blank pictures."""
    model = fitted(torch.zeros(5, PLACES, ENTRIES))
    assert model.cells(model.energies(torch.zeros(PLACES, ENTRIES))).isfinite().all()
    assert model.cells(model.energies(torch.ones(PLACES, ENTRIES))).isfinite().all()


# ------------------------------------------------------------------------------------------ scores and maps


@pytest.mark.parametrize(("places", "hottest"), [(1, 1), (16, 1), (49, 2), (196, 8), (784, 31)])
def test_the_score_is_the_mean_of_the_hottest_4_percent(places, hottest):
    assert HOTTEST_SHARE == 0.04
    cells_BP = torch.randn(3, places, generator=torch.Generator().manual_seed(places))
    expected = np.sort(cells_BP.numpy(), 1)[:, -hottest:].mean(1)
    np.testing.assert_allclose(image_scores(cells_BP), expected, rtol=1e-6)


def test_a_score_does_not_depend_on_where_it_is_hot():
    cells_BP = torch.randn(1, 49, generator=torch.Generator().manual_seed(0))
    shuffled = cells_BP[:, torch.randperm(49, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(image_scores(cells_BP), image_scores(shuffled))


def test_upsampled_maps_lie_where_their_cells_are():
    cells_BHW = torch.zeros(2, 4, 4)
    cells_BHW[0, 1, 3] = 1.0
    maps_BSS = upsample(cells_BHW, 64)
    assert maps_BSS.shape == (2, 64, 64)
    assert maps_BSS[1].eq(0).all()
    y, x = divmod(int(maps_BSS[0].argmax()), 64)
    assert (y // 16, x // 16) == (1, 3)
    assert maps_BSS[0, 24, 63] > 0.95, "to the border, without a shift"
    assert maps_BSS[0, :, :39].eq(0).all()
