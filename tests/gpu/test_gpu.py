"""What only a CUDA device can show: ``python -m pytest tests/gpu -n 8`` where there is one.

Everything else is tested on CPUs. These jobs start from nothing, as a process cannot use CUDA after it was forked from
one that has asked for devices.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from images import noise, write_images
from jobs import Finished, Job, environment, launch, spawn, start, stop_after_lines
from test_loop import final_weights, losses, records

import trajdist
from trajdist.cli import main
from trajdist.training import loop
from trajdist.training.feed import Feed

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
ON_GPU = {"ACCELERATE_USE_CPU": "false"}
BOTH = ("imagenet", "domain")
DETERMINISTIC = "runtime.deterministic=true"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Steps of 16 images: two whole ones an epoch, and a short one."""
    return write_images(tmp_path_factory.mktemp("images"), 40, side=80)


def arguments(images: Path, run_dir: Path, *overrides: str, command: str = "run") -> list[str]:
    """A small job with everything that is special about CUDA: workers, pinned memory, bfloat16."""
    sets = [f"data.{name}.{key}" for name in BOTH for key in (f"path={images}", "num_samples=-1", "batch_size=16")]
    return [command, "debug", f"run_dir={run_dir}", *sets, "data.num_workers=2", *overrides]


def on_gpu(args: list[str], num_processes: int = 1, timeout_s: float = 200) -> Finished:
    return launch(args, num_processes, timeout_s, env=ON_GPU, from_nothing=True)


def succeed(*args: object, **rest) -> Finished:
    ended = on_gpu([str(arg) for arg in args], **rest)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    """Both phases in one go, on one GPU."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    succeed(*arguments(images, run_dir, DETERMINISTIC))
    return run_dir


def test_both_phases_train_and_account_for_their_time(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == {"phase1", "phase2"}
    for phase in summary.values():
        time = phase["time"]
        assert min(time.values()) >= 0
        assert time["backbone"] > 0
        assert time["model"] > 0
        # On the device: a fraction of what the interpreter takes on the host.
        assert 2**20 < phase["peak_memory_bytes"] < 2**29
    assert np.isfinite(losses(run)).all()


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_run_that_was_interrupted_ends_with_the_same_weights(how, run, images, tmp_path):
    command = arguments(images, tmp_path / "run", DETERMINISTIC, "checkpoint.every_steps=1")
    job = start(command, env=ON_GPU, from_nothing=True)
    if how == "stop":
        stop_after_lines(job, tmp_path / "run", 3)
    else:
        wait_for_lines(job, tmp_path / "run", 4)
        job.kill()
        job.end()
    succeed(*command)
    assert losses(tmp_path / "run") == losses(run)
    torch.testing.assert_close(final_weights(tmp_path / "run"), final_weights(run), rtol=0, atol=0)


def wait_for_lines(job: Job, run_dir: Path, count: int) -> None:
    """Wait until metrics.jsonl has as many lines; the job is ended if that does not happen."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        if job.process.poll() is not None or time.monotonic() > deadline:
            job.kill()
            raise AssertionError(job.end().stderr)
        time.sleep(0.02)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.type=autoencoder"],
        ["model.type=vae"],
        ["model.type=transformer", "train.cell_fraction=0.25"],
        ["backbone.name=vit_b_16", "memory.images_per_pass=4"],
        ["domain_adaptation.objective=contrast", "trajectory.subcells=2"],
        ["data.imagenet.gradient_accumulation_steps=2", "ema.decay=0.9", "validation.every_epochs=1"],
        ["runtime.mixed_precision=fp16"],
        ["runtime.mixed_precision=no"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_kind_of_run_trains_and_scores(overrides, images, tmp_path):
    succeed(*arguments(images, tmp_path / "run", *overrides))
    assert np.isfinite(losses(tmp_path / "run")).all()
    succeed("score", tmp_path / "run", images, "--out", tmp_path / "found", "--explain")
    rows = [json.loads(row) for row in (tmp_path / "found" / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert np.isfinite([row["score"] for row in rows]).all()


def test_several_domains_at_once(run, images, tmp_path):
    domains = [f"data.domains.{name}.{key}" for name in ("one", "two") for key in (f"path={images}", "num_epochs=2")]
    own = [f"run_dir={tmp_path / 'run'}", f"phase1={run}", "data.domain.path=null", "data.num_workers=2"]
    succeed("adapt", "debug", *own, *domains)
    adapters = list((tmp_path / "run").rglob("adapter_model.safetensors"))
    assert len(adapters) == 2
    options = [option for file in adapters for option in ("--adapter", file.parent)]
    succeed("score", run, images, "--out", tmp_path / "found", *options)


def test_a_second_run_reads_the_cache_of_the_first(images, tmp_path):
    cache = [f"cache.dir={tmp_path / 'cache'}", "calibration.holdout_fraction=0", "data.imagenet.num_epochs=3"]
    for name, found in (("run", 0), ("again", 40)):
        ended = succeed(*arguments(images, tmp_path / name, *cache, DETERMINISTIC, command="train"))
        assert f"has the trajectories of {found} of 40 images" in ended.stdout
    # Equal to the bit on CPUs. Seen on an H200: 7e-7 apart.
    np.testing.assert_allclose(losses(tmp_path / "again"), losses(tmp_path / "run"), rtol=1e-5)


@pytest.mark.timeout(600)
def test_compiled_and_eager_training_agree(run, images, tmp_path):
    compiled = ["backbone.compile=true", DETERMINISTIC]
    ended = succeed(*arguments(images, tmp_path / "run", *compiled), timeout_s=280)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=0.02)
    assert "wrong trajectories" not in ended.stderr


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_no_step_waits_for_the_device(images, tmp_path, monkeypatch, fresh_accelerate):
    """Forward, backward and optimizer, and the extraction of the next batch, only queue work once they have begun."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    calls = Counter[str]()

    def without_waiting(name, function):
        def call(*args, **rest):
            calls[name] += 1
            torch.cuda.set_sync_debug_mode("error" if calls[name] > 3 else "default")
            try:
                return function(*args, **rest)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    for owner, name in ((loop, "add_gradients"), (loop, "update"), (Feed, "_run")):
        monkeypatch.setattr(owner, name, without_waiting(name, getattr(owner, name)))
    assert main(arguments(images, tmp_path / "run", "data.imagenet.num_epochs=4")) == 0
    assert min(calls.values()) > 6


def test_memory_on_the_device_is_constant(images, tmp_path):
    succeed(*arguments(images, tmp_path / "run", "data.imagenet.num_epochs=20", command="train"))
    held = [line["memory_bytes"] for line in records(tmp_path / "run", "step")]
    peaks = [line["peak_memory_bytes"] for line in records(tmp_path / "run", "step")]
    # The first epoch warms the libraries' workspaces up.
    assert max(held[6:]) - min(held[6:]) <= 0.01 * max(held)
    assert peaks[-1] == peaks[6]


def test_scores_are_those_of_a_cpu(run):
    pictures = [noise(seed, 80) for seed in range(100, 112)]
    on_cpu, on_device = trajdist.load(run, device="cpu"), trajdist.load(run, device="cuda")
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        expected, found = on_cpu(pictures), on_device(pictures)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    np.testing.assert_allclose(found.scores, expected.scores, rtol=2e-3)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=2e-2, atol=2e-2 * expected.maps.max())


def test_the_plan_is_what_the_allocator_holds(tmp_path, images):
    job = ["default", "backbone.weights=none", f"data.imagenet.path={images}", f"run_dir={tmp_path / 'run'}"]
    planned = json.loads(succeed("plan", *job, "--json").stdout)["phase1"]
    succeed("train", *job)
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["phase1"]["peak_memory_bytes"]
    assert planned["device"] == "cuda"
    assert planned["images_per_s"] > 0
    assert planned["peak_memory_bytes"] == pytest.approx(measured, rel=0.25)
    assert planned["required_memory_bytes"] > 0.9 * measured


def test_too_little_memory_is_one_sentence(images, tmp_path):
    limited = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(200 * 2**20 / torch.cuda.mem_get_info()[1]);"
        "from trajdist.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = arguments(images, tmp_path / "run", "backbone.name=resnet50", "data.image_size=448", command="train")
    ended = spawn([sys.executable, "-c", limited, *command], environment(ON_GPU)).end(200)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ran out of memory on cuda" in ended.stderr
    assert "images_per_pass" in ended.stderr


def test_more_processes_than_gpus_are_refused(images, tmp_path):
    count = torch.cuda.device_count()
    ended = on_gpu(arguments(images, tmp_path / "run"), num_processes=count + 1)
    assert ended.returncode != 0
    assert f"{count + 1} processes were started on" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_group_of_one_process_reduces_by_nccl(run, images, tmp_path):
    """As ``accelerate launch --multi_gpu --num_processes 1``: DistributedDataParallel, NCCL, the watchdog."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone", "-m", "trajdist"]
    args = arguments(images, tmp_path / "run", DETERMINISTIC)
    ended = spawn([*command, *args], environment(ON_GPU)).end(200)
    assert ended.returncode == 0, ended.stderr
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_two_gpus_train_as_one(images, tmp_path):
    of_one = [f"data.{name}.batch_size=16" for name in BOTH]
    of_two = [f"data.{name}.batch_size=8" for name in BOTH]
    precise = ["runtime.mixed_precision=no", "trajectory.projection=random"]
    succeed(*arguments(images, tmp_path / "one", *of_one, *precise))
    succeed(*arguments(images, tmp_path / "two", *of_two, *precise), num_processes=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_killed_peer_ends_the_others(images, tmp_path):
    endless = ["data.imagenet.num_epochs=1000", "data.num_workers=0"]
    job = start(arguments(images, tmp_path / "run", *endless), 2, env=ON_GPU, from_nothing=True)
    wait_for_lines(job, tmp_path / "run", 5)
    # Without workers, the launcher's newest child is a training process.
    peer = max(psutil.Process(job.process.pid).children(), key=lambda process: process.create_time())
    peer.send_signal(signal.SIGKILL)
    assert job.end(120).returncode != 0


def test_extraction_overlaps_training(images, tmp_path):
    """A profile shows kernels on two streams: that of training, and that of the next batch's extraction."""
    succeed(*arguments(images, tmp_path / "run", "data.imagenet.num_epochs=4", command="train"), "--profile")
    trace = json.loads((tmp_path / "run" / "profile" / "phase1.json").read_text())
    streams = {event["args"]["stream"] for event in trace["traceEvents"] if event.get("cat") == "kernel"}
    assert len(streams) >= 2
