"""An adapter merged into its base, and its model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from images import noise

import trajdist
from trajdist.artifacts import read_document, read_tensors, write_tensors
from trajdist.cli import main
from trajdist.config_files import load_config
from trajdist.saved.bundle import base_fingerprint, load_model
from trajdist.tools import merge


def test_merged_is_unmerged(debug_run, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(debug_run), "--adapter", str(debug_run / "phase2" / "adapter"), "--out", str(out)]) == 0
    assert "within" in capsys.readouterr().out
    images = [noise(seed, 80) for seed in range(5)]
    adapted, merged = trajdist.load(debug_run, device="cpu")(images), trajdist.load(out, device="cpu")(images)
    np.testing.assert_allclose(merged.maps, adapted.maps, atol=1e-3)
    np.testing.assert_allclose(merged.p_values, adapted.p_values, atol=0.2)
    base = trajdist.load(debug_run, phase=1, device="cpu")(images)
    assert np.abs(base.maps - adapted.maps).max() > 0.05, "the adapter does something"
    assert main(["score", str(out), "skimage:gravel/heldout", "--out", str(tmp_path / "scores")]) == 0
    assert main(["inspect", str(out)]) == 0


def test_a_merged_model_is_a_phase_1_to_adapt(debug_run, tmp_path, fresh_accelerate):
    out = tmp_path / "merged"
    assert main(["merge", str(debug_run), "--out", str(out)]) == 0
    command = ["adapt", "debug", f"phase1={out}", f"run_dir={tmp_path / 'run'}", "runtime.mixed_precision=no"]
    assert main([*command, "data.domain.num_epochs=1"]) == 0
    model, document = load_model(out / "phase1" / "model.safetensors")
    config = json.loads((tmp_path / "run" / "phase2" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"trajdist:{base_fingerprint(model, document)}"


def test_its_config_goes_on_with_the_merged_model(debug_run, tmp_path, fresh_accelerate):
    """Not with the run that it came from."""
    out, before = tmp_path / "merged", (debug_run / "status.json").read_bytes()
    assert main(["merge", str(debug_run), "--out", str(out)]) == 0
    command = ["adapt", str(out / "config.yaml"), "data.domain.path=skimage:brick", "data.domain.num_epochs=1"]
    assert main(command) == 0
    assert (debug_run / "status.json").read_bytes() == before
    assert trajdist.load(out, device="cpu").detectors[0].adapted


def test_a_merged_model_is_on_no_other_phase_1(debug_run, tmp_path):
    run = Path(shutil.copytree(debug_run, tmp_path / "domains" / "gravel"))
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"phase1": str(debug_run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    merged = load_config(tmp_path / "merged" / "config.yaml")
    assert (merged.phase1, merged.run_dir) == (None, str(tmp_path / "merged"))


def test_clean_images_that_hardly_differ(debug_run, tmp_path):
    """The scores of others are huge then, and so is their rounding."""
    run = Path(shutil.copytree(debug_run, tmp_path / "run"))
    path = run / "phase2" / "calibration.safetensors"
    tensors = read_tensors(path)
    tensors["residual.spread"] /= 1e6
    write_tensors(path, tensors, read_document(path))
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    assert main(["export", str(run), "--format", "torch"]) == 0


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("exists", 2, "exists: name a folder that does not"),
        ("other base", 4, "was trained on another base"),
        ("other scores", 1, "gives other scores"),
        ("a full disk", 4, "cannot be written (No space left on device)"),
        ("a file above", 4, "--out '{out}' cannot be written (Not a directory): free some space or name another"),
    ],
)
def test_refusals_leave_nothing(debug_run, tmp_path, monkeypatch, capsys, what, code, words):
    out, adapter = tmp_path / "merged", debug_run / "phase2" / "adapter"
    if what == "exists":
        out.mkdir()
    elif what == "other base":
        shutil.copytree(debug_run / "phase2", tmp_path / "phase2")
        adapter = tmp_path / "phase2" / "adapter"
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "trajdist:other"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    elif what == "other scores":
        unadapted = load_model(debug_run / "phase1" / "model.safetensors")[0].eval()
        monkeypatch.setattr(merge.lora, "merged", lambda model: unadapted)
    elif what == "a file above":
        (tmp_path / "notes").write_text("mine")
        out = tmp_path / "notes" / "merged"
    else:
        monkeypatch.setattr(
            merge.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    before = set(tmp_path.iterdir())
    assert main(["merge", str(debug_run), "--adapter", str(adapter), "--out", str(out)]) == code
    told = capsys.readouterr().err
    assert words.format(out=out) in told
    assert told.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_adapter_and_out_may_lie_at_home(debug_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(debug_run / "phase2", tmp_path / "mine" / "phase2")
    assert main(["merge", str(debug_run), "--adapter=~/mine/phase2/adapter", "--out=~/merged"]) == 0
    assert (tmp_path / "merged" / "phase1").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_run_without_its_config_is_told_so(debug_run, tmp_path, capsys):
    """As copied elsewhere for scoring."""
    for part in ("phase1", "phase2"):
        shutil.copytree(debug_run / part, tmp_path / "run" / part)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 4
    told = capsys.readouterr().err
    assert f"'{tmp_path / 'run' / 'config.yaml'}' does not exist: copy it from" in told
    assert "--out" not in told
    assert not (tmp_path / "merged").exists()


def test_the_adapter_of_one_of_several_domains_is_to_be_named(debug_run, tmp_path, capsys):
    shutil.copytree(debug_run / "phase1", tmp_path / "run" / "phase1")
    for domain in ("gravel", "road"):
        shutil.copytree(debug_run / "phase2", tmp_path / "run" / "domains" / domain / "phase2")
        shutil.copy(debug_run / "config.yaml", tmp_path / "run" / "domains" / domain)
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 4
    told = capsys.readouterr().err
    assert "has an adapter for each of its domains gravel, road: name the run of one" in told
    assert told.count("\n") == 1


def test_the_model_card(debug_run):
    text = (debug_run / "phase2" / "adapter" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "peft", "tags": ["trajdist", "anomaly-detection", "lora", "image"]}
    model, document = load_model(debug_run / "phase1" / "model.safetensors")
    summary = json.loads((debug_run / "summary.json").read_text())["phase2"]
    for words in (
        f"| fingerprint | {base_fingerprint(model, document)} |",
        "| path | skimage:gravel |",
        "| images trained on | 16 |",
        "| objective | reconstruction |",
        f"| first and final loss | {summary['first_loss']:.4g}, {summary['final_loss']:.4g} |",
        f"| trained parameters | {summary['trained_parameters']:,} |",
    ):
        assert words in body
    assert "More Information Needed" not in text


def test_the_hub_reads_the_card(debug_run):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(debug_run / "phase2" / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "trajdist score" in card.text
