"""Sequence models by name. A new one is a file beside this one and a line in ``plugins.BUILT_IN``.

A model in another package is registered by that package: see :mod:`trajdist.plugins`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import nn

from trajdist.plugins import load_model_class

Builder = Callable[..., nn.Module]


def build_model(
    kind: str,
    *,
    length: int,
    width: int,
    hidden_dim: int,
    latent_dim: int,
    num_layers: int,
    num_heads: int,
    dropout: float,
) -> nn.Module:
    """Build the model that ``model.type`` names, for trajectories of ``length`` steps and ``width`` channels.

    This is the contract for plugin models. A model class must accept all of these keyword arguments, and may ignore
    some. Its ``forward`` takes ``[N, L, D]``, L = length and D = width, and returns a
    :class:`trajdist.models.reconstruction.Reconstruction`. Beyond that:

    - ``__init__`` may run under ``torch.device("meta")`` when a saved model is loaded, so it must not read tensor
      values. Loading fills in the state dict only: a non-persistent buffer must be created on the CPU explicitly.
      ``trajdist plan`` calls ``forward`` on fake tensors, so it must not branch on tensor values either.
    - Eval mode must be deterministic: scores and p-values rely on it, and a reloaded adapter must give exactly the
      outputs of the trained one.
    - LoRA (with ``target_modules=all-linear``) adapts only ``nn.Linear`` layers, subclasses included. The layers must
      be called as modules; one whose ``weight`` is used directly never applies its adapter.
    - Training may run under autocast (``runtime.mixed_precision``), so ``forward`` must cope with half precision and
      compute in float32 whatever needs it. Validation, calibration and scoring run in float32.
    - Checkpoints hold the trained parameters only: buffers that change in training are lost on a restart.

    Raises:
        ConfigError: no installed package registers the model, or its package cannot be imported.
    """
    builder = cast(Builder, load_model_class(kind))
    return builder(
        length=length,
        width=width,
        hidden_dim=hidden_dim,
        latent_dim=latent_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        dropout=dropout,
    )
