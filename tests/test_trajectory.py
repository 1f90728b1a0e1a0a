"""Trajectories against a plain forward with hooks; statistics against numpy; one activation at a time."""

from __future__ import annotations

import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from trajdist.errors import ConfigError
from trajdist.extraction import cpu_kernels, trajectory
from trajdist.extraction.backbones import Backbone, Block, build_backbone
from trajdist.extraction.networks import IMAGENET_MEAN, IMAGENET_STD
from trajdist.extraction.projection import BlockMoments, Projection, fit_projection
from trajdist.extraction.trajectory import TrajectoryExtractor, pool, pool_places, pool_subcells, trajectory_steps

IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone("resnet18", "none", [], 64, seed=0)


@pytest.fixture(scope="module")
def shallow() -> Backbone:
    """Half of it, with and without stride: what takes minutes to compile takes seconds."""
    return build_backbone("resnet18", "none", ["layer[12].[01]"], 64, seed=0)


def random_projection_for(backbone: Backbone, feature_dim: int, subcells: int = 1) -> Projection:
    generator = torch.Generator().manual_seed(1)
    projection = Projection([step.channels for step in trajectory_steps(backbone.blocks, 4, subcells)], feature_dim)
    for step, channels in enumerate(projection.channels):
        width = min(channels, feature_dim)
        matrix = torch.randn(channels, width, generator=generator) / channels
        projection.set_step(step, torch.randn(channels, generator=generator), matrix)
    return projection


def plain_activations() -> list[torch.Tensor]:
    """The same network as torchvision builds it, with hooks, in plain memory format."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    found: list[torch.Tensor] = []
    for name in BLOCKS:
        network.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.append(output))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        network((IMAGES / 255.0 - mean) / std)
    return found


@pytest.mark.parametrize("images_per_pass", [1, None])
def test_half_precision_ends_where_the_backbone_does(backbone, images_per_pass):
    """Projection and statistics are in float32, whatever is autocast around them and in however many passes."""
    extractor, found = TrajectoryExtractor(backbone, random_projection_for(backbone, 8), 4), []
    extractor.images_per_pass = images_per_pass
    with torch.autocast("cpu", torch.bfloat16):
        extractor.observe(IMAGES, lambda step, pooled: found.append(torch.is_autocast_enabled("cpu")))
    assert found == [False] * len(extractor.steps)


@pytest.mark.parametrize("resolution", [2, 4, 16])
def test_values_are_those_of_a_plain_forward(backbone, resolution):
    projection = random_projection_for(backbone, 80)
    ours = TrajectoryExtractor(backbone, projection, resolution)(IMAGES)
    assert ours.shape == (3, resolution, resolution, 8, 80)
    assert ours.dtype == torch.float32
    for block, activation in enumerate(plain_activations()):
        shrinks = activation.shape[-1] >= resolution
        size = (resolution, resolution)
        grid = F.adaptive_avg_pool2d(activation, size) if shrinks else F.interpolate(activation, size, mode="bilinear")
        rows = grid.permute(0, 2, 3, 1) - projection.get_buffer(f"mean_{block}")
        wanted = rows @ projection.get_buffer(f"matrix_{block}")
        torch.testing.assert_close(ours[..., block, : wanted.shape[-1]], wanted, rtol=1e-3, atol=1e-4)


def test_fine_blocks_come_with_their_subcells_too(backbone):
    steps = trajectory_steps(backbone.blocks, 4, subcells=2)
    fine = ("layer1.0", "layer1.1", "layer2.0", "layer2.1")
    names = [part for name in BLOCKS for part in ([f"{name} 2 x 2"] if name in fine else []) + [name]]
    assert [step.name for step in steps] == names
    assert [step.channels for step in steps] == [256, 64] * 2 + [512, 128] * 2 + [256, 256, 512, 512]
    assert trajectory_steps(backbone.blocks, 4, 1) == [step for step in steps if step.subcells == 1]
    projection = Projection([step.channels for step in steps], 1024)
    for number, channels in enumerate(projection.channels):
        projection.set_step(number, torch.zeros(channels), torch.eye(channels))
    extractor = TrajectoryExtractor(backbone, projection, 4, 2)
    ours, activations = extractor(IMAGES), plain_activations()
    assert ours.shape == (3, 4, 4, 12, 1024)
    for number, step in enumerate(steps):
        wanted = parts_of_places(activations[step.block], step.subcells)
        torch.testing.assert_close(ours[..., number, : step.channels], wanted, rtol=1e-3, atol=1e-4)
    places = torch.tensor([[3, 0], [15, 7], [1, 1]])
    chosen = ours.flatten(1, 2)[torch.arange(3)[:, None], places]
    torch.testing.assert_close(extractor.at(IMAGES, places), chosen, rtol=1e-4, atol=1e-5)


def parts_of_places(activation: torch.Tensor, subcells: int) -> torch.Tensor:
    """``[B, 4, 4, subcells**2 * C]``, part after part."""
    if activation.shape[-1] < 4:
        activation = F.interpolate(activation, (4, 4), mode="bilinear")
    size = activation.shape[-1] // (4 * subcells)
    means = activation.unflatten(3, (-1, size)).mean(4).unflatten(2, (-1, size)).mean(3)
    rows = [means[:, :, row::subcells, column::subcells] for row in range(subcells) for column in range(subcells)]
    return torch.cat(rows, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("side", "resolution", "subcells", "count"), [(16, 4, 4, 2), (16, 4, 5, 1), (7, 7, 2, 1)])
def test_blocks_that_are_too_coarse_have_no_subcells(side, resolution, subcells, count):
    assert len(trajectory_steps([Block("block", 8, "BCHW", side)], resolution, subcells)) == count


def test_blocks_with_fewer_channels_are_padded_with_zeros(backbone):
    projection = random_projection_for(backbone, 80)
    assert projection.valid_LD.sum(1).tolist() == [64, 64, 80, 80, 80, 80, 80, 80]
    ours = TrajectoryExtractor(backbone, projection, 4)(IMAGES)
    assert (ours[..., ~projection.valid_LD] == 0).all()
    assert (ours[..., projection.valid_LD] != 0).all()


def test_trajectories_can_be_trained_on(backbone):
    """A tensor that is made in inference mode could not."""
    ours = TrajectoryExtractor(backbone, random_projection_for(backbone, 4), 2)(IMAGES)
    weight = torch.ones(4, requires_grad=True)
    (ours * weight).sum().backward()
    assert weight.grad is not None


def test_one_activation_at_a_time(backbone, monkeypatch):
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watching_pool(map_BCHW: torch.Tensor, resolution: int) -> torch.Tensor:
        seen.append(weakref.ref(map_BCHW))
        alive.append(sum(reference() is not None for reference in seen))
        return pool(map_BCHW, resolution)

    monkeypatch.setattr(trajectory, "pool", watching_pool)
    ours = TrajectoryExtractor(backbone, random_projection_for(backbone, 4), 2)(IMAGES)
    assert len(alive) == 8
    # Beside a block's output its input still lives, and the input of the stage it is in.
    assert max(alive) <= 3
    assert not any(reference() is not None for reference in seen)
    assert ours.untyped_storage().nbytes() == ours.numel() * 4


BATCHES = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9), min_size=1, max_size=6)


def rows_for(batches: list[list[float]], channels: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Correlated rows with a large mean, garbage where the weight is 0."""
    generator = torch.Generator().manual_seed(len(batches))
    mix = torch.randn(channels, channels, generator=generator)
    made = []
    for weights in map(torch.tensor, batches):
        rows = torch.randn(len(weights), channels, generator=generator) @ mix + 300.0
        made.append((torch.where(weights[:, None] > 0, rows, torch.full_like(rows, 1e4)), weights))
    return made


def assert_moments_of(moments: BlockMoments, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    counted = np.concatenate([rows[weights > 0].double().numpy() for rows, weights in batches])
    assert int(moments.count) == len(counted)
    if len(counted):
        np.testing.assert_allclose(moments.mean_C, counted.mean(0), rtol=1e-6)
        np.testing.assert_allclose(moments.covariance_CC, np.cov(counted.T, bias=True), rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(moments.variance_C, moments.covariance_CC.diagonal())


def moments_in_panels(height: int) -> BlockMoments:
    """Of five channels, as those of thousands are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trajdist.extraction.projection.PANEL", height)
        return BlockMoments(5, torch.device("cpu"))


@pytest.mark.parametrize(("height", "sizes"), [(2, [4, 8, 5]), (3, [9, 10]), (5, [25]), (512, [25])])
def test_moments_keep_the_lower_half_in_panels(height, sizes):
    assert [panel.numel() for panel in moments_in_panels(height).panels] == sizes


@given(BATCHES, st.integers(1, 6))
def test_moments_are_those_of_numpy(batches, height):
    made, moments = rows_for(batches), moments_in_panels(height)
    for rows, weights in made:
        moments.update(rows, weights)
    assert_moments_of(moments, made)


@pytest.mark.parametrize("height", [2, 512])
def test_moments_of_several_processes_are_those_of_all_rows(height):
    own = [moments_in_panels(height) for _ in range(4)]
    made = rows_for([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0], [0.0], [1.0] * 5])
    barrier, boxes = threading.Barrier(4), [torch.empty(0)] * 4

    def process(rank: int) -> BlockMoments:
        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            boxes[rank] = tensor
            barrier.wait(30)
            total = torch.stack(boxes).sum(0)
            barrier.wait(30)
            return total

        moments = own[rank]
        moments.update(*made[rank])
        moments.all_reduce(all_reduce)
        return moments

    with ThreadPoolExecutor(4) as pool_of_threads:
        for moments in pool_of_threads.map(process, range(4)):
            assert_moments_of(moments, made)


@pytest.fixture
def measured() -> tuple[torch.Tensor, BlockMoments]:
    """Rows of 24 correlated channels of very different scales, and their moments."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=generator) * torch.logspace(0, 1.5, 24)
    rows = torch.randn(4000, 24, generator=generator) @ mix + 50.0
    moments = BlockMoments(24, torch.device("cpu"))
    moments.update(rows, torch.ones(len(rows)))
    return rows, moments


def test_pca_whitens_the_leading_components(measured):
    rows, moments = measured
    projection = Projection([24], 8)
    fit_projection(projection, [moments], "pca", seed=0)
    whitened = projection(0, rows[None])[0].double()
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), torch.eye(8).double(), rtol=0, atol=1e-3)
    assert whitened.mean(0).abs().max() < 1e-3
    # The leading ones: nothing else of that width reconstructs the rows better.
    centred = (rows - rows.mean(0)).double()
    left = centred - whitened @ torch.linalg.lstsq(whitened, centred).solution
    values = torch.linalg.eigvalsh(moments.covariance_CC)
    torch.testing.assert_close(left.square().sum() / len(rows), values[:-8].sum(), rtol=1e-3, atol=0)


def test_noise_directions_are_not_blown_up():
    generator = torch.Generator().manual_seed(3)
    rows = torch.cat([torch.randn(500, 2, generator=generator), torch.zeros(500, 2)], 1)
    moments = BlockMoments(4, torch.device("cpu"))
    moments.update(rows, torch.ones(500))
    projection, all_moments = Projection([4], 4), [moments]
    fit_projection(projection, all_moments, "pca", seed=0)
    assert not all_moments, "they are let go as they are used"
    assert projection.get_buffer("matrix_0").isfinite().all()
    assert projection.get_buffer("matrix_0").abs().max() < 1e3
    assert projection(0, rows[None])[..., 2:].abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["pca", "random"])
@pytest.mark.parametrize("silent", [1, 64])
def test_channels_silent_in_the_sample_are_not_blown_up(kind, silent):
    rows = torch.randn(500, 64, generator=torch.Generator().manual_seed(3))
    rows[:, :silent] = 0.0
    moments, projection = BlockMoments(64, torch.device("cpu")), Projection([64], 16)
    moments.update(rows, torch.ones(500))
    fit_projection(projection, [moments], kind, seed=0)
    # A block that is silent as a whole has no scale to compare with.
    largest = 100.0 if silent == 1 else 1e9
    assert projection.get_buffer("matrix_0").abs().max() < largest
    rows[:, 0] = 0.1
    assert projection(0, rows[None]).abs().max() < 0.1 * largest


def test_the_random_projections_of_two_seeds_have_no_step_in_common(measured):
    _, moments = measured
    maps = []
    for seed in (0, 1):
        projection = Projection([24] * 3, 8)
        fit_projection(projection, [moments] * 3, "random", seed)
        maps += [projection.get_buffer(f"matrix_{step}") for step in range(3)]
    assert not any(torch.equal(one, other) for one, other in combinations(maps, 2))


def test_random_projection_is_orthogonal_with_unit_variance(measured):
    rows, moments = measured
    projection = Projection([24], 8)
    fit_projection(projection, [moments], "random", seed=0)
    reduced = projection(0, rows[None])[0]
    torch.testing.assert_close(reduced.var(0, correction=0), torch.ones(8), rtol=0, atol=1e-3)
    assert reduced.mean(0).abs().max() < 1e-2
    # On standardised channels the directions are orthogonal.
    directions = projection.get_buffer("matrix_0") * moments.covariance_CC.diagonal().float().sqrt()[:, None]
    directions = F.normalize(directions, dim=0)
    torch.testing.assert_close(directions.T @ directions, torch.eye(8), rtol=0, atol=1e-5)
    other = Projection([24], 8)
    fit_projection(other, [moments], "random", seed=1)
    assert not torch.allclose(other.get_buffer("matrix_0"), projection.get_buffer("matrix_0"))


def test_chosen_places_are_those_of_the_whole(backbone):
    projection = random_projection_for(backbone, 80)
    extractor = TrajectoryExtractor(backbone, projection, 4)
    places = torch.tensor([[0, 5, 15], [1, 2, 3], [7, 8, 9]])
    ours, whole = extractor.at(IMAGES, places), extractor(IMAGES).flatten(1, 2)
    assert ours.shape == (3, 3, 8, 80)
    for image, chosen in enumerate(places):
        torch.testing.assert_close(ours[image], whole[image, chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resolution", [1, 2])
def test_of_few_places_the_last_block_computes_only_what_they_show(monkeypatch, resolution):
    """A place is a pixel of the last map, or all of them, and then nothing can be left out."""
    backbone = build_backbone("resnet18", "none", [], 64, seed=0)
    extractor = TrajectoryExtractor(backbone, random_projection_for(backbone, 80), resolution)
    extractor.choose_pass_size("cpu")
    whole, asked, residual_at = extractor(IMAGES).flatten(1, 2), [], cpu_kernels.residual_at

    def counted(*arguments):
        asked.append(residual_at(*arguments))
        return asked[-1]

    monkeypatch.setattr(cpu_kernels, "residual_at", counted)
    places = torch.tensor([[3], [0], [2]]) % resolution**2
    chosen = whole[torch.arange(3)[:, None], places]
    torch.testing.assert_close(extractor.at(IMAGES, places), chosen, rtol=1e-4, atol=1e-5)
    assert [one is not None for one in asked] == [resolution == 2]


@pytest.mark.parametrize("patterns", [["layer4*[0-9]"], ["layer4.1", "layer4.1.conv2"], ["layer4.1.bn2"]])
def test_observed_modules_within_the_last_block_are_called(patterns):
    """They see the whole map, so the block is not computed at chosen places alone."""
    backbone = build_backbone("resnet18", "none", patterns, 64, seed=0)
    extractor = TrajectoryExtractor(backbone, random_projection_for(backbone, 80), 2)
    extractor.choose_pass_size("cpu")
    places = torch.tensor([[3], [0], [2]])
    chosen = extractor(IMAGES).flatten(1, 2)[torch.arange(3)[:, None], places]
    assert bool((chosen.abs().amax((0, 1, 3)) > 1e-3).all())
    torch.testing.assert_close(extractor.at(IMAGES, places), chosen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [4, 8, 10, 16, 3])
@pytest.mark.parametrize("subcells", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_pooling_of_some_places_is_that_of_all(side, subcells, memory_format):
    """Where a part is whole pixels and where it is not; in both memory formats."""
    activation = torch.randn(3, 6, side, side, generator=torch.Generator().manual_seed(side))
    places = torch.tensor([[0, 5, 15], [1, 1, 3], [14, 8, 9]])
    some = pool_places(activation.to(memory_format=memory_format), 4, subcells, places)
    every = pool_subcells(activation, 4, subcells)
    torch.testing.assert_close(some, every[torch.arange(3)[:, None], places], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_even_pooling_as_a_mean(kind, memory_format):
    """What CUDA gets where its own pooling is slow."""
    activation = torch.randn(2, 3, 28, 14, generator=torch.Generator().manual_seed(0)).to(kind)
    pooled = trajectory._pool_even(activation.to(memory_format=memory_format), 7)
    expected = F.adaptive_avg_pool2d(activation.float(), 7).flatten(2).transpose(1, 2)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(("height", "width"), [(9, 14), (7, 8), (32, 20)])
def test_uneven_pooling_as_products(height, width):
    """What MPS gets where its own pooling refuses."""
    activation = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trajectory._pool_uneven(activation, 7), F.adaptive_avg_pool2d(activation, 7))


@pytest.mark.parametrize("subcells", [1, 2])
@pytest.mark.parametrize("images_per_pass", [1, 2, 5])
def test_in_passes_it_is_the_same(monkeypatch, subcells, images_per_pass):
    """All places and some of them."""
    backbone = build_backbone("resnet18", "none", [], 64, seed=0)
    projection = random_projection_for(backbone, 80, subcells)
    whole, cut = (TrajectoryExtractor(backbone, projection, 4, subcells) for _ in range(2))
    monkeypatch.setattr(trajectory, "PASS_BYTES", images_per_pass * backbone.largest_bytes)
    cut.choose_pass_size("cpu")
    assert len(cut.passes(5)) == -(-5 // images_per_pass)
    images, places = torch.cat([IMAGES, IMAGES.flip(3)])[:5], torch.tensor([[0, 5, 15], [1, 2, 3]] * 3)[:5]
    torch.testing.assert_close(cut(images), whole(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cut.at(images, places), whole.at(images, places), rtol=1e-4, atol=1e-5)


def test_an_accelerators_pass_is_no_larger_than_its_kernels_index(backbone):
    """CUDA's pooling of a channels-last map fails from 2**31 - 1 numbers on."""
    extractor = TrajectoryExtractor(backbone, random_projection_for(backbone, 8), 2)
    extractor.choose_pass_size("cuda")
    assert len(extractor.passes(20_000)) == 1
    largest = max(block.channels * block.side**2 for block in backbone.blocks)
    assert all((part.stop - part.start) * largest < 2**31 - 1 for part in extractor.passes(1_000_000))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("network", "images_per_pass"), [pytest.param("backbone", None, marks=pytest.mark.slow), ("shallow", 2)]
)
def test_compiled_it_is_the_same(network, images_per_pass, request):
    """Of all places and of chosen ones, from memory that ends with the last image as a worker's does."""
    backbone = request.getfixturevalue(network)
    projection = random_projection_for(backbone, 80)
    plain, compiled = (TrajectoryExtractor(backbone, projection, 4) for _ in range(2))
    compiled.choose_pass_size("cpu", images_per_pass)
    compiled.compile()
    images = torch.cat([IMAGES, IMAGES[:1].flip(3)]).contiguous(memory_format=torch.channels_last).share_memory_()
    places = torch.tensor([[0, 5]] * 4)
    for _ in range(2):
        torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled.at(images, places), plain.at(images, places), rtol=1e-4, atol=1e-4)
    assert not torch._inductor.config.freezing


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiler_that_errs_is_found_out(backbone, monkeypatch):
    extractor = TrajectoryExtractor(backbone, random_projection_for(backbone, 8), 2)
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *inputs: 1.1 * function(*inputs))
    with pytest.raises(ConfigError, match=r"backbone\.compile=true gives wrong trajectories here .*: set it to false"):
        extractor.compile()(IMAGES)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiler_that_rounds_elsewhere_is_trusted_in_half_precision_alone(backbone, monkeypatch):
    """One large outlier, as roundings give it; a wrong step of a trajectory is found out there too."""

    def compiled(change):
        monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *inputs: change(function(*inputs)))
        return TrajectoryExtractor(backbone, random_projection_for(backbone, 8), 2).compile()

    def outlier(trajectories):
        trajectories.view(-1)[0] += trajectories.abs().max()
        return trajectories

    def wrong(trajectories):
        trajectories[:, :, 0] = 0
        return trajectories

    with torch.autocast("cpu", torch.bfloat16):
        compiled(outlier)(IMAGES)
        with pytest.raises(ConfigError, match=r"backbone\.compile=true"):
            compiled(wrong)(IMAGES)
    with pytest.raises(ConfigError, match=r"backbone\.compile=true"):
        compiled(outlier)(IMAGES)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_few_batch_sizes_are_compiled_and_the_others_run(shallow, monkeypatch):
    """More graphs than the limit of torch's compiler, and more sizes than are worth a graph."""
    compile, traced = torch.compile, []

    def without_code(function, **options):
        def backend(graph, inputs):
            traced.append(graph)
            return graph.forward

        return compile(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", without_code)
    monkeypatch.setattr(trajectory, "MOST_GRAPHS", 10)
    extractor = TrajectoryExtractor(shallow, random_projection_for(shallow, 8), 2).compile()
    for _ in range(2):
        for size in range(1, 13):
            images = IMAGES[:1].expand(size, -1, -1, -1)
            torch.testing.assert_close(extractor(images)[-1], extractor(IMAGES[:1])[0], rtol=1e-4, atol=1e-4)
    assert len(traced) == 10


def test_no_compiler(backbone, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler: install g\+\+, or set it to false"):
        TrajectoryExtractor(backbone, random_projection_for(backbone, 8), 2).compile()
