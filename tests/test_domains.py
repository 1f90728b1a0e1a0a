"""Several domains adapted to at once: each adapter is what it would be if its domain were alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from images import write_images
from jobs import launch
from outcome import assert_done
from safetensors.torch import load_file

from trajdist.cli import main
from trajdist.errors import DataError
from trajdist.extraction.trajectory import TrajectoryExtractor
from trajdist.saved.checkpoint import newest_checkpoint, read_state
from trajdist.scoring import scorer
from trajdist.tools.audit import audit
from trajdist.training import adaptation, adoption, feed, job, loop

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# Two domains that differ in size, epochs and steps: the second one goes on when the first is done.
FIXED = ["runtime.mixed_precision=no", "logging.every_steps=1", "checkpoint.every_steps=2", "data.domain.path=null"]
OWN = {"road": ["num_epochs=2"], "bark": ["num_epochs=3", "gradient_accumulation_steps=2", "batch_size=4"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("domains")
    return {"road": write_images(root / "road", 21), "bark": write_images(root / "bark", 14)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("base") / "run"
    assert main(["train", "debug", f"run_dir={run_dir}", *FIXED]) == 0
    return run_dir


def several(folders: dict[str, Path], run_dir: Path, base: Path, *overrides: str) -> list[str]:
    """The command that adapts to all domains at once."""
    keys = [f"data.domains.{name}.{key}" for name in folders for key in (f"path={folders[name]}", *OWN.get(name, ()))]
    return ["adapt", "debug", f"run_dir={run_dir}", f"phase1={base}", *FIXED, *keys, *overrides]


def alone(name: str, folders: dict[str, Path], run_dir: Path, base: Path, *overrides: str) -> list[str]:
    keys = [f"data.domain.{key}" for key in (f"path={folders[name]}", *OWN[name])]
    return ["adapt", "debug", f"run_dir={run_dir}", f"phase1={base}", *FIXED, *keys, *overrides]


def adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    files = ("phase2/adapter/adapter_model.safetensors", "phase2/calibration.safetensors")
    return {f"{file} {name}": value for file in files for name, value in load_file(run_dir / file).items()}


def assert_same(run_dir: Path, other: Path, **tolerance: float) -> None:
    ours, theirs = adapter(run_dir), adapter(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


@pytest.fixture(scope="module")
def together(folders, base, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("together") / "run"
    assert main(several(folders, run_dir, base)) == 0
    return run_dir


@pytest.mark.parametrize("objective", ["reconstruction", "contrast"])
@pytest.mark.parametrize("name", ["road", "bark"])
def test_each_adapter_is_what_it_would_be_alone(name, objective, folders, base, together, tmp_path):
    chosen = f"domain_adaptation.objective={objective}"
    if objective == "contrast":
        assert main(several(folders, tmp_path / "all", base, chosen)) == 0
        together = tmp_path / "all"
    assert main(alone(name, folders, tmp_path / "one", base, chosen)) == 0
    # Sums of a convolution may come in another order in a larger batch.
    assert_same(together / "domains" / name, tmp_path / "one", rtol=1e-3, atol=1e-5)


def test_with_noise_a_share_of_the_places_and_a_cache(folders, base, tmp_path):
    extra = ["domain_adaptation.lora.dropout=0.2", "train.cell_fraction=0.5", f"cache.dir={tmp_path / 'cache'}"]
    assert main(several(folders, tmp_path / "all", base, *extra)) == 0
    for name in folders:
        assert main(alone(name, folders, tmp_path / name, base, *extra)) == 0
        assert_same(tmp_path / "all" / "domains" / name, tmp_path / name, rtol=1e-3, atol=1e-5)


def test_one_pass_of_the_backbone_serves_all(folders, base, tmp_path, monkeypatch):
    passes: list[int] = []
    call, fit = TrajectoryExtractor.__call__, adaptation.train

    def counted(self, images):
        passes.append(len(images))
        return call(self, images)

    def only_training(*args):
        with monkeypatch.context() as patch:
            patch.setattr(TrajectoryExtractor, "__call__", counted)
            return fit(*args)

    monkeypatch.setattr(adaptation, "train", only_training)
    assert main(several(folders, tmp_path / "run", base, "data.domains.bark.gradient_accumulation_steps=1")) == 0
    # 16 of the road's 21 images in steps of 8, twice; the bark's 13 in steps of 4, three times over.
    assert passes == [8 + 4] * 4 + [4] * 8


def test_the_run_tells_of_all(together, capsys):
    summary = json.loads((together / "summary.json").read_text())["phase2"]
    parts = [json.loads((together / "domains" / name / "summary.json").read_text())["phase2"] for name in OWN]
    assert summary["domains"] == dict(zip(OWN, parts, strict=True))
    assert summary["images"] == sum(part["images"] for part in parts) == 2 * 16 + 3 * 13
    assert summary["seconds"] == max(part["seconds"] for part in parts)
    assert summary["trained_parameters"] == sum(part["trained_parameters"] for part in parts)
    assert_done(together)
    for name in OWN:
        assert_done(together / "domains" / name)
        card = (together / "domains" / name / "phase2" / "adapter" / "README.md").read_text()
        assert f"/{name} |" in card
    assert main(["inspect", str(together)]) == 0
    shown = capsys.readouterr().out
    assert "phase2 road" in shown
    assert str(together / "domains" / "bark" / "phase2" / "adapter") in shown


def test_a_domain_that_ends_sooner_took_less_time(folders, base, tmp_path, monkeypatch):
    passes = []
    run = feed.Feed._run
    monkeypatch.setattr(feed.Feed, "_run", lambda self, batches: passes.append(batches) or run(self, batches))
    for module in (loop, job):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(len(passes))))
    more = ["data.domains.road.num_epochs=1", "data.domains.bark.num_epochs=6"]
    assert main(several(folders, tmp_path / "run", base, *more)) == 0
    parts = json.loads((tmp_path / "run" / "summary.json").read_text())["phase2"]["domains"]
    # In passes through the backbone: 16 images in steps of 8, and six times 13 in micro-batches of 4.
    assert 2 <= parts["road"]["seconds"] <= 3
    assert parts["bark"]["seconds"] == len(passes) == 6 * 4


def test_audit_reads_every_domain(together, tmp_path):
    found = audit(together)
    assert (found.status, found.problems) == ("done", [])
    assert [line.partition(":")[0] for line in found.facts] == ["bark", "road"]
    run_dir = shutil.copytree(together, tmp_path / "run")
    ledger = run_dir / "domains" / "road" / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[1:]))
    shutil.rmtree(run_dir / "domains" / "bark")
    problems = audit(run_dir).problems
    assert [problem.partition(":")[0] for problem in problems] == ["road", "bark"]


@pytest.mark.parametrize("number", [2, 5, 9])
@pytest.mark.parametrize("how", ["SIGTERM", "STOP"])
def test_stop_and_go_on(how, number, folders, base, together, tmp_path, monkeypatch):
    run_dir, update, calls = tmp_path / "run", loop.update, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM) if how == "SIGTERM" else (run_dir / "STOP").touch()
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", stopped)
        assert main(several(folders, run_dir, base)) == 75
    state = [json.loads((path / "status.json").read_text())["status"] for path in (run_dir, *run_dir.glob("domains/*"))]
    assert state == ["stopped"] * 3
    for name in folders:
        own = run_dir / "domains" / name
        newest, problems = newest_checkpoint(own / "checkpoints")
        assert not problems
        assert newest is not None
        assert read_state(newest).step == json.loads((own / "status.json").read_text())["step"], "nothing is repeated"
    assert main(several(folders, run_dir, base)) == 0
    for name in folders:
        assert_same(run_dir / "domains" / name, together / "domains" / name)
    assert audit(run_dir).problems == []


@pytest.mark.parametrize(
    "fault", ["trajdist.training.loop:save_checkpoint:3:SIGKILL", "trajdist.training.adaptation:finish:2:SIGKILL"]
)
def test_killed_between_two_domains(fault, folders, base, together, tmp_path):
    """One domain is then further than the other."""
    faults = {"PYTHONPATH": f"{Path(adaptation.__file__).parents[2]}:{Path(__file__).parent / 'faults'}"}
    command = several(folders, tmp_path / "run", base)
    killed = launch(command, module="faulty", env={**faults, "FAULT": fault})
    assert killed.returncode == -signal.SIGKILL
    assert main(command) == 0
    for name in folders:
        assert_same(tmp_path / "run" / "domains" / name, together / "domains" / name)
    assert audit(tmp_path / "run").problems == []


def test_two_processes(folders, base, together, tmp_path):
    halves = [f"data.domains.{name}.batch_size={size}" for name, size in (("road", 4), ("bark", 2))]
    done = launch(several(folders, tmp_path / "run", base, *halves), num_processes=2, timeout_s=150)
    assert done.returncode == 0, done.stderr
    for name in folders:
        assert_same(tmp_path / "run" / "domains" / name, together / "domains" / name, rtol=1e-2, atol=1e-4)
    assert audit(tmp_path / "run").problems == []


def test_a_domain_that_comes_later(folders, base, together, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(several({"road": folders["road"]}, run_dir, base)) == 0
    before = (run_dir / "domains/road/phase2/adapter/adapter_model.safetensors").stat().st_mtime_ns
    assert main(several(folders, run_dir, base)) == 0
    assert "road: phase 2 is done (2 epochs): nothing to repeat" in capsys.readouterr().out
    assert (run_dir / "domains/road/phase2/adapter/adapter_model.safetensors").stat().st_mtime_ns == before
    for name in folders:
        assert_same(run_dir / "domains" / name, together / "domains" / name, rtol=1e-3, atol=1e-5)


def test_a_domain_that_comes_later_to_a_run_of_an_earlier_version(folders, base, tmp_path, monkeypatch):
    """Which did not compare how Phase 1 was made: now it has its config, and no other one is accepted."""
    run_dir, short = tmp_path / "run", ["model.dropout=0.1", "data.domains.road.num_epochs=1"]
    road = {"road": folders["road"]}
    assert main(several(road, run_dir, base, *short)) == 2
    with monkeypatch.context() as earlier:
        earlier.setattr(adoption, "_making", lambda *_: {})
        assert main(several(road, run_dir, base, *short)) == 0
    assert main(several(folders, run_dir, base, *short, "data.domains.bark.num_epochs=1")) == 0


def test_a_domain_goes_on_by_itself(folders, base, together, tmp_path):
    """Its folder is a run like any other, with the config that it needs."""
    run_dir = shutil.copytree(together / "domains" / "road", tmp_path / "run")
    shutil.rmtree(run_dir / "phase2")
    (run_dir / "summary.json").unlink()
    assert main(["adapt", str(run_dir / "config.yaml"), f"run_dir={run_dir}"]) == 0
    assert_same(run_dir, together / "domains" / "road")


def test_one_that_ends_early_is_not_read_further(folders, base, tmp_path, monkeypatch):
    waiting: list[int] = []
    advance = feed.Feed._advance

    def observed(self, number):
        more = advance(self, number)
        waiting.append(max(map(len, self._waiting)))
        return more

    monkeypatch.setattr(feed.Feed, "_advance", observed)
    early = ["validation.every_epochs=1", "early_stopping.patience=1", "domain_adaptation.lora.learning_rate=1e-9"]
    more = ["data.domains.road.num_epochs=9", "data.domains.bark.num_epochs=4"]
    assert main(several(folders, tmp_path / "run", base, *early, *more)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["phase2"]["domains"]
    assert any(part["validation"]["stopped_early"] for part in summary.values())
    assert max(waiting) == 1


def test_every_adapter_on_the_same_trajectories(folders, together, tmp_path, capsys):
    adapters = [f"--adapter={together / 'domains' / name / 'phase2' / 'adapter'}" for name in folders]
    assert main(["score", str(together), str(folders["road"]), "--out", str(tmp_path), *adapters]) == 0
    row = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    assert sorted(row["adapters"]) == ["bark", "road"]
    capsys.readouterr()
    assert main(["score", str(together), str(folders["road"]), "--out", str(tmp_path / "other")]) == 4
    error = capsys.readouterr().err
    assert "has an adapter for each of its domains bark, road" in error
    assert scorer.load(together / "domains" / "road", device="cpu").detectors[0].name == "road"
    assert scorer.load(together, phase=1, device="cpu").detectors[0].name == "phase1"


def test_more_epochs_of_phase_1_come_too_late(folders, tmp_path, capsys):
    """The adapters stand on it."""
    run_dir = tmp_path / "run"
    whole = ["run", "debug", f"run_dir={run_dir}", *FIXED, f"data.domains.road.path={folders['road']}"]
    assert main(whole) == 0
    before = (run_dir / "phase1" / "model.safetensors").read_bytes()
    assert main([*whole, "data.imagenet.num_epochs=9"]) == 0
    assert "Phase 2 is built on these" in capsys.readouterr().out
    assert (run_dir / "phase1" / "model.safetensors").read_bytes() == before


def test_a_launcher_that_asks_for_fp16_is_refused(folders, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    overrides = ("runtime.mixed_precision=auto",)
    assert main(several(folders, tmp_path / "run", base, *overrides)) == 2
    assert "fp16" in capsys.readouterr().err


def test_trackers_keep_domains_apart(folders, base, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, *rest = several(folders, tmp_path / "run", base, "logging.trackers=[tensorboard]")
    assert main(["run", *(part for part in rest if not part.startswith("phase1="))]) == 0
    log = events.EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard"))
    log.Reload()
    before = len(log.Scalars("phase1/step/loss"))
    assert before > 0
    for name, steps in (("road", 4), ("bark", 6)):
        logged = [scalar.step for scalar in log.Scalars(f"{name}/phase2/step/loss")]
        assert logged == [before + step for step in range(1, steps + 1)]


def test_the_plan_has_room_for_all(folders, base, tmp_path, capsys):
    def planned(*command: str) -> dict:
        assert main(["plan", *command[1:], "--json", "--no-probe"]) == 0
        return json.loads(capsys.readouterr().out)["phase2"]

    both = planned(*several(folders, tmp_path / "run", base))
    one = planned(*alone("road", folders, tmp_path / "run", base))
    assert both["domains"]["road"] == {"images": 16, "steps": 4, "epochs": 2}
    assert (both["images"], both["steps"], both["global_batch"]) == (16 + 13, 6, 16)
    assert both["parameters"]["trainable"] == 2 * one["parameters"]["trainable"]
    assert both["parts"]["activations_bytes"] > 1.3 * one["parts"]["activations_bytes"]
    assert both["parts"]["optimizer_bytes"] == 2 * one["parts"]["optimizer_bytes"]


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["data.domain.path=skimage:grass"], 2, "data.domain.path='skimage:grass' and data.domains (road, bark)"),
        (["data.domains.road.pth=x"], 2, "data.domains.road.pth (= 'x'): did you mean data.domains.road.path?"),
        (["data.domains.road.batch_size=0"], 2, "data.domains.road.batch_size = 0 is not possible"),
        (["data.domains.road=5"], 2, "data.domains.road = 5 is not"),
        (["data.domains.a/b.path=x"], 2, "data.domains"),
        (["data.domains.road.path=/nowhere"], 3, "data.domains.road.path='/nowhere' does not exist"),
        (["data.domains.more.num_epochs=2"], 3, "data.domains.more.path is not set"),
        (["data.domains.road.num_samples=0"], 2, "data.domains.road.num_samples = 0 is not possible"),
        (["runtime.mixed_precision=fp16"], 2, "runtime.mixed_precision='fp16'"),
        (["data.domains.road.fit=crop"], 2, "data.domains.road.fit='crop', but the Phase 1"),
    ],
)
def test_mistakes_name_the_domain(overrides, code, says, folders, base, tmp_path, capsys):
    assert main(several(folders, tmp_path / "run", base, *overrides)) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_plan_names_the_domain_too(folders, base, tmp_path, capsys, monkeypatch):
    def unreadable(*arguments: object) -> None:
        raise DataError("the classes of data.domain.path cannot be read.")

    monkeypatch.setattr("trajdist.planning.plan.draw_selection", unreadable)
    _, *rest = several(folders, tmp_path / "run", base)
    assert main(["plan", *rest, "--no-probe"]) == 3
    assert "the classes of data.domains.road.path cannot be read." in capsys.readouterr().err


def test_labelled_images_are_of_one_domain(folders, base, tmp_path, capsys):
    labelled = ["validation.every_epochs=1", f"validation.path={tmp_path}"]
    assert main(several(folders, tmp_path / "run", base, *labelled)) == 2
    assert "is for one domain" in capsys.readouterr().err


def test_a_changed_setting_is_refused(folders, base, together, tmp_path, capsys):
    run_dir = shutil.copytree(together, tmp_path / "run")
    assert main(several(folders, run_dir, base, "data.domains.bark.batch_size=8")) == 2
    assert (
        f"data.domains.bark.batch_size=8, but the run in '{run_dir}/domains/bark' began with 4"
        in capsys.readouterr().err
    )


def test_a_loss_that_is_lost_names_its_domain(folders, base, tmp_path, monkeypatch, capsys):
    lose = loop.add_gradients

    def lost(job, step, micro_batch, batch, trajectories):
        is_bark = job.session.rundir.path.name == "bark"
        lose(job, step, micro_batch, batch, trajectories * float("nan") if is_bark and step.index else trajectories)

    monkeypatch.setattr(loop, "add_gradients", lost)
    assert main(several(folders, tmp_path / "run", base)) == 1
    error = capsys.readouterr().err
    assert error.startswith("trajdist: domain bark: the loss of phase 2 was no longer finite at step 2, on the images")
    why = json.loads((tmp_path / "run" / "status.json").read_text())["why"]
    assert why in error


def test_a_lack_of_memory_is_told_in_the_domains_as_in_the_run(folders, base, tmp_path, monkeypatch, capsys):
    def allocate(*_):
        raise MemoryError

    monkeypatch.setattr(loop, "add_gradients", allocate)
    assert main(several(folders, tmp_path / "run", base)) == 1
    said = capsys.readouterr().err
    assert said.startswith("trajdist: process 0 ran out of memory on cpu")
    for run_dir in (tmp_path / "run", tmp_path / "run" / "domains" / "road"):
        status = json.loads((run_dir / "status.json").read_text())
        assert (status["status"], f"trajdist: {status['why']}\n") == ("failed", said)


def test_what_needs_less_memory_is_a_key_of_the_largest_domain(folders, base, tmp_path, monkeypatch, capsys):
    def allocate(*_):
        raise MemoryError

    monkeypatch.setattr(loop, "add_gradients", allocate)
    assert main([*several(folders, tmp_path / "run", base), "data.domains.bark.batch_size=64"]) == 1
    assert "a smaller data.domains.bark.batch_size" in capsys.readouterr().err


def test_a_domain_that_is_done_stays_so_when_another_is_refused(folders, base, together, tmp_path, capsys):
    run_dir = shutil.copytree(together, tmp_path / "run")
    states = [run_dir / "status.json", run_dir / "domains" / "road" / "status.json"]
    steps = [json.loads(path.read_text())["step"] for path in states]
    assert main(several(folders, run_dir, base)) == 0
    for path, step in zip(states, steps, strict=True):
        status = json.loads(path.read_text())
        assert (status["status"], status["step"]) == ("done", step)
        assert step > 0
    fewer = {**folders, "bark": shutil.copytree(folders["bark"], tmp_path / "bark")}
    next(fewer["bark"].iterdir()).unlink()
    assert main(several(fewer, run_dir, base)) == 3
    assert "data.domains.bark.path" in capsys.readouterr().err
    found = {path.name: json.loads((path / "status.json").read_text()) for path in run_dir.glob("domains/*")}
    assert {name: state["status"] for name, state in found.items()} == {"bark": "failed", "road": "done"}


def test_images_that_cannot_be_read_are_listed_where_they_belong(folders, base, tmp_path, capsys):
    bad = {**folders, "bark": shutil.copytree(folders["bark"], tmp_path / "bark")}
    for path in sorted(bad["bark"].iterdir())[:9]:
        path.write_bytes(b"spoilt")
    assert main(several(bad, tmp_path / "run", base)) == 3
    assert "domains/bark/bad_images.jsonl" in capsys.readouterr().err
    states = {path.name: json.loads((path / "status.json").read_text()) for path in tmp_path.glob("run/domains/*")}
    assert {name: state["status"] for name, state in states.items()} == {"bark": "failed", "road": "failed"}
