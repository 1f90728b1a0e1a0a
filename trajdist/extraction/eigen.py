"""The leading eigenvectors of large symmetric matrices, without the time that all of them take."""

from __future__ import annotations

import torch

# Smaller matrices, or those of which a larger share is wanted, are solved whole: that is as fast.
LARGE, SHARE = 1024, 16
# Directions that are iterated beyond those wanted: what these converge by is the ratio to the first one left out.
SPARE = 64
ITERATIONS_BETWEEN_CHECKS, MOST_CHECKS = 4, 8
# How much the eigenvalues may still move, relative to themselves, and to the largest one because of float32. What is
# lost of the variance is of that size; what is whitened is white in any case.
TOLERANCE, NOISE = 1e-4, 1e-6


def leading_eigenvectors(matrix_CC: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest eigenvalues, largest first, and their vectors ``[C, count]``, of a float64 matrix.

    Large matrices go through subspace iteration from seeded noise (Halko, Martinsson & Tropp 2011, algorithm 4.4) in
    float32, until the Ritz values stand still; the last projection is solved in float64. Where they do not
    settle, the matrix is solved whole.
    """
    found = _iterate(matrix_CC, count) if len(matrix_CC) >= max(LARGE, SHARE * count) else None
    values, vectors = found or torch.linalg.eigh(matrix_CC)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _iterate(matrix_CC: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Eigenvalues and vectors in rising order, a few more than wanted; None where they do not settle."""
    generator = torch.Generator().manual_seed(0)
    rough_CC = matrix_CC.float()
    basis_CK = torch.randn(len(matrix_CC), count + SPARE, generator=generator)
    before = torch.zeros(count)
    for _ in range(MOST_CHECKS):
        for _ in range(ITERATIONS_BETWEEN_CHECKS):
            basis_CK = torch.linalg.qr(rough_CC @ basis_CK).Q
        values = torch.linalg.eigvalsh(basis_CK.T @ (rough_CC @ basis_CK))[-count:]
        if bool(((values - before).abs() <= TOLERANCE * values.abs() + NOISE * values[-1].abs()).all()):
            return _project(matrix_CC, basis_CK.double())
        before = values
    return None


def _project(matrix_CC: torch.Tensor, basis_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best eigenvectors within the span of ``basis_CK`` (Rayleigh-Ritz)."""
    basis_CK = torch.linalg.qr(basis_CK).Q
    values, within_KK = torch.linalg.eigh(basis_CK.T @ matrix_CC @ basis_CK)
    return values, basis_CK @ within_KK
