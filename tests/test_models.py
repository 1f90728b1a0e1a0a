"""Sequence models: shapes, learning, determinism; losses and schedules against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from trajdist.config_files import load_config
from trajdist.models.losses import gaussian_kl, trajectory_losses
from trajdist.models.reconstruction import Reconstruction
from trajdist.models.registry import build_model
from trajdist.models.transformer import attend
from trajdist.training.optimization import linear_warmup, make_optimizer, warmup_cosine

KINDS = ("autoencoder", "vae", "transformer")


def build(kind: str, dropout: float = 0.0, **changes: int) -> nn.Module:
    sizes = {"length": 6, "width": 10, "hidden_dim": 32, "latent_dim": 12, "num_layers": 1, "num_heads": 4, **changes}
    torch.manual_seed(0)
    return build_model(kind, **sizes, dropout=dropout)


def trajectories(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 6, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, num_layers):
    answer = build(kind, num_layers=num_layers)(trajectories())
    assert answer.output_NLD.shape == (8, 6, 10)
    assert answer.latent_NZ.shape == (8, 12)
    assert (answer.log_variance_NZ is not None) == (kind == "vae")


@pytest.mark.parametrize("kind", KINDS)
def test_overfits_one_batch(kind):
    model, x = build(kind), trajectories()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    valid, first = torch.ones(6, 10, dtype=torch.bool), None
    for _ in range(400):
        loss = trajectory_losses(model(x), x, valid, 8, kl_weight=1e-4).loss.mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * first


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_take_part(kind):
    model, x = build(kind), trajectories()
    trajectory_losses(model(x), x, torch.ones(6, 10), 8, kl_weight=1.0).loss.sum().backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # A key's bias shifts all products of a query alike: softmax does not see it.
    assert all(name.endswith("k.bias") for name in idle)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_is_deterministic_and_training_is_not(kind):
    model, x = build(kind, dropout=0.3), trajectories()
    model.eval()
    assert torch.equal(model(x).output_NLD, model(x).output_NLD)
    model.train()
    assert not torch.equal(model(x).output_NLD, model(x).output_NLD)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_do_not_see_each_other(kind):
    model, x = build(kind).eval(), trajectories()
    torch.testing.assert_close(model(x).output_NLD[2:3], model(x[2:3]).output_NLD)


def test_every_block_can_speak_of_every_other():
    model, x = build("transformer").eval(), trajectories(1).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).output_NLD[0, 0].sum(), x)
    assert (slope[0].abs().sum(-1) > 0).all()


def test_unknown_type():
    with pytest.raises(ValueError, match="lstm"):
        build("lstm")


def test_low_memory_is_smaller():
    def weights(name: str) -> int:
        settings = load_config(name).model.model_dump(exclude={"type", "spatial_resolution", "feature_dim"})
        with torch.device("meta"):
            model = build_model("autoencoder", length=16, width=load_config(name).model.feature_dim, **settings)
        return sum(weight.numel() for weight in model.parameters())

    assert weights("low_memory") < 0.3 * weights("default")
    low, default = (load_config(name).data.imagenet for name in ("low_memory", "default"))
    assert low.batch_size < default.batch_size
    assert low.batch_size * low.gradient_accumulation_steps == default.batch_size


def test_kl_is_the_closed_formula():
    mean, log_variance = torch.randn(7, 5), torch.randn(7, 5)
    wanted = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), wanted)
    assert gaussian_kl(torch.zeros(1, 3), torch.zeros(1, 3)).item() == 0.0


def test_vae_samples_with_its_own_variance():
    model, x = build("vae"), trajectories(1)
    captured: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].detach()))
    with torch.no_grad():
        answer = model.train()(x.expand(20000, 6, 10))
        mean, deviation = answer.latent_NZ[0], torch.exp(0.5 * answer.log_variance_NZ[0])
        torch.testing.assert_close(captured[0].mean(0), mean, rtol=0, atol=0.05)
        torch.testing.assert_close(captured[0].std(0), deviation, rtol=0.05, atol=0)
        model.eval()(x)
        assert torch.equal(captured[1], model(x).latent_NZ)


@pytest.mark.parametrize(("said", "kept"), [(1e4, 10.0), (-1e4, -20.0), (-3.0, -3.0)])
def test_a_vae_bounds_its_variance_and_samples_in_float32(said, kept):
    """The exponential of what an untrained encoder says may be infinite, and the KL divergence with it."""
    model, x = build("vae"), trajectories()
    *_, last = (module for module in model.encoder.modules() if isinstance(module, nn.Linear))
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, said)
    with torch.autocast("cpu", torch.bfloat16):
        answer = model.train()(x)
    assert answer.latent_NZ.dtype == answer.log_variance_NZ.dtype == torch.float32
    torch.testing.assert_close(answer.log_variance_NZ, torch.full((8, 12), kept))
    assert answer.output_NLD.isfinite().all()


def test_losses_are_per_image_and_ignore_padding():
    target = torch.zeros(6, 2, 3)
    output = target.clone()
    output[:2] = 1.0  # Image 0 has two cells, both wrong by 1 everywhere.
    output[3, :, 2] = 5.0  # Image 1 is wrong in padding alone.
    output[4, 0, 0] = 2.0  # Image 2 is wrong in one number of eight.
    valid = torch.tensor([[True, True, False], [True, True, False]])
    losses = trajectory_losses(Reconstruction(output, torch.zeros(6, 1)), target, valid, 3, kl_weight=1.0)
    assert losses.recon.tolist() == [1.0, 0.0, 0.5]
    assert losses.kl.tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(losses.loss, losses.recon)


def test_kl_weight_one_is_the_evidence_lower_bound():
    torch.manual_seed(0)
    target, output, mean, log_variance = (
        torch.randn(4, 2, 3),
        torch.randn(4, 2, 3),
        torch.randn(4, 5),
        torch.randn(4, 5),
    )
    answer = Reconstruction(output, mean, log_variance)
    one, half = (trajectory_losses(answer, target, torch.ones(2, 3), 2, weight) for weight in (1.0, 0.5))
    nats = -Normal(output, 1.0).log_prob(target).sum((1, 2)) - 3 * math.log(2 * math.pi)
    bound = (nats + gaussian_kl(mean, log_variance)).view(2, 2).mean(1)
    torch.testing.assert_close(one.loss * 6 / 2, bound)
    torch.testing.assert_close(half.loss, half.recon + 0.5 * half.kl)


def test_half_precision_outputs_are_compared_in_float32():
    answer = Reconstruction(torch.full((1, 1, 1), 1.0).bfloat16(), torch.zeros(1, 1))
    losses = trajectory_losses(answer, torch.full((1, 1, 1), 1.001), torch.ones(1, 1), 1, 1.0)
    assert losses.loss.dtype == torch.float32
    assert losses.loss.item() == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_and_nothing_else_does(kind):
    """Neither biases and gains nor the embeddings of depth, which are matrices too."""
    model = build(kind)
    groups = make_optimizer(model, 1e-3, 0.25, torch.device("cpu")).param_groups
    decay = {weight: group["weight_decay"] for group in groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        assert decay[weight] == (0.25 if name.endswith(".weight") and "norm" not in name else 0.0), name


def test_warmup_cosine():
    assert warmup_cosine(0.0, 0.1) == 0.0
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, 0.1) == 1.0
    assert warmup_cosine(0.55, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(1.0, 0.1) == pytest.approx(0.0)
    assert warmup_cosine(0.0, 0.0) == 1.0
    curve = [warmup_cosine(step / 100, 0.1) for step in range(10, 101)]
    assert curve == sorted(curve, reverse=True)


def test_linear_warmup():
    assert [linear_warmup(progress, 0.2) for progress in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert linear_warmup(0.0, 0.0) == 1.0


def test_attention_is_torchs_own():
    q, k, v = torch.randn(3, 5, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_on_accelerators_goes_in_parts(monkeypatch):
    """Grids of CUDA's kernels hold 2**16 - 1 sequences; 2**15 images' places times four heads are more."""
    found = []

    def fused(q, k, v):
        found.append(q.shape[0] * q.shape[1])
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    assert attend(*torch.empty(3, 2**15, 4, 16, 8, device="meta")).shape == (2**15, 4, 16, 8)
    assert sum(found) == 2**17
    assert max(found) < 2**16
    found.clear()
    attend(*torch.empty(3, 5, 2, 6, 8, device="meta"))
    assert found == [10]
