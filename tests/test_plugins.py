"""A sequence model of another package: one file, and one line in its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import launch

from trajdist.cli import main
from trajdist.plugins import known_model

MODEL = '''
import torch
from torch import nn
from trajdist.models.reconstruction import Reconstruction


class Toy(nn.Module):
    """Each step of a trajectory from all of them."""

    def __init__(self, length, width, latent_dim, **others):
        super().__init__()
        self.down, self.up = nn.Linear(length * width, latent_dim), nn.Linear(latent_dim, length * width)

    def forward(self, trajectories_NLD):
        latent = torch.tanh(self.down(trajectories_NLD.flatten(1)))
        return Reconstruction(self.up(latent).view_as(trajectories_NLD), latent)
'''


def install(folder: Path, line: str = "toy = toy_model:Toy") -> dict[str, str]:
    """A package as pip would leave it; the environment in which it is installed."""
    metadata = folder / "toy-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "toy_model.py").write_text(MODEL)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[trajdist.models]\n{line}\n")
    return {"PYTHONPATH": str(folder)}


def test_a_model_of_another_package_trains_adapts_and_scores(tmp_path):
    env = install(tmp_path / "site")
    run_dir = tmp_path / "run"
    command = ["run", "debug", f"run_dir={run_dir}", "model.type=toy", "runtime.mixed_precision=no"]
    trained = launch(command, env=env)
    assert trained.returncode == 0, trained.stderr
    config = json.loads((run_dir / "phase2" / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down", "up"]
    scored = launch(["score", run_dir, "skimage:gravel/heldout", "--out", tmp_path / "scores"], env=env)
    assert scored.returncode == 0, scored.stderr
    assert len((tmp_path / "scores" / "scores.jsonl").read_text().splitlines()) == 36
    planned = launch(["plan", *command[1:], "--no-probe", "--json"], env=env)
    assert planned.returncode == 0, planned.stderr
    schema = launch(["config", "--schema"], env=env)
    assert json.loads(schema.stdout)["$defs"]["Model"]["properties"]["type"]["enum"][-1] == "toy"
    gone = launch(["score", run_dir, "skimage:gravel/heldout", "--out", tmp_path / "again"])
    assert gone.returncode == 4
    assert "its package should be installed" in gone.stderr
    assert gone.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "model", "words"),
    [
        ("toy = toy_model:Toy", "tony", "'transformer' or 'toy'"),
        ("toy = toy_model:Missing", "toy", "cannot be imported (AttributeError"),
        ("toy = no_such_module:Toy", "toy", "cannot be imported (ModuleNotFoundError"),
    ],
)
def test_models_that_cannot_be_had(tmp_path, monkeypatch, capsys, line, model, words):
    monkeypatch.syspath_prepend(install(tmp_path / "site", line)["PYTHONPATH"])
    assert main(["train", "debug", f"run_dir={tmp_path / 'run'}", f"model.type={model}"]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_weight_that_takes_no_part_is_named(tmp_path, processes):
    """It could not go on from a checkpoint, and with several processes it fails at the second step."""
    env = install(tmp_path / "site")
    file = tmp_path / "site" / "toy_model.py"
    file.write_text(MODEL.replace("    def forward", "        self.spare = nn.Linear(3, 3)\n\n    def forward"))
    command = ["train", "debug", f"run_dir={tmp_path / 'run'}", "model.type=toy", "runtime.mixed_precision=no"]
    finished = launch(command, processes, env=env)
    assert finished.returncode == (2 if processes == 1 else 1), "a launcher ends with 1"
    assert "the weight 'spare.weight' takes no part in the loss of phase 1" in finished.stderr


def test_nobody_takes_the_name_of_a_built_in_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "site", "vae = toy_model:Toy")["PYTHONPATH"])
    from trajdist.models.registry import build_model

    sizes = {"length": 3, "width": 4, "hidden_dim": 8, "latent_dim": 2, "num_layers": 1, "num_heads": 1, "dropout": 0.0}
    assert type(build_model(known_model("vae"), **sizes)).__name__ == "VariationalAutoencoder"
