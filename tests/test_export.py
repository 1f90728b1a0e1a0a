"""One file that does what the run does."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from images import noise
from jobs import REPOSITORY
from PIL import ExifTags, Image

import trajdist
from trajdist.cli import main
from trajdist.data.decode import decode, to_square
from trajdist.errors import TrainingError
from trajdist.scoring.residuals import upsample
from trajdist.tools import export

onnxruntime = pytest.importorskip("onnxruntime")


def squares(count: int, size: int) -> np.ndarray:
    return np.stack([to_square(noise(seed, 100), size, "squash") for seed in range(count)]).transpose(0, 3, 1, 2)


def run_onnx(path: Path, images: np.ndarray):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["maps", "scores", "p_values"]
    return session.run(None, {"images": images}), session.get_modelmeta().custom_metadata_map["trajdist"]


def run_torch(path: Path, images: np.ndarray):
    """As the page says: gradients are not switched off, and there are none."""
    extra = {"trajdist": ""}
    program = torch.export.load(path, extra_files=extra).module()
    return [output.numpy() for output in program(torch.from_numpy(images.copy()))], extra["trajdist"]


RUNNERS = {"onnx": run_onnx, "torch": run_torch}
Exported = Callable[[str, int], tuple[Path, str]]
# An export takes seconds for each block.
FEW_BLOCKS = ("run", "debug", "backbone.blocks=[layer1.1, layer2.1]", "runtime.mixed_precision=no")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("small") / "run"
    assert main([*FEW_BLOCKS, f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory) -> Exported:
    """The small run as a file of a kind, made once, and what the command printed."""

    @cache
    def export_run(kind: str, phase: int) -> tuple[Path, str]:
        path, printed = tmp_path_factory.mktemp("exported") / f"{kind}.pt2", io.StringIO()
        with redirect_stdout(printed):
            assert main(["export", str(small_run), "--format", kind, "--out", str(path), "--phase", str(phase)]) == 0
        return path, printed.getvalue()

    return export_run


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("phase", [1, 2])
def test_the_file_gives_what_the_run_gives(small_run, exported, kind, phase):
    path, printed = exported(kind, phase)
    assert "scores within" in printed
    scorer = trajdist.load(small_run, phase=phase, device="cpu")
    for count in (1, 3, 5):
        images = squares(count, scorer.size)
        (maps, scores, p_values), document = RUNNERS[kind](path, images)
        expected = scorer(list(images.transpose(0, 2, 3, 1)))
        np.testing.assert_allclose(maps, expected.maps, atol=1e-3)
        np.testing.assert_allclose(scores, expected.scores, atol=1e-3)
        np.testing.assert_array_equal(p_values, scorer.detectors[0].images.p_values(torch.from_numpy(scores)).numpy())
        assert len(set(p_values.tolist()) | {0.0}) > 1
    facts = json.loads(document)
    assert (facts["size"], facts["fit"], facts["clean_images"]) == (64, "squash", scorer.detectors[0].images.count)


def test_the_folder_of_the_file_is_made_and_may_lie_at_home(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(small_run), "--format", "torch", "--out=~/made/too/a.pt2"]) == 0
    assert (tmp_path / "made" / "too" / "a.pt2").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("kind", ["16-bit grey", "on its side"])
def test_the_example_of_the_page_decodes_as_the_run_does(exported, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file, exif = io.BytesIO(), Image.Exif()
    if kind == "16-bit grey":
        Image.fromarray(np.asarray(noise(0, 64).convert("L")).astype(np.uint16) * 257).save(file, "PNG")
    else:
        exif[ExifTags.Base.Orientation] = 6
        noise(0, 64).save(file, "PNG", exif=exif)
    (tmp_path / "part.jpg").write_bytes(file.getvalue())  # Pillow goes by the contents.
    path, _ = exported("onnx", 2)
    block = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "export.md").read_text(), re.DOTALL)
    names: dict[str, np.ndarray] = {}
    exec(block.group(1).replace("runs/mine/export.onnx", str(path)), names)
    expected = to_square(decode(file.getvalue()), 64, "squash").transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(names["images"], expected)
    assert names["scores"].shape == (1,)


def test_p_values_at_the_edges_of_bins(small_run):
    """As the sketch counts them, for clean scores themselves and their neighbours."""
    scorer = trajdist.load(small_run, device="cpu")
    sketch = scorer.detectors[0].images
    upper_K, counts_K, total = export._table(sketch)
    edges = sketch.histogram.occupied()[0]
    below, above = (torch.nextafter(edges, torch.tensor(far)) for far in (-torch.inf, torch.inf))
    scores = torch.cat([edges, below, above, upper_K, torch.tensor([1e30, -1e30, torch.nan])])
    at_least = ((scores[:, None] < upper_K) * counts_K).sum(1)
    assert torch.equal((1 + at_least) / (total + 1), sketch.p_values(scores))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.type=vae", "trajectory.subcells=2"],
        ["model.type=transformer", "domain_adaptation.lora.use_dora=true"],
    ],
)
def test_other_models(tmp_path, fresh_accelerate, overrides):
    command = [*FEW_BLOCKS, f"run_dir={tmp_path / 'run'}", *overrides]
    assert main([*command, "data.imagenet.num_epochs=1", "data.domain.num_epochs=1"]) == 0
    assert main(["export", str(tmp_path / "run"), "--format", "onnx"]) == 0
    images = squares(3, 64)
    (maps, scores, _), _ = run_onnx(tmp_path / "run" / "export.onnx", images)
    expected = trajdist.load(tmp_path / "run", device="cpu")(list(images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(maps, expected.maps, atol=1e-3)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-3)


def test_a_file_that_computes_something_else_is_not_kept(small_run, tmp_path, monkeypatch, capsys):
    """Here the program sees darker images than the run."""
    forward = export.Exported.forward
    monkeypatch.setattr(export.Exported, "forward", lambda self, images: forward(self, images // 2))
    (tmp_path / "a.pt2").write_bytes(b"the last good one")
    assert main(["export", str(small_run), "--format", "torch", "--out", str(tmp_path / "a.pt2")]) == 1
    assert "gives other scores" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.pt2", b"the last good one")]


@pytest.mark.parametrize(
    ("shifts", "words"),
    [
        ((0.0, 0.009, 1.0), None),
        ((0.009, 0.0, 1.0), None),
        ((0.0, 0.011, 1.0), "gives other scores"),
        ((0.011, 0.0, 1.0), "gives other scores"),
        ((np.nan, 0.0, 1.0), "gives other scores"),
        ((0.0, np.nan, 1.0), "gives other scores"),
        ((0.0, 0.0, 1.0 + 1e-6), "gives other p-values"),
    ],
)
@pytest.mark.parametrize("images", export.TRIALS)
def test_how_much_a_file_may_differ(small_run, shifts, words, images):
    """Maps and scores by 0.01, p-values of the same scores not at all; in any of the trials."""
    scorer = trajdist.load(small_run, device="cpu")

    def run(batch):
        result = scorer.score_batch(batch)[0]
        unit = export.unit(result)
        of_maps, of_scores, of_p_values = shifts if len(batch) == images else (0.0, 0.0, 1.0)
        maps = upsample(result.cells_BHW, scorer.size).numpy() + of_maps * unit
        scores = result.images_B.numpy() + np.float32(of_scores * unit)
        p_values = scorer.detectors[0].images.p_values(torch.from_numpy(scores)).numpy()
        return maps, scores, p_values * of_p_values

    with pytest.raises(TrainingError, match=words) if words else nullcontext():
        found = export._verify(scorer, run, Path("a.onnx"))
        assert max(found[1:]) == pytest.approx(0.009, rel=0.01)


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("no package", 2, "pip install 'trajdist[onnx]'"),
        ("a folder", 2, "' is a folder: name a file, such as '"),
        ("below a file", 4, "cannot be written (Not a directory): free some space"),
        ("an exporter's error", 1, "this backbone or model cannot be exported (no such operator)"),
        ("no run", 4, "has no phase1"),
        ("no adapter", 4, "adapter_config.json"),
    ],
)
def test_refusals(small_run, tmp_path, monkeypatch, capsys, what, code, words):
    out, run_dir, more = tmp_path / "a.onnx", small_run, []
    if what == "no package":
        monkeypatch.setitem(sys.modules, "onnx", None)
    elif what == "a folder":
        out = tmp_path
    elif what == "below a file":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "a.onnx"
    elif what == "an exporter's error":
        monkeypatch.setattr(
            torch.onnx, "export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such operator"))
        )
    elif what == "no run":
        run_dir = tmp_path
    else:
        more = ["--adapter", str(tmp_path)]
    assert main(["export", str(run_dir), "--format", "onnx", "--out", str(out), *more]) == code
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert told.count("cannot be written") <= 1
    assert not out.is_file()
