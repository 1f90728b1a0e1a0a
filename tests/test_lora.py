"""Adapters: PEFT's own, harmless at first, on every layer, bound to their base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_checkpoint import assert_appeared_synced, noting_syncs
from torch import nn

from trajdist.artifacts import fingerprint
from trajdist.config import Lora
from trajdist.config_parsing import parse_config
from trajdist.errors import ArtifactError, ConfigError, TrainingError
from trajdist.files import read_json, write_json
from trajdist.models.registry import build_model
from trajdist.saved import bundle, lora
from trajdist.saved.rundir import RunDir
from trajdist.scoring.scorer import load

SIZES = {"length": 4, "width": 6, "hidden_dim": 16, "latent_dim": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
SETTINGS = {"rank": 2, "alpha": 4}


def base_model(kind: str = "autoencoder") -> nn.Module:
    torch.manual_seed(0)
    return build_model(kind, **SIZES).eval()


def attach(model: nn.Module, target_modules="all-linear", base="base", **changes) -> PeftModel:
    return lora.attach(model, Lora(**{**SETTINGS, **changes}, target_modules=target_modules), base)


def trajectories() -> torch.Tensor:
    return torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1))


def train(adapted: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([w for w in adapted.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (adapted(trajectories()).output_NLD - trajectories()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["autoencoder", "vae", "transformer"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_identity_at_first_then_only_the_adapter_moves(kind, options):
    before = base_model(kind)(trajectories()).output_NLD
    adapted = attach(base_model(kind), **options).eval()
    torch.testing.assert_close(adapted(trajectories()).output_NLD, before, rtol=1e-5, atol=1e-6)
    assert all("lora_" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
    base = fingerprint(lora.base_state(adapted))
    assert not lora.is_alive(adapted)
    train(adapted)
    assert fingerprint(lora.base_state(adapted)) == base
    assert lora.is_alive(adapted)
    assert not torch.allclose(adapted(trajectories()).output_NLD, before, rtol=1e-3, atol=1e-3)


def test_every_adapter_of_the_attention_is_used():
    adapted = attach(base_model("transformer"), ["q", "k", "v", "o"])
    train(adapted, steps=1)  # B is zero at first, and with it the slope of A.
    adapted.zero_grad()
    adapted(trajectories()).output_NLD.square().mean().backward()
    slopes = {name: weight.grad for name, weight in adapted.named_parameters() if "lora_" in name}
    assert len(slopes) == 2 * 4 * 2  # Encoder and decoder, q k v o, A and B.
    assert all(slope is not None and slope.any() for slope in slopes.values())


def test_all_linear_is_all_linear():
    model = base_model("transformer")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = attach(model)
    assert {name.split(".lora_A")[0] for name in lora.adapter_state(adapted) if "lora_A" in name} == {
        f"base_model.model.{name}" for name in linear
    }


def test_targets_by_regular_expression():
    adapted = attach(base_model(), r"encoder\.[03]")
    assert len(lora.adapter_state(adapted)) == 2 * 2
    assert all("encoder" in name for name in lora.adapter_state(adapted))


@pytest.mark.parametrize("targets", [["qq"], r"encoder\.\d+"], ids=["nothing", "also an activation function"])
def test_targets_that_are_no_linear_layers(targets):
    with pytest.raises(ConfigError, match=r"target_modules=.*must match linear layers.*choose from encoder\.0"):
        attach(base_model(), targets)


TARGETS = ["all-linear", ["encoder.0"], ["q"], ["0.attention.o", "none"], r"encoder\.0", r".*\.q", ["none"], [], ""]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("kind", ["autoencoder", "vae", "transformer"])
def test_targets_are_judged_before_phase_1_as_they_are_after_it(kind, targets):
    """Whatever the shape of the model will be."""
    config = parse_config({"model": {"type": kind}, "domain_adaptation": {"lora": {"target_modules": targets}}})
    state = torch.get_rng_state()
    early = is_refused(lambda: lora.check_targets(config))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert early == is_refused(lambda: attach(base_model(kind), targets))


def is_refused(check: Callable[[], object]) -> bool:
    try:
        check()
    except ConfigError as error:
        return "must match linear layers" in str(error)
    return False


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_saved_and_loaded_is_the_same(tmp_path, options):
    adapted = attach(base_model(), **options)
    train(adapted)
    lora.save_adapter(adapted.eval(), tmp_path)
    wanted = adapted(trajectories()).output_NLD
    ours = lora.load_adapter(base_model(), tmp_path, "base").eval()
    theirs = PeftModel.from_pretrained(base_model(), str(tmp_path)).eval()
    assert torch.equal(ours(trajectories()).output_NLD, wanted)
    assert torch.equal(theirs(trajectories()).output_NLD, wanted)
    assert not any(weight.requires_grad for weight in ours.parameters())


def test_an_adapter_is_loaded_on_the_cpu_whatever_there_is(tmp_path, monkeypatch):
    """PEFT itself would allocate on the first GPU, even for a scorer on the CPU."""
    lora.save_adapter(attach(base_model()), tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    adapted = lora.load_adapter(base_model(), tmp_path, "base")
    assert {weight.device.type for weight in adapted.parameters()} == {"cpu"}


ASKED = {
    "peft_type": "XLORA",
    "megatron_config": {"x": 1},
    "megatron_core": "megatron.found.in.the.current.folder",
    "init_lora_weights": "pissa",
    "exclude_modules": "((",
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize("key", ASKED)
def test_an_adapter_asks_for_nothing_else(tmp_path, key):
    """PEFT imports modules, loads other adapters and changes the base where the config of an adapter says so."""
    adapted = attach(base_model())
    train(adapted)
    lora.save_adapter(adapted.eval(), tmp_path)
    path = tmp_path / "adapter_config.json"
    write_json(path, {**read_json(path), key: ASKED[key]})
    loaded = lora.load_adapter(base_model(), tmp_path, "base").eval()
    assert torch.equal(loaded(trajectories()).output_NLD, adapted(trajectories()).output_NLD)
    assert fingerprint(lora.base_state(loaded)) == fingerprint(lora.base_state(adapted))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", 60000, "rank 60000, the weights beside it have 2"),
        ("r", None, "not a LoRA adapter's config \\(r: "),
        ("lora_alpha", 1e400, "not a LoRA adapter's config \\(lora_alpha: "),
        ("alpha_pattern", {"encoder.0": 100}, "has an alpha_pattern"),
        ("target_modules", "((", "does not fit the model"),
        ("target_modules", ["encoder.0"], "of another adapter than the weights"),
        ("use_dora", True, "of another adapter than the weights"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_settings_that_no_adapter_has_are_refused(tmp_path, key, value, said):
    lora.save_adapter(attach(base_model()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), key: value}))
    with pytest.raises(ArtifactError, match=said):
        lora.load_adapter(base_model(), tmp_path, "base")


def test_the_config_of_an_adapter_does_not_depend_on_the_process(tmp_path):
    """PEFT writes the names as they come out of a set, whose order is drawn anew in each process."""
    lora.save_adapter(attach(base_model("transformer")), tmp_path)
    names = read_json(tmp_path / "adapter_config.json")["target_modules"]
    assert names == sorted(names)
    assert len(names) > 8


def test_who_may_read_the_folder_may_use_the_adapter(tmp_path):
    lora.save_adapter(attach(base_model()), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_adapter_of_another_base_is_refused(tmp_path):
    lora.save_adapter(attach(base_model(), base="a" * 64), tmp_path)
    with pytest.raises(ArtifactError, match="was trained on another base"):
        lora.load_adapter(base_model(), tmp_path, "b" * 64)


def test_adapter_that_does_not_fit_is_refused(tmp_path):
    lora.save_adapter(attach(base_model("transformer")), tmp_path)
    with pytest.raises(ArtifactError, match="does not fit"):
        lora.load_adapter(base_model(), tmp_path, "base")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a valid safetensors file"):
        lora.load_adapter(base_model(), tmp_path, "base")
    write_json(tmp_path / "adapter_config.json", ["nothing"])
    with pytest.raises(ArtifactError, match="is not a JSON object"):
        lora.load_adapter(base_model(), tmp_path, "base")


def test_adapter_of_a_run_is_the_base_plus_b_times_a(debug_run):
    """Without PEFT: W + alpha / rank * B A, from the files alone."""
    base, document = bundle.load_model(debug_run / "phase1" / "model.safetensors")
    x = torch.randn(8, document.length, document.width)
    folder = debug_run / "phase2" / "adapter"
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    plain, _ = bundle.load_model(debug_run / "phase1" / "model.safetensors")
    config, factors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    ups = {name: value for name, value in factors.items() if "lora_B" in name}
    assert ups
    with torch.no_grad():
        untouched = plain.eval()(x).output_NLD
        for name, up in ups.items():
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            update = up @ factors[name.replace("lora_B", "lora_A")] * config["lora_alpha"] / config["r"]
            plain.get_submodule(module).weight.data += update
        torch.testing.assert_close(adapted(x).output_NLD, plain(x).output_NLD, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(untouched, plain(x).output_NLD, atol=1e-4)


@pytest.mark.parametrize("broken", ["write_json", "load_adapter"])
def test_an_adapter_that_cannot_be_saved_leaves_nothing_behind(debug_run, tmp_path, monkeypatch, broken):
    run = RunDir(shutil.copytree(debug_run, tmp_path / "run"))
    adapted = load(run.path, device="cpu").detectors[0].model

    def fail(*_):
        raise ArtifactError("it cannot be written")

    monkeypatch.setattr(lora, broken, fail)
    base = bundle.base_fingerprint(*bundle.load_model(run.model))
    with pytest.raises(ArtifactError, match="cannot be written"):
        lora.save_proven(run, adapted, base)
    assert sorted(path.name for path in (run.path / "phase2").iterdir()) == ["adapter", "calibration.safetensors"]


def test_an_adapter_that_does_not_read_back_is_refused(debug_run, tmp_path, monkeypatch):
    """The disk took something else than it was given, which is a valid adapter, too."""
    run = RunDir(shutil.copytree(debug_run, tmp_path / "run"))
    save = lora.save_adapter

    def one_bit_else(adapted: PeftModel, folder: Path) -> None:
        save(adapted, folder)
        path = folder / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(lora, "save_adapter", one_bit_else)
    base = bundle.base_fingerprint(*bundle.load_model(run.model))
    before = {path.name: path.read_bytes() for path in run.adapter.iterdir()}
    with pytest.raises(TrainingError, match="gives other outputs than the trained one"):
        lora.save_proven(run, load(run.path, device="cpu").detectors[0].model, base)
    assert {path.name: path.read_bytes() for path in run.adapter.iterdir()} == before


def test_an_adapter_survives_a_power_cut(debug_run, tmp_path):
    run = RunDir(shutil.copytree(debug_run, tmp_path / "run"))
    adapted, base = load(run.path, device="cpu").detectors[0].model, bundle.load_model(run.model)
    with noting_syncs() as noted:
        lora.save_proven(run, adapted, bundle.base_fingerprint(*base))
    assert_appeared_synced(run.adapter, noted)


def test_a_base_that_changed_in_training_is_refused(debug_run, tmp_path):
    run = RunDir(shutil.copytree(debug_run, tmp_path / "run"))
    adapted, base = load(run.path, device="cpu").detectors[0].model, bundle.load_model(run.model)
    with torch.no_grad():
        next(iter(lora.base_state(adapted).values())).view(-1)[0] += 1e-3
    with pytest.raises(TrainingError, match="the base model changed during Phase 2"):
        lora.save_proven(run, adapted, bundle.base_fingerprint(*base))
    assert not (run.path / "phase2" / ".adapter.tmp").exists()


def test_a_run_keeps_its_base(debug_run, tmp_path):
    """The adapter's base is Phase 1 of the same run; one changed weight makes it another."""
    model = tmp_path / "model.safetensors"
    shutil.copy(debug_run / "phase1" / "model.safetensors", model)
    base, document = bundle.load_model(model)
    lora.read_config(debug_run / "phase2" / "adapter", bundle.base_fingerprint(base, document))
    with torch.no_grad():
        next(base.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ArtifactError, match="another base"):
        lora.read_config(debug_run / "phase2" / "adapter", bundle.base_fingerprint(base, document))
