"""Sequence models ``[N, L, D] -> Reconstruction``, their losses, and products that are fast on any device."""
