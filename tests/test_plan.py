"""``trajdist plan``: what it counts is what a run then needs, and it leaves nothing behind."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import write_images
from jobs import launch

from trajdist.argument_types import size
from trajdist.cli import main
from trajdist.config_files import load_config
from trajdist.data.sources import open_sets
from trajdist.data.storage import Access
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.planning import budget, probe
from trajdist.planning.budget import LARGEST_BATCH, largest_within
from trajdist.planning.footprint import LiveBytes, Rehearsal, build_modules
from trajdist.planning.plan import Options, make_plan, plan_table
from trajdist.planning.probe import Rates
from trajdist.sharding import Plan

TINY = ["backbone.name=resnet18", "backbone.weights=none", "data.image_size=64", "model.feature_dim=16"]
TINY += ["model.hidden_dim=64", "model.spatial_resolution=4", "runtime.mixed_precision=no"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("plan") / "images", 60)


def plan(images, *overrides, phases=(1,), **options):
    """The plan of a tiny job."""
    config = load_config(None, [*TINY, f"data.imagenet.path={images}", f"data.domain.path={images}", *overrides])
    paths = {1: ("imagenet", str(images)), 2: ("domain", str(images))}
    sources = open_sets(dict(paths[phase] for phase in phases), Access())
    return make_plan(config, sources, list(phases), Options(**{"measure": False, "device": "cpu", **options}))


# What is planned and what is then measured, in processes of their own: a plan's base is its own resident set.
LINEAR = ["quality", "backbone.weights=none", "data.imagenet.num_epochs=1", "data.domain.num_epochs=1"]
LINEAR += ["data.image_size=160", "model.spatial_resolution=10"]
TRANSFORMER = [*TINY[:2], "data.image_size=96", "model.type=transformer", "model.hidden_dim=128"]
KEEPING = [*TINY[:3], "model.hidden_dim=3072", "model.spatial_resolution=4", "ema.decay=0.9"]
KEEPING += ["validation.every_epochs=1"]
JOBS = {
    "linear, both phases": (2, LINEAR),
    "transformer": (1, ["default", *TRANSFORMER, "data.imagenet.batch_size=16"]),
    "activations": (1, ["default", *TINY[:2], "data.imagenet.batch_size=32"]),
    "kept weights": (1, ["default", *KEEPING, "data.imagenet.batch_size=16", "data.imagenet.num_epochs=2"]),
    "wide blocks": (1, ["default", "backbone.weights=none", "data.image_size=96", "data.imagenet.batch_size=16"]),
}


@pytest.mark.parametrize(
    "name", [*list(JOBS)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(JOBS)[1:])]
)
def test_the_plan_is_what_a_run_measures(name, images, tmp_path):
    phases, job = JOBS[name]
    run_dir = tmp_path / "run"
    job = [*job, f"run_dir={run_dir}", f"data.imagenet.path={images}", "runtime.mixed_precision=no"]
    job += [f"data.domain.path={images}"] if phases == 2 else []
    # Contrast, the objective of both phases' job, keeps nothing in Phase 2.
    job += [f"cache.dir={tmp_path / 'cache'}", "cache.max_gib=0.005"]
    planned = launch(["plan", *job, "--json", "--no-probe"], from_nothing=True)
    assert planned.returncode == 0, planned.stderr
    assert not run_dir.exists()
    plans = json.loads(planned.stdout)
    ran = launch(["run", *job], from_nothing=True)
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert plans.keys() == summary.keys()
    for phase, measured in summary.items():
        expected = plans[phase]
        assert expected["peak_memory_bytes"] == pytest.approx(measured["peak_memory_bytes"], rel=0.15)
        assert (expected["images"] * expected["epochs"], expected["steps"]) == (measured["images"], measured["steps"])
        assert expected["parameters"]["trainable"] == measured["trained_parameters"]
    last = max((run_dir / "checkpoints").iterdir())
    size = sum(file.stat().st_size for file in last.iterdir())
    assert plans[max(plans)]["checkpoint_bytes"] == pytest.approx(size, rel=0.15, abs=4000)
    on_disk = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    assert on_disk / 2 < sum(each["disk_bytes"] for each in plans.values()) < 2 * on_disk
    kept = sum(int(np.count_nonzero(np.fromfile(file, np.int64))) for file in (tmp_path / "cache").glob("*/versions"))
    assert kept == sum(each["cached_images"] for each in plans.values()) > 0
    assert max(each["cache_bytes"] for each in plans.values()) <= 0.005 * 2**30


def test_the_command_trains_nothing_and_writes_nothing(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trajdist.training.phases.run", None)
    monkeypatch.setattr(probe, "LIMIT_S", 0.01)
    command = ["plan", "default", *TINY, f"data.imagenet.path={images}", "--device", "cpu"]
    assert main([*command, "--memory", "3GiB"]) == 0
    shown = capsys.readouterr().out
    assert "peak while training" in shown
    assert "largest batch_size" in shown
    assert main([*command, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert list(plans) == ["phase1"]
    assert plans["phase1"]["images_per_s"] > 0
    assert plans["phase1"]["bottleneck"] in ("decode", "backbone", "model")
    assert not list(tmp_path.iterdir())


def test_the_probe_changes_no_weight(images, monkeypatch):
    monkeypatch.setattr(probe, "LIMIT_S", 0.01)
    seen = {}

    class Watched(Rehearsal):
        def __init__(self, config, phase, modules, **rest):
            seen[phase] = [weight.clone() for weight in modules.model.parameters()]
            super().__init__(config, phase, modules, **rest)

    monkeypatch.setattr("trajdist.planning.plan.Rehearsal", Watched)
    torch.manual_seed(0)
    plan(images, measure=True)
    probed = seen.pop(1)
    monkeypatch.setattr(probe, "measure", lambda *args: Rates())
    torch.manual_seed(0)
    plan(images, measure=True)
    assert all(torch.equal(*pair) for pair in zip(probed, seen[1], strict=True))


def test_json_holds_every_figure(images):
    plans = plan(images, phases=(1, 2), memory_bytes=3 * 2**30, processes=2)
    assert list(plans) == ["phase1", "phase2"]
    assert json.loads(json.dumps(plans, allow_nan=False)) == plans
    for figures in plans.values():
        assert figures["num_processes"] == 2
        assert (
            figures["required_memory_bytes"]
            >= figures["peak_memory_bytes"]
            > sum(figures["parts"][name] for name in ("base_bytes", "backbone_bytes", "model_bytes", "optimizer_bytes"))
        )
        assert figures["parts"]["optimizer_bytes"] == 2 * figures["parts"]["gradients_bytes"]
        assert figures["parts"]["trajectories_bytes"] == figures["batch_size"] * 16 * 8 * 16 * 4
        assert figures["largest_batch_size"] > figures["batch_size"]
    assert plans["phase2"]["parameters"]["trainable"] < plans["phase1"]["parameters"]["trainable"]
    assert plans["phase2"]["statistics_peak_bytes"] == 0
    assert plan_table(plans).row_count > 20


def test_steps_are_those_of_the_run(images):
    overrides = ["data.imagenet.batch_size=5", "data.imagenet.gradient_accumulation_steps=2"]
    figures = plan(images, *overrides, "data.imagenet.num_epochs=3", processes=2)["phase1"]
    walk = Plan(figures["images"], 3, 20, 2, 5)
    assert (figures["images"], figures["held_out_images"]) == (54, 6)
    assert (figures["global_batch"], figures["micro_batches"]) == (walk.global_batch, walk.micro_batches)
    assert (figures["steps_per_epoch"], figures["steps"]) == (walk.steps_per_epoch, walk.total_steps)


def test_a_given_rate_is_not_measured(images, monkeypatch):
    monkeypatch.setattr(probe, "measure", None)
    figures = plan(images, measure=True, images_per_s=10.0, processes=3)["phase1"]
    assert figures["images_per_s"] == 30.0
    assert figures["hours_per_epoch"] == pytest.approx(54 / 30 / 3600)
    assert figures["hours"] > figures["hours_per_epoch"]
    assert figures["bottleneck"] == "given"


def test_cached_images_cost_the_models_time_alone(images, monkeypatch):
    monkeypatch.setattr(probe, "measure", lambda *args: Rates(backbone=10, model=1000))
    epochs = "data.imagenet.num_epochs=11"
    without, all_of_them, some = (
        plan(images, epochs, *cache, measure=True)["phase1"]
        for cache in ([], ["cache.dir=/nowhere"], ["cache.dir=/nowhere", f"cache.max_gib={27 * 4096 / 2**30}"])
    )
    assert (without["cached_images"], without["cache_bytes"]) == (0, 0)
    assert (all_of_them["cached_images"], all_of_them["cache_bytes"]) == (54, 54 * 4096)
    assert some["cached_images"] == 27
    saved = [without["hours"] - figures["hours"] for figures in (all_of_them, some)]
    # The backbone takes 1/10 s for an image.
    assert saved == pytest.approx([10 * count * 0.1 / 3600 for count in (54, 27)])
    assert without["hours_per_epoch"] == all_of_them["hours_per_epoch"]


@pytest.mark.parametrize(
    ("phase", "override", "batch_size", "extracted"),
    [
        (1, "train.cell_fraction=1", 8, (8, None)),
        (1, "train.cell_fraction=0.25", 1000, (32, 4)),
        (2, "train.cell_fraction=0.25", 8, (8, 4)),
        (2, "domain_adaptation.objective=contrast", 8, (16, None)),
    ],
)
def test_the_probe_does_what_a_step_does(phase, override, batch_size, extracted, images, monkeypatch):
    """Images that pass through the backbone, and places of each, None for all; a drawn copy is no image of its own."""
    seen, timed, extract = [], [], TrajectoryExtractor._extract

    def watched(extractor, images, places):
        seen.append((len(images), places if places is None else places.shape[1]))
        return extract(extractor, images, places)

    def one_second(work, device):
        seen.clear()
        work()
        timed.append(list(seen))
        return 1.0

    monkeypatch.setattr(TrajectoryExtractor, "_extract", watched)
    monkeypatch.setattr(probe, "_seconds", one_second)
    monkeypatch.setattr(probe, "LIMIT_S", 0.01)
    sizes = [f"data.{name}.batch_size={batch_size}" for name in ("imagenet", "domain")]
    figures = plan(images, override, *sizes, phases=(phase,), measure=True)[f"phase{phase}"]
    assert timed == [[extracted], []]
    assert figures["backbone_images_per_s"] == figures["model_images_per_s"] == min(batch_size, probe.LARGEST_STEP)


def test_contrast_takes_one_pass_more(images):
    objectives = ("reconstruction", "contrast")
    hours = [
        plan(images, f"domain_adaptation.objective={name}", phases=(2,), images_per_s=10.0)["phase2"]["hours"]
        for name in objectives
    ]
    assert hours[1] - hours[0] == pytest.approx(54 / 10 / 3600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a device that is not here")
def test_a_device_that_is_not_here_has_bytes_and_no_rate(images, monkeypatch):
    monkeypatch.setattr(probe, "LIMIT_S", 0.01)
    auto = "runtime.mixed_precision=auto"
    figures = plan(images, auto, device="cuda", measure=True)["phase1"]
    assert (figures["precision"], figures["bottleneck"]) == ("bf16", "unknown")
    assert figures["images_per_s"] is figures["hours"] is None
    assert figures["decoded_images_per_s"] > 0
    assert figures["parts"]["base_bytes"] == 0
    full = plan(images, device="cuda")["phase1"]
    assert figures["parts"]["model_activations_bytes"] < full["parts"]["model_activations_bytes"]


def test_the_largest_batch_fits_and_one_more_does_not(images):
    memory_bytes = 2 * 2**30
    batch_size = plan(images, device="cuda", memory_bytes=memory_bytes)["phase1"]["largest_batch_size"]
    needed = [
        plan(images, f"data.imagenet.batch_size={size}", device="cuda")["phase1"]["required_memory_bytes"]
        for size in (batch_size, batch_size + 1)
    ]
    assert needed[0] <= memory_bytes - budget.CUDA_RESERVE < needed[1]
    assert plan(images, device="cuda", memory_bytes=2**20)["phase1"]["largest_batch_size"] == 0


def test_a_checkpoint_on_its_way_takes_memory_beside_the_steps(images):
    wide = "model.hidden_dim=1024"
    often, never = (plan(images, wide, f"checkpoint.every_steps={steps}")["phase1"] for steps in (1, 1000))
    assert often["parts"]["saving_bytes"] == 3 * often["parts"]["gradients_bytes"]
    above_base = [each["peak_memory_bytes"] - each["parts"]["base_bytes"] for each in (often, never)]
    assert above_base[0] > above_base[1]
    assert plan(images, device="cuda")["phase1"]["parts"]["saving_bytes"] == 0


def test_kept_weights_are_counted(images):
    validates, average = "validation.every_epochs=1", "ema.decay=0.9"

    def grown(device, *overrides):
        """What these keys add to the parts and to a checkpoint, in multiples of the trained weights."""
        before, after = (plan(images, *each, device=device)["phase1"] for each in ((), overrides))
        added = [after["parts"][name] - before["parts"][name] for name in ("kept_bytes", "saving_bytes")]
        added.append(after["checkpoint_bytes"] - before["checkpoint_bytes"])
        return [round(each / before["parts"]["gradients_bytes"]) for each in added]

    assert grown("cpu", average, validates) == [3, 2, 2]
    # The best weights and the copies for a checkpoint are on the host.
    assert grown("cuda", average, validates) == [2, 0, 2]
    assert grown("cuda", validates, "validation.keep=last") == [1, 0, 0]
    assert grown("cuda", "logging.trackers=[tensorboard]") == [1, 0, 0]


def test_gradients_that_wait_are_counted(images):
    def model_bytes(*overrides, **options):
        return plan(images, *overrides, **options)["phase1"]["parts"]["model_activations_bytes"]

    alone = model_bytes()
    assert model_bytes("data.imagenet.gradient_accumulation_steps=4") > alone
    assert model_bytes(processes=2) > alone


@given(
    start=st.integers(1, 4096),
    fixed=st.integers(0, 10**9),
    slope=st.integers(1, 10**6),
    jump=st.integers(0, 10**8),
    available=st.integers(0, 10**10),
)
def test_largest_within(start, fixed, slope, jump, available):
    asked = []

    def needed(size):
        asked.append(size)
        return fixed + slope * size + jump * (size > 100)

    found = largest_within(needed, available, start)
    assert found == 0 or needed(found) <= available
    assert found == LARGEST_BATCH or needed(found + 1) > available
    assert len(set(asked)) <= 60


def test_the_last_pass_of_a_batch_stands_for_all(images):
    """Counting every pass of a batch of thousands would take minutes."""
    config = load_config(None, [*TINY, f"data.imagenet.path={images}"])
    found = []
    for rehearses in (False, True):
        modules = build_modules(config, 1)
        modules.extractor.choose_pass_size("cpu")
        rehearsal = Rehearsal(config, 1, modules, precision="no", micro_batches=1, shared_gradients=False)
        rehearsal.extractor.rehearses = rehearses
        batch_size = 3 * rehearsal.extractor.images_per_pass
        found.append(rehearsal.peaks(batch_size))
        assert len(rehearsal.extractor.passes(batch_size)) == 3
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("1.5 MiB", 1.5 * 2**20), ("7KB", 7000), ("2TiB", 2**41), ("99", 99)],
)
def test_sizes(text, count):
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-3GB", "0", "12 apples", "1e9", "8GiBB"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="80GiB"):
        size(text)


@pytest.mark.parametrize(
    ("extra", "code", "says"),
    [
        (["data.imagenet.path=/no/such/folder"], 3, "does not exist"),
        (["data.imagenet.path=null"], 3, "data.imagenet.path is not set"),
        (["data.imagenet.num_samples=0"], 2, "num_samples = 0"),
        (["model.width=3"], 2, "model.width"),
        (["backbone.name=resnet19"], 2, "resnet18"),
    ],
)
def test_mistakes_are_one_sentence(extra, code, says, images, capsys):
    assert main(["plan", "debug", f"data.imagenet.path={images}", "data.domain.path=", *extra, "--no-probe"]) == code
    shown = capsys.readouterr()
    assert says in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out


def test_on_another_runs_phase_1_phase_2_alone_is_planned(images, capsys):
    job = ["plan", "debug", *TINY, "phase1=runs/base", "data.imagenet.path=null", "--no-probe", "--json"]
    assert main([*job, f"data.domain.path={images}"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["phase2"]
    assert main([*job, "data.domain.path=null"]) == 3
    assert "data.domain.path is not set" in capsys.readouterr().err


def test_some_places_of_both_phases(images):
    """With places that are single pixels of the last map; what the first rehearsal computed must not reach the next."""
    found = plan(images, "model.spatial_resolution=2", "train.cell_fraction=0.25", phases=(1, 2))
    assert all(found[phase]["peak_memory_bytes"] > 0 for phase in ("phase1", "phase2"))


@pytest.mark.parametrize(
    "extra",
    [["--memory", "lots"], ["--processes", "0"], ["--images-per-second", "-1"], ["--images-per-second", "1e-320"]],
)
def test_options_are_checked(extra, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "debug", *extra])
    assert ended.value.code == 2
    assert extra[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rates", "workers", "rate", "waits_for"),
    [
        (Rates(decode=100, backbone=40, model=60), 4, 24, "backbone"),
        (Rates(decode=100, backbone=60, model=40), 4, 24, "model"),
        (Rates(decode=10, backbone=40, model=60), 2, 20, "decode"),
        (Rates(decode=24, backbone=40, model=60), 0, 12, "backbone"),
        (Rates(backbone=40, model=60), 4, 24, "backbone"),
        (Rates(training=7), 4, 7, "given"),
        (Rates(decode=10), 4, None, "unmeasured"),
        (Rates(decode=10, device_is_here=False), 4, None, "unknown"),
    ],
)
def test_the_slowest_part_is_named(rates, workers, rate, waits_for):
    found, key = rates.of_training(workers)
    assert found == (rate if rate is None else pytest.approx(rate))
    assert key == waits_for


def test_live_bytes_count_storages_once_while_they_live():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:4]
        assert live.now == 4000
        second = first + 1
        del first
        assert live.now == 8000
        del view
        assert live.now == 4000
        big = torch.zeros(10**6, dtype=torch.uint8)
        del big, second
        assert live.take() == 4000 + 10**6
        assert live.take() == live.now == 0


def test_a_batch_of_any_size_takes_no_memory(images):
    config = load_config(None, [*TINY, "data.image_size=1024"])
    rehearsal = Rehearsal(config, 1, build_modules(config, 1), precision="no", micro_batches=1, shared_gradients=False)
    assert rehearsal.peaks(2**14).backbone > 2**40
