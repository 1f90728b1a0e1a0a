"""Leading eigenvectors: those of the whole solution, or whatever is as good where that has none of its own."""

from __future__ import annotations

import pytest
import torch

from trajdist.extraction import eigen
from trajdist.extraction.eigen import leading_eigenvectors
from trajdist.extraction.projection import pca_whitening

SIZE, COUNT = 1024, 32


def covariance(scale_C: torch.Tensor, rows: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    turned = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    samples = (torch.randn(rows, SIZE, generator=generator) * scale_C) @ turned
    return (samples.T @ samples / rows).double()


SPECTRA = {
    "exponential": torch.exp(-torch.arange(SIZE) / 60),
    "power": (1 + torch.arange(SIZE)) ** -0.7,
    "few large": torch.where(torch.arange(SIZE) < 40, 10.0, 0.1),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_they_are_those_of_the_whole(spectrum):
    matrix = covariance(SPECTRA[spectrum])
    values, vectors = leading_eigenvectors(matrix, COUNT)
    whole, all_vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(values, whole.flip(0)[:COUNT], rtol=1e-4, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(COUNT, dtype=torch.float64), rtol=0, atol=1e-9)
    # Of the variance that any directions can have, next to nothing is missing.
    kept = torch.trace(vectors.T @ matrix @ vectors) / whole.flip(0)[:COUNT].sum()
    assert 1 - 1e-5 < kept <= 1 + 1e-12
    clear = [i for i in range(8) if spectrum == "exponential"]
    assert all(abs(float(vectors[:, i] @ all_vectors[:, -1 - i])) > 0.999 for i in clear)


@pytest.mark.parametrize("spectrum", ["exponential", "few large"])
def test_what_is_whitened_by_them_is_white(spectrum):
    matrix = covariance(SPECTRA[spectrum])
    white = pca_whitening(matrix, COUNT)
    torch.testing.assert_close(white.T @ matrix @ white, torch.eye(COUNT, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("matrix", [torch.eye(SIZE), torch.zeros(SIZE, SIZE)], ids=["identity", "zero"])
def test_without_directions_of_its_own(matrix):
    values, vectors = leading_eigenvectors(matrix.double(), COUNT)
    torch.testing.assert_close(values, matrix.diagonal()[:COUNT].double())
    assert vectors.isfinite().all()


def test_fewer_rows_than_directions():
    """More directions are asked for than the samples have: the rest has no variance."""
    matrix = covariance(SPECTRA["power"], rows=20)
    values, vectors = leading_eigenvectors(matrix, COUNT)
    torch.testing.assert_close(values[:20], torch.linalg.eigvalsh(matrix).flip(0)[:20], rtol=1e-6, atol=0)
    assert values[20:].abs().max() < 1e-5 * values[0]
    assert vectors.isfinite().all()


def test_those_that_do_not_settle_are_solved_whole(monkeypatch):
    matrix = covariance(SPECTRA["power"])
    monkeypatch.setattr(eigen, "MOST_CHECKS", 1)
    values, _ = leading_eigenvectors(matrix, COUNT)
    assert torch.equal(values, torch.linalg.eigh(matrix).eigenvalues.flip(0)[:COUNT])
