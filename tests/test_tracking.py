"""Trackers: what was written is read back; one run across restarts and processes; a failure stops nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import launch, start, stop_after_lines
from outcome import read_lines

from trajdist.cli import main
from trajdist.training.validation import Examiner

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
DEBUG = ("runtime.mixed_precision=no", "data.image_size=32")


def lines_of(run_dir: Path, event: str, phase: int) -> list[dict]:
    lines = read_lines(run_dir, "metrics.jsonl")
    return [line for line in lines if line["event"] == event and line["phase"] == phase]


def events(run_dir: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(run_dir / "trackers" / "tensorboard"), size_guidance={"images": 0})
    return read.Reload()


def test_tensorboard(tmp_path, fresh_accelerate):
    pytest.importorskip("tensorboard")
    assert main(["run", "debug", f"run_dir={tmp_path}", *DEBUG, "logging.trackers=[tensorboard]"]) == 0
    read = events(tmp_path)
    for phase in (1, 2):
        lines = lines_of(tmp_path, "step", phase)
        scalars = read.Scalars(f"phase{phase}/step/loss")
        assert [scalar.value for scalar in scalars] == pytest.approx([line["loss"] for line in lines])
        pictures = read.Images(f"phase{phase}/heat maps")
        first, last = sorted({picture.step for picture in pictures})
        seen = {step: [each.encoded_image_string for each in pictures if each.step == step] for step in (first, last)}
        assert seen[first] != seen[last], "one set an epoch, of its weights"
        assert pictures[0].width > pictures[0].height > 16
    steps = [scalar.step for phase in (1, 2) for scalar in read.Scalars(f"phase{phase}/step/loss")]
    assert steps == sorted(set(steps)), "steps rise through both phases"
    config = next((tmp_path / "trackers" / "tensorboard").rglob("hparams.yml")).read_text()
    assert "model.hidden_dim: 64" in config


@pytest.mark.slow
def test_mlflow_goes_on_with_one_run_at_two_processes_and_after_a_restart(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run_dir = tmp_path / "run"
    command = [
        "train",
        "debug",
        f"run_dir={run_dir}",
        *DEBUG,
        "logging.trackers=[mlflow]",
        "data.imagenet.num_epochs=40",
    ]
    job = start(command, 2)
    stop_after_lines(job, run_dir, 6)
    resumed = launch([*command[:-1], "data.imagenet.num_epochs=41"], 1, timeout_s=240)
    assert resumed.returncode == 0, resumed.stderr
    client = mlflow.tracking.MlflowClient(f"sqlite:///{run_dir}/trackers/mlflow.db")
    experiment = client.get_experiment_by_name("trajdist")
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.data.params["model.hidden_dim"] == "64"
    found = {point.step: point.value for point in client.get_metric_history(only.info.run_id, "phase1/step/loss")}
    expected = {line["step"]: line["loss"] for line in lines_of(run_dir, "step", 1)}
    assert found == pytest.approx(expected)
    assert client.list_artifacts(only.info.run_id, "phase1/heat maps")


def test_a_tracker_that_fails_is_named_once_and_dropped(tmp_path, fresh_accelerate, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def fail(self, values, step=None, **options):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    assert main(["train", "debug", f"run_dir={tmp_path}", *DEBUG, "logging.trackers=[tensorboard]"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("the tracker tensorboard failed (ConnectionError: the server is gone)") == 1
    assert len(lines_of(tmp_path, "epoch", 1)) == 2


def test_a_tracker_is_kept_where_no_picture_could_be_read(tmp_path, fresh_accelerate, monkeypatch, capsys):
    """Held-out images out of reach for a moment, at the end of an epoch."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(Examiner, "draw", lambda self, weights: [])
    assert main(["train", "debug", f"run_dir={tmp_path}", *DEBUG, "logging.trackers=[tensorboard]"]) == 0
    assert "failed" not in capsys.readouterr().out
    assert len(events(tmp_path).Scalars("phase1/epoch/loss")) == 2


def test_a_tracker_that_is_not_there_is_named_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trajdist.runtime.trackers.importlib.util.find_spec", lambda name: None)
    assert main(["train", "debug", f"run_dir={tmp_path / 'run'}", "logging.trackers=[wandb]"]) == 2
    assert "pip install 'trajdist[wandb]'" in capsys.readouterr().err
    assert main(["train", "debug", f"run_dir={tmp_path / 'run'}", "logging.trackers=[neptune]"]) == 2
    assert "logging.trackers" in capsys.readouterr().err
