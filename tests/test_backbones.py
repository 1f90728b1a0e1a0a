"""Frozen backbones: blocks by structure, layouts, weights, and nothing that moves."""

from __future__ import annotations

import copy
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from trajdist.errors import ArtifactError, ConfigError
from trajdist.extraction.backbones import Backbone, build_backbone, find_blocks
from trajdist.extraction.networks import build_network


def build(name: str, size: int = 64, patterns: tuple[str, ...] = ()) -> Backbone:
    return build_backbone(name, "none", list(patterns), size, seed=0)


def observed(backbone: Backbone, size: int) -> list[torch.Tensor]:
    maps: list[torch.Tensor] = []
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.inference_mode():
        backbone(images, lambda number, activation: maps.append(activation))
    return maps


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("resnet18", 64, 8),
        ("resnet50", 64, 16),
        ("mobilenet_v2", 64, 17),
        ("mobilenet_v3_small", 64, 11),
        ("efficientnet_b0", 64, 16),
        ("convnext_tiny", 64, 18),
        ("vit_b_16", 224, 12),
        ("swin_t", 64, 12),
        ("timm:vit_tiny_patch16_224", 224, 12),
        ("timm:resnet18", 64, 8),
        ("timm:efficientnet_lite0", 64, 16),
        ("efficientnet_lite0", 64, 16),
    ],
)
def test_blocks_are_found_and_come_as_maps(name: str, size: int, count: int) -> None:
    backbone = build(name, size)
    maps = observed(backbone, size)
    assert len(backbone.blocks) == len(maps) == count
    for block, activation in zip(backbone.blocks, maps, strict=True):
        assert activation.shape[:2] == (2, block.channels)
        assert activation.shape[2] == activation.shape[3]


@pytest.mark.parametrize(
    ("name", "patch", "embeddings"),
    [
        ("vit_b_32", 32, "encoder.pos_embedding"),
        ("timm:vit_tiny_patch16_224", 16, "pos_embed"),
        ("timm:eva02_tiny_patch14_224", 14, "pos_embed"),
    ],
)
def test_position_embeddings_suit_the_images(name: str, patch: int, embeddings: str, tmp_path: Path) -> None:
    """Those of the weights' own size are interpolated: what varies along one axis still does, the class token stays."""
    own = build_network(name, "none", 0, 224).network.state_dict()
    side = 224 // patch
    own[embeddings] = torch.arange(own[embeddings][0].numel()).view(own[embeddings].shape).float() % side
    own[embeddings][0, 1:] = torch.arange(side).repeat_interleave(side)[:, None].float()
    weights = tmp_path / "weights.pt"
    torch.save(own, weights)
    larger = build_backbone(name, str(weights), [], 12 * patch, seed=0)
    found = larger.network.state_dict()[embeddings]
    assert torch.equal(found[0, 0], own[embeddings][0, 0])
    rows = found[0, 1:].view(12, 12, -1)
    torch.testing.assert_close(rows, rows[:, :1, :1].expand_as(rows))
    assert bool((rows[:, 0, 0].diff() > 0).all())
    assert observed(larger, 12 * patch)[0].shape[2:] == (12, 12)
    same = build_backbone(name, str(weights), [], 224, seed=0)
    assert torch.equal(same.network.state_dict()[embeddings], own[embeddings])
    # The last bits of an interpolation depend on the processor, but the weights are the same everywhere.
    assert larger.fingerprint == same.fingerprint
    with pytest.raises(ConfigError, match=r"data\.image_size=225 does not suit"):
        build_backbone(name, str(weights), [], 225, seed=0)


def test_weights_that_timm_does_not_know_are_not_a_matter_of_the_network() -> None:
    """Timm looks for them by the name's end, even if they are not asked for."""
    for weights in ("none", "DEFAULT"):
        with pytest.raises(
            ConfigError, match=r"backbone\.name='timm:resnet18\.bogus' cannot be built by timm \(Invalid pretrained tag"
        ):
            build_network("timm:resnet18.bogus", weights, 0, 64)


def test_class_token_is_dropped() -> None:
    maps = observed(build("vit_b_16", 224, ("encoder.layers.encoder_layer_0",)), 224)
    assert maps[0].shape == (2, 768, 14, 14)


def test_globs_choose_blocks() -> None:
    assert [block.name for block in build("resnet18", 64, ("layer[34].1",)).blocks] == ["layer3.1", "layer4.1"]
    with pytest.raises(ConfigError, match="matches no module"):
        build("resnet18", 64, ("nothing*",))
    with pytest.raises(ConfigError, match="not a feature map"):
        build("resnet18", 64, ("fc",))
    with pytest.raises(ConfigError, match=r"'layer1\.0\.relu', which is called 2 times for an image"):
        build("resnet18", 64, ("layer1.0.*",))
    with pytest.raises(ConfigError, match=r"never called, such as 'AuxLogits\.conv0'"):
        build("inception_v3", 96, ("AuxLogits.*",))
    with pytest.raises(
        ConfigError, match=r"'stages\.2\.1\.transformer\.0', whose output \(4, 4, 64\) is not a feature map"
    ):
        build("timm:mobilevit_xxs", 32, ("stages.*.transformer.[0-9]",))
    with pytest.raises(ConfigError, match=r"whose output \(1, 16, 196, 96\) is not a feature map"):
        build("timm:nest_tiny_jx", 224, ("levels.0.transformer_encoder.0",))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mnasnet0_5", 16),
        ("timm:swinv2_tiny_window8_256", 12),
        ("timm:vit_small_patch16_dinov3", 12),
        ("timm:tiny_vit_5m_224", 12),
        ("timm:mobilevit_xxs", 10),
        # Blocks of other classes stand between those that were known.
        ("timm:mobilenetv4_hybrid_medium", 31),
        ("timm:botnet26t_256", 8),
        ("timm:csatv2", 18),
        ("timm:swiftformer_xs", 16),
        ("timm:efficientvit_b0", 11),
        ("timm:rdnet_tiny", 21),
        ("timm:cspnext_tiny", 4),
        # Families without a known one.
        ("timm:nf_regnet_b0", 16),
        ("timm:davit_tiny", 12),
        ("timm:levit_128s", 9),
        ("timm:mambaout_femto", 18),
        ("timm:resnetv2_18", 8),
    ],
)
def test_residual_blocks_have_many_names(name: str, count: int) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm", minversion="1.0.22", reason="earlier ones are not built on the meta device")
    with torch.device("meta"):
        network = timm.create_model(name[5:]) if name.startswith("timm:") else torchvision.models.get_model(name)
    assert len(find_blocks(network, [])) == count


def test_networks_without_blocks_need_globs() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.blocks is empty"):
        find_blocks(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), [])


@pytest.mark.parametrize("name", ["lowformer_b0", "cpubone_nano"])
def test_networks_of_which_some_blocks_are_unknown_need_globs(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    with pytest.raises(ConfigError, match=r"such as 'stages\.2\.1': name the modules to observe by globs"):
        find_blocks(network, [])


def test_maps_as_deep_as_they_are_wide_keep_their_layout() -> None:
    blocks = build("timm:mambaout_femto", 192).blocks
    assert {block.layout for block in blocks} == {"BHWC"}
    assert (blocks[0].side, blocks[0].channels) == (48, 48)


def test_weights_of_five_dimensions() -> None:
    assert len(build("timm:lambda_resnet26t", 256).blocks) == 8


def test_train_is_inert_and_statistics_do_not_drift() -> None:
    backbone = build("resnet18")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.train()
    observed(backbone, 64)
    assert not any(module.training for module in backbone.network.modules())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_the_head_is_not_run() -> None:
    backbone = build("resnet18")
    backbone.network.fc.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    observed(backbone, 64)


def test_random_weights_are_the_same_for_a_seed() -> None:
    one, two = build("resnet18"), build("resnet18")
    assert one.fingerprint == two.fingerprint
    assert build_backbone("resnet18", "none", [], 64, seed=1).fingerprint != one.fingerprint


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weight_files(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    network = torchvision.models.resnet18()
    path = tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert build_backbone("resnet18", str(path), [], 64, seed=0).fingerprint == Backbone(network, [], 64).fingerprint
    with pytest.raises(ArtifactError, match="does not fit"):
        build_backbone("mobilenet_v2", str(path), [], 64, seed=0)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="weights"):
        build_backbone("resnet18", str(path), [], 64, seed=0)


def test_offline_names_the_file_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(ConfigError, match=r"resnet18-[0-9a-f]+\.pth into .*checkpoints"):
        build_backbone("resnet18", "DEFAULT", [], 64, seed=0)


@pytest.mark.parametrize(
    ("name", "weights", "named"),
    [
        ("resnet51", "none", "did you mean resnet"),
        ("timm:resnet51", "none", "not a timm model: did you mean resnet"),
        ("timm:", "none", "not a timm model: choose one, such as "),
        ("../!", "none", "classification model .*: choose one, such as "),
        ("resnet18", "/none.pt", "is not a file"),
    ],
)
def test_wrong_names(name: str, weights: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_backbone(name, weights, [], 64, seed=0)


def unfolded(name: str, size: int, seed: int) -> tuple[Backbone, torch.nn.Module]:
    """A backbone whose statistics are not the initial ones, and a copy of its network from before the folding."""
    network = build_network(name, "none", seed, size).network
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0)):
                tensor.uniform_(low, high)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    reference = copy.deepcopy(network).eval()
    return Backbone(network, [], size), reference


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "densenet121", "timm:efficientnet_lite0", "efficientnet_lite0"]
)
def test_batchnorm_is_folded_and_nothing_changes(name: str) -> None:
    size = 64
    if name == "densenet121":  # Has no residual blocks; its BatchNorms stand before the convolutions.
        network = build_backbone(name, "none", ["features.denseblock*"], size, seed=0).network
        assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        return
    backbone, reference = unfolded(name, size, seed=3)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.network.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in reference.modules())
    blocks = [block.name for block in backbone.blocks]
    assert backbone.fingerprint == Backbone(copy.deepcopy(reference), blocks, size).fingerprint
    expected: list[torch.Tensor] = []
    for block in blocks:
        reference.get_submodule(block).register_forward_hook(lambda m, i, output: expected.append(output.clone()))
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        backbone(images, lambda number, activation: found.append(activation.clone()))
        reference((images.float() - backbone.mean_C1S) / backbone.std_C1S)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_an_observed_convolution_is_not_folded() -> None:
    network = build("resnet18", patterns=("layer1.0.conv1", "layer1.0.bn2")).network
    assert isinstance(network.get_submodule("layer1.0.bn1"), torch.nn.BatchNorm2d)
    assert isinstance(network.get_submodule("layer1.0.bn2"), torch.nn.Identity)


class Twice(torch.nn.Module):
    """A convolution that is read by its BatchNorm and once more, unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.norm.running_mean += 1.0
        self.head = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.head(self.norm(y) + y)


def test_a_network_that_folding_would_change_is_left_alone() -> None:
    backbone = Backbone(Twice(), ["head"], 32)
    assert isinstance(backbone.network.norm, torch.nn.BatchNorm2d)
