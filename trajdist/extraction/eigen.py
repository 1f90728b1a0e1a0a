"""The leading eigenvectors of large symmetric matrices, faster than a full decomposition.

Shape suffixes: C rows and columns of the matrix, K directions of the iterated subspace.
"""

from __future__ import annotations

import torch

# Matrices below LARGE, or with more than 1/SHARE of the eigenvectors wanted, are decomposed in full: as fast there.
LARGE, SHARE = 1024, 16
# Oversampling: convergence depends on how the wanted eigenvalues compare with the first one left out.
SPARE = 64
ITERATIONS_BETWEEN_CHECKS, MOST_CHECKS = 4, 8
# Converged once eigenvalues change by less than TOLERANCE of themselves plus, for float32 rounding, NOISE of the
# largest. The captured variance is off by about as much; the final projection whitens exactly in any case.
TOLERANCE, NOISE = 1e-4, 1e-6


def leading_eigenvectors(matrix_CC: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest eigenvalues, in descending order, and eigenvectors ``[C, count]``, of a float64 matrix.

    Large matrices go through subspace iteration from seeded noise (Halko, Martinsson & Tropp 2011, algorithm 4.4) in
    float32 until the Ritz values converge; the final projection is solved in float64. If they do not converge, the
    full decomposition is used.
    """
    found = _iterate(matrix_CC, count) if len(matrix_CC) >= max(LARGE, SHARE * count) else None
    values, vectors = found or torch.linalg.eigh(matrix_CC)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _iterate(matrix_CC: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Eigenvalues and eigenvectors in ascending order, a few more than wanted; None if they do not converge."""
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
    """The best approximate eigenpairs within the span of ``basis_CK`` (Rayleigh-Ritz), in ascending order."""
    basis_CK = torch.linalg.qr(basis_CK).Q
    values, within_KK = torch.linalg.eigh(basis_CK.T @ matrix_CC @ basis_CK)
    return values, basis_CK @ within_KK
