"""A frozen network by the CPU's own ways computes the same, and is given back as it was."""

import copy

import pytest
import torch
from torch import nn

from trajdist.extraction import cpu_kernels
from trajdist.extraction.backbones import build_backbone
from trajdist.extraction.cpu_kernels import PrepackedConv2d, restore, specialise
from trajdist.extraction.folding import fold_padding

pytestmark = pytest.mark.skipif(not cpu_kernels._available(), reason="this build of torch has no oneDNN")

CONVOLUTIONS = {
    "plain": nn.Conv2d(16, 24, 3, padding=1),
    "no bias": nn.Conv2d(16, 24, 1, bias=False),
    "stem": nn.Conv2d(3, 8, 7, stride=2, padding=3),
    "grouped": nn.Conv2d(16, 32, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(24, 24, 5, stride=2, padding=2, groups=24),
    "dilated": nn.Conv2d(5, 7, 3, padding=(2, 1), dilation=(2, 1)),
}


def images(channels, count=3, side=14):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, channels, side, side, generator=generator).to(memory_format=torch.channels_last)


def prepacked_copy(conv):
    copied = copy.deepcopy(conv).requires_grad_(False)
    specialise(copied)
    assert type(copied) is PrepackedConv2d
    return copied


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@torch.no_grad()
def test_it_is_the_same_convolution(kind):
    conv = CONVOLUTIONS[kind]
    packed = prepacked_copy(conv)
    for count, side in ((3, 14), (1, 14), (8, 9)):
        x = images(conv.in_channels, count, side)
        torch.testing.assert_close(packed(x), conv(x), rtol=1e-5, atol=1e-6)
    # One copy of the weights, not two.
    assert packed.weight is None


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@torch.no_grad()
def test_the_weights_come_back_to_the_bit(kind):
    conv = CONVOLUTIONS[kind]
    packed = prepacked_copy(conv)
    packed(images(conv.in_channels))
    restore(packed)
    assert type(packed) is nn.Conv2d
    assert torch.equal(packed.weight, conv.weight)
    assert not packed.weight.requires_grad


@torch.no_grad()
def test_a_move_or_another_type_of_number_finds_the_weights():
    conv = CONVOLUTIONS["plain"]
    packed, x = prepacked_copy(conv), images(16)
    packed(x)
    assert torch.equal(packed.double()(x.double()), copy.deepcopy(conv).double()(x.double()))
    assert packed.weight.dtype == torch.float64


@torch.no_grad()
def test_half_precision_in_between():
    conv = CONVOLUTIONS["plain"]
    packed, x = prepacked_copy(conv), images(16)
    for _ in range(2):
        torch.testing.assert_close(packed(x), conv(x), rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), conv(x))


def test_gradients_of_the_image_pass():
    packed, x = prepacked_copy(CONVOLUTIONS["plain"]), images(16).requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())


def test_other_convolutions_are_left_alone():
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(
        Own(3, 3, 1), nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 1, padding_mode="reflect")
    )
    kinds = [type(module) for module in network]
    specialise(network)
    assert [type(module) for module in network] == kinds


def test_where_torch_lacks_the_operators_nothing_changes(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_available", lambda: False)
    conv = nn.Conv2d(3, 3, 1)
    specialise(conv)
    assert type(conv) is nn.Conv2d


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_lite0"])
@torch.no_grad()
def test_backbones_are_the_same(name):
    backbone = build_backbone(name, "none", [], 64, seed=0)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def outputs():
        seen = []
        backbone(pixels, lambda block, activation: seen.append(activation.clone()))
        return seen

    plain = outputs()
    specialise(backbone.network)
    assert any(isinstance(module, PrepackedConv2d) for module in backbone.network.modules())
    for _ in range(2):
        for one, other in zip(outputs(), plain, strict=True):
            # Kernels may add up in another order: float32 rounding, layer after layer, of the largest values.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    restore(backbone.network)
    assert not any("forward" in vars(module) for module in backbone.network.modules())
    for one, other in zip(outputs(), plain, strict=True):
        assert torch.equal(one, other)


def chosen_pixels(count, side, seed=0):
    """Both opposite corners of every map, and some pixels between."""
    generator = torch.Generator().manual_seed(seed)
    inner = [torch.randperm(side**2 - 2, generator=generator)[: side**2 // 5] + 1 for _ in range(count)]
    return torch.stack([torch.cat([one, torch.tensor([0, side**2 - 1])]) for one in inner])


def last_activation(backbone, pixels, at=None):
    seen = []
    backbone(pixels, lambda block, activation: seen.append((block, activation.clone())), at)
    assert [block for block, _ in seen] == list(range(len(backbone.blocks)))
    return seen[-1][1]


@pytest.fixture
def times_computed_at_pixels(monkeypatch):
    done, residual_at = [], cpu_kernels.residual_at

    def counted(*arguments):
        result = residual_at(*arguments)
        done.append(result is not None)
        return result

    monkeypatch.setattr(cpu_kernels, "residual_at", counted)
    return done


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
@torch.no_grad()
def test_the_last_block_at_some_pixels(name, times_computed_at_pixels):
    backbone = build_backbone(name, "none", [], 160, seed=0)
    images = torch.randint(0, 256, (3, 3, 160, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    specialise(backbone.network)
    whole = last_activation(backbone, images)
    for seed in range(2):
        at = chosen_pixels(3, backbone.blocks[-1].side, seed)
        found = last_activation(backbone, images, at).flatten(2)
        index = at[:, None].expand(-1, whole.shape[1], -1)
        bound = 1e-5 * float(whole.abs().max())
        torch.testing.assert_close(found.gather(2, index), whole.flatten(2).gather(2, index), rtol=0, atol=bound)
        # Weights that were packed for pixels serve whole maps again.
        assert torch.equal(last_activation(backbone, images), whole)
    assert times_computed_at_pixels == [True, True]


@torch.no_grad()
def test_weights_packed_for_pixels_come_back_to_the_bit():
    conv = CONVOLUTIONS["plain"]
    packed, x = prepacked_copy(conv), images(16)
    packed.at(x, chosen_pixels(3, 14))
    assert packed.weight is None
    restore(packed)
    assert torch.equal(packed.weight, conv.weight)


@pytest.mark.parametrize(
    ("name", "plain", "part"), [("resnext50_32x4d", True, 0.2), ("resnet18", False, 0.2), ("resnet18", True, 0.5)]
)
@torch.no_grad()
def test_where_pixels_alone_cannot_be_had_the_whole_block_is_computed(name, plain, part, times_computed_at_pixels):
    """Grouped convolutions, half precision, and more pixels than it would pay for."""
    backbone = build_backbone(name, "none", [], 160, seed=0)
    images = torch.randint(0, 256, (2, 3, 160, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    specialise(backbone.network)
    pixels = backbone.blocks[-1].side ** 2
    at = torch.arange(round(part * pixels)).expand(2, -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=not plain):
        assert torch.equal(last_activation(backbone, images, at), last_activation(backbone, images))
    assert times_computed_at_pixels == [False]


def test_the_quickstarts_network_pads_in_its_convolutions():
    """To the bit what its own layers compute that copy the map first; fingerprints do not notice."""
    efficientnet = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    torch.manual_seed(0)
    own = efficientnet.from_name("efficientnet-lite0").eval()
    padded = copy.deepcopy(own)
    fold_padding(padded)
    x = images(3, 2, 64)
    with torch.no_grad():
        assert torch.equal(padded(x), own(x))
    assert list(padded.state_dict()) == list(own.state_dict())
    left = [m for m in padded.modules() if isinstance(m, nn.Conv2d) and hasattr(m, "static_padding")]
    assert 0 < len(left) < 8
