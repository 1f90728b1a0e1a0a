"""LoRA adapters (Hu et al. 2022), in PEFT's own format: attach, save, verify, load and merge."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from trajdist.artifacts import fingerprint, read_tensors
from trajdist.config import Config, Lora
from trajdist.errors import ArtifactError, ConfigError, TrainingError, first_problem, one_line
from trajdist.files import copy_mode, read_json, read_object, sync_file, sync_folder, write_json
from trajdist.plugins import BUILT_IN
from trajdist.saved.bundle import load_model, new_model
from trajdist.saved.rundir import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_PREFIX, RunDir, check_has_adapter

MEND = "restore it as the run wrote it."
# The keys of domain_adaptation.lora that an adapter's config holds, and PEFT's names of them.
PEFT_NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def attach(model: nn.Module, settings: Lora, base_fingerprint: str) -> PeftModel:
    """Wrap ``model`` in a fresh adapter: only ``lora_`` weights train, and the output does not change yet.

    Raises:
        ConfigError: ``target_modules`` matches no linear layer, or other modules.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = _peft_config(settings, linear, base_fingerprint)
    # PEFT reads the name of the base from the model itself.
    model.name_or_path = BASE_PREFIX + base_fingerprint  # type: ignore[assignment]
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        if "arget module" not in str(error).replace("_", " "):
            raise
        raise ConfigError(
            f"domain_adaptation.lora.target_modules={settings.target_modules!r} must match linear layers, and only "
            f"those: choose from {', '.join(linear)}."
        ) from None
    assert isinstance(adapted, PeftModel)
    return adapted


def _peft_config(settings: Lora, linear: list[str], base_fingerprint: str) -> LoraConfig:
    """The settings as PEFT's; ``linear`` are the linear layers of the model."""
    named: dict[str, Any] = {name: getattr(settings, key) for key, name in PEFT_NAMES.items()}
    if settings.target_modules == "all-linear":
        named["target_modules"] = linear
    return LoraConfig(**named, base_model_name_or_path=BASE_PREFIX + base_fingerprint)


def check_targets(config: Config) -> None:
    """Refuse target modules that the model does not have, before anything is trained.

    The module names of a built-in model do not depend on the number of blocks, which only the backbone knows. Those of
    another package's model may, so its targets are checked when it is adapted.

    Raises:
        ConfigError: as :func:`attach` does.
    """
    if config.model.type not in BUILT_IN:
        return
    with torch.device("meta"):
        attach(new_model(config.model, 1, config.model.feature_dim), config.domain_adaptation.lora, "")


def base_state(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of the base model under an adapter, by the names that PEFT gives them."""
    return {name: value for name, value in adapted.state_dict().items() if "lora_" not in name}


def adapter_state(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's own weights, by their names in its file."""
    # There are no embeddings; to find that out by itself, PEFT would look for the base on the hub.
    return dict(get_peft_model_state_dict(adapted, save_embedding_layers=False))


def adapter_fingerprint(adapted: PeftModel, base_fingerprint: str) -> str:
    """Identifies an adapter together with its base model."""
    return fingerprint(adapter_state(adapted), {"base": base_fingerprint})


def is_alive(adapted: PeftModel) -> bool:
    """Whether the adapter changes anything: every B starts at zero."""
    up = [value for name, value in adapter_state(adapted).items() if "lora_B" in name]
    return any(bool(value.any()) for value in up)


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Save in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    # PEFT writes a set of names in arbitrary order; sorted, equal runs give identical files.
    document = read_json(folder / ADAPTER_CONFIG)
    if isinstance(document["target_modules"], list):
        document["target_modules"].sort()
    write_json(folder / ADAPTER_CONFIG, document)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; the run writes its own card at the end.
    copy_mode(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)


def load_adapter(model: nn.Module, folder: Path, base_fingerprint: str) -> PeftModel:
    """Attach a saved adapter to its base model.

    Raises:
        ArtifactError: no adapter there, a damaged one, or one that was trained on another base.
    """
    document = read_config(folder, base_fingerprint)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    # PEFT would do whatever else the file asks for; its older versions import any module that it names.
    settings = _settings_of(document, tensors, str(folder / ADAPTER_CONFIG))
    config = _peft_config(settings, [], base_fingerprint)
    try:
        # By itself, PEFT would load the file onto a GPU if there is one, in every process onto the first.
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, torch_device="cpu")
    except (RuntimeError, ValueError, TypeError, KeyError, re.error) as error:
        reason = one_line(error)
        raise ArtifactError(f"the adapter {str(folder)!r} does not fit the model: {reason}") from None
    assert isinstance(adapted, PeftModel)
    if adapter_state(adapted).keys() != tensors.keys():
        raise ArtifactError(
            f"{str(folder / ADAPTER_CONFIG)!r} is of another adapter than the weights beside it: {MEND}"
        )
    return adapted


def _settings_of(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], path: str) -> Lora:
    """The settings in an adapter's config, which may hold more than trajdist writes; nothing else of it is used.

    Args:
        tensors: the weights beside it.
        path: of the config, for the error.

    Raises:
        ArtifactError: they are not those of a LoRA adapter, or not those of its weights.
    """
    if document.get("alpha_pattern"):  # A scale for each layer.
        raise ArtifactError(f"{path!r} has an alpha_pattern, which trajdist never writes: {MEND}")
    try:
        settings = Lora.model_validate({key: document.get(name) for key, name in PEFT_NAMES.items()})
    except ValidationError as error:
        field, why = first_problem(error)
        name = PEFT_NAMES[field.partition(".")[0]]
        raise ArtifactError(f"{path!r} is not a LoRA adapter's config ({name}: {why}): {MEND}") from None
    # Before PEFT allocates matrices of that rank.
    ranks = {size for name, tensor in tensors.items() if "lora_A" in name for size in tensor.shape[:1]}
    if ranks != {settings.rank}:
        found = ", ".join(map(str, sorted(ranks))) or "none"
        raise ArtifactError(f"{path!r} says rank {settings.rank}, the weights beside it have {found}: {MEND}")
    return settings


def read_config(folder: Path, base_fingerprint: str) -> dict[str, Any]:
    """An adapter's config, as saved.

    Raises:
        ArtifactError: there is none, it is damaged, or the adapter was trained on another base model, projection or
            backbone.
    """
    check_has_adapter(folder)
    document = read_object(folder / ADAPTER_CONFIG)
    base = str(document.get("base_model_name_or_path"))
    if base != BASE_PREFIX + base_fingerprint:
        raise ArtifactError(
            f"the adapter {str(folder)!r} was trained on another base ({base[:28]}..., this one is "
            f"{BASE_PREFIX}{base_fingerprint[:19]}...): use it with the Phase 1 it was trained on."
        )
    return document


def merged(adapted: nn.Module) -> nn.Module:
    """A copy of the base model with the adapter merged into its weights; ``adapted`` is unchanged."""
    assert isinstance(adapted, PeftModel)
    model: nn.Module = copy.deepcopy(adapted).merge_and_unload()
    return model.eval()


def save_proven(rundir: RunDir, adapted: nn.Module, base_id: str) -> None:
    """Save the adapter and verify that the base did not change, the adapter does something, and it loads back equal.

    The folder appears whole or not at all.

    Raises:
        TrainingError: one of these does not hold.
    """
    assert isinstance(adapted, PeftModel)
    adapted.eval()
    if not is_alive(adapted):
        raise TrainingError(
            "the adapter learned nothing (every B is zero): train longer or raise domain_adaptation.lora.learning_rate."
        )
    temporary = rundir.adapter.with_name(".adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        rundir.adapter.parent.mkdir(exist_ok=True)
        save_adapter(adapted, temporary)
        for path in temporary.iterdir():
            sync_file(path)
        _check_saved(temporary, adapted, rundir.model, base_id)
        shutil.rmtree(rundir.adapter, ignore_errors=True)
        temporary.rename(rundir.adapter)
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise ArtifactError(
            f"the adapter {str(rundir.adapter)!r} cannot be written ({reason}): free some space or make the folder "
            "writable and run the same command again."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(rundir.adapter.parent)


def _check_saved(folder: Path, adapted: PeftModel, model: Path, base_id: str) -> None:
    """Load the adapter in ``folder`` onto the base model in the file ``model``: it must compute what ``adapted`` does.

    Raises:
        TrainingError: the base or the outputs differ.
    """
    base, document = load_model(model)
    again = load_adapter(base, folder, base_id).eval()
    if fingerprint(base_state(adapted)) != fingerprint(base_state(again)):
        raise TrainingError("the base model changed during Phase 2: this is a bug in trajdist, please report it.")
    probe_NLD = torch.randn(64, document.length, document.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [each.to("cpu")(probe_NLD).output_NLD for each in (adapted, again)]
    if not torch.equal(*outputs):
        raise TrainingError("the saved adapter gives other outputs than the trained one: check the file system.")
