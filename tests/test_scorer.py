"""The Python API: the same picture in any form gives the same score, and what is wrong with a run is said."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from images import noise, write_images
from outcome import read_rows
from PIL import ExifTags, Image
from safetensors.torch import save_file

import trajdist
from trajdist.artifacts import METADATA_KEY, read_document, read_tensors, write_tensors
from trajdist.cli import main
from trajdist.config_files import load_config
from trajdist.data.decode import to_square
from trajdist.data.sources import open_source
from trajdist.errors import ArtifactError, ConfigError, DataError, UserError
from trajdist.extraction import backbones
from trajdist.models.registry import build_model
from trajdist.saved.rundir import RunDir
from trajdist.scoring.calibration import QuantileSketch
from trajdist.scoring.detector import CellScores, Detector
from trajdist.scoring.scorer import Scorer, Scores, _names
from trajdist.training.selection import draw_selection

SIZE = 64


@pytest.fixture(scope="module")
def scorer(debug_run) -> Scorer:
    return trajdist.load(debug_run, device="cpu")


@pytest.fixture(scope="module")
def crops() -> list[Image.Image]:
    source = open_source("skimage:gravel/heldout", "source")
    return [source.load(index, None) for index in range(12)]


def assert_same(one: Scores, other: Scores, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(one.scores, other.scores, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(one.maps, other.maps, rtol=10 * tolerance, atol=10 * tolerance)


# --------------------------------------------------------------------------------------------- what comes out


def test_shapes_types_and_ranges(scorer, crops):
    scores = scorer(crops)
    assert scores.maps.shape == (12, SIZE, SIZE)
    assert scores.maps.dtype == np.float32
    assert (scores.scores.shape, scores.scores.dtype) == ((12,), np.float32)
    assert (scores.p_values.shape, scores.p_values.dtype) == ((12,), np.float64)
    assert ((scores.p_values > 0) & (scores.p_values <= 1)).all()
    assert np.isfinite(scores.maps).all()
    assert np.unique(scores.scores).size == 12, "different pictures score differently"


def test_p_values_are_ranks_among_the_clean_scores(scorer, crops):
    scores = scorer(crops)
    order = np.argsort(scores.scores)
    assert (np.diff(scores.p_values[order]) <= 0).all()
    steps = scores.p_values * (scorer.detectors[0].images.count + 1)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-9)


def test_the_score_is_read_off_the_hottest_cell(scorer, crops):
    """On a 4 x 4 grid 4 % of the places is one: the map's peak, which interpolation hardly lowers."""
    scores = scorer(crops)
    peaks = scores.maps.max((1, 2))
    assert (peaks <= scores.scores + 1e-4).all()
    np.testing.assert_allclose(peaks, scores.scores, rtol=0.1, atol=0.2)


def test_an_image_does_not_depend_on_its_company(scorer, crops):
    together = scorer(crops)
    alone = [scorer([crop]) for crop in crops]
    np.testing.assert_allclose([one.scores[0] for one in alone], together.scores, rtol=1e-4, atol=1e-4)


def test_scoring_repeats_itself_and_changes_nothing(scorer, crops):
    before = {name: tensor.clone() for name, tensor in scorer.detectors[0].residual.state_dict().items()}
    one, other = scorer(crops), scorer(crops)
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.maps, other.maps)
    for name, tensor in scorer.detectors[0].residual.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_foreign_patch_raises_the_score_and_lights_up(scorer, crops):
    clean = [crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for crop in crops]
    patched = []
    for image in clean:
        patch = np.asarray(image).copy()
        patch[32:48, 16:32] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
        patched.append(patch)
    before, after = scorer(clean), scorer(patched)
    assert (after.scores > before.scores).mean() > 0.8
    gain = (after.maps - before.maps).mean(0)
    assert gain[32:48, 16:32].mean() > 2 * gain.mean()


# ---------------------------------------------------------------------------------------------- what goes in

COLOUR: dict[str, Callable[[Image.Image], object]] = {
    "array": np.asarray,
    "array that is not contiguous": lambda image: np.asarray(image)[::-1][::-1],
    "float array": lambda image: np.asarray(image, np.float32) / 255,
    "double array": lambda image: np.asarray(image, np.float64) / 255,
    "uint8 tensor": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    "float tensor": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255,
    "tensor with a gradient": lambda image: (
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    ).requires_grad_(),
    "with alpha": lambda image: image.convert("RGBA"),
    "array with alpha": lambda image: np.asarray(image.convert("RGBA")),
}
GREY: dict[str, Callable[[Image.Image], object]] = {
    "array": np.asarray,
    "array with one channel": lambda image: np.asarray(image)[..., None],
    "float array": lambda image: np.asarray(image, np.float32) / 255,
    "tensor": lambda image: torch.from_numpy(np.array(image)),
    "tensor with one channel": lambda image: torch.from_numpy(np.array(image))[None].float() / 255,
    "three channels": lambda image: image.convert("RGB"),
    "16 bits": lambda image: Image.fromarray(np.asarray(image).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("form", COLOUR)
@pytest.mark.parametrize("side", [(SIZE, SIZE), (90, 41)], ids=["square", "oblong"])
def test_forms_of_a_colour_picture(scorer, form, side):
    pictures = [noise(seed).resize(side) for seed in (0, 1)]
    assert_same(scorer([COLOUR[form](picture) for picture in pictures]), scorer(pictures))


@pytest.mark.parametrize("form", GREY)
def test_forms_of_a_grey_picture(scorer, form):
    picture = noise(2).convert("L")
    assert_same(scorer([GREY[form](picture)]), scorer([picture]))


def test_a_deep_grey_array_is_the_deep_grey_picture(scorer):
    deep = np.asarray(noise(2).convert("L")).astype(np.uint16) * 257 // 3
    assert_same(scorer([deep]), scorer([Image.fromarray(deep)]))


@pytest.mark.parametrize("form", ["uint8 tensor", "float tensor", "array"])
def test_a_batch_is_a_sequence(scorer, form):
    pictures = [noise(seed) for seed in range(3)]
    forms = [COLOUR[form](picture) for picture in pictures]
    batch = np.stack(forms) if form == "array" else torch.stack(forms)
    assert_same(scorer(batch), scorer(pictures))


def test_pictures_of_many_sizes_and_forms_in_one_call(scorer):
    mixed = [noise(0, 17), np.asarray(noise(1, 200)), noise(2).convert("L"), torch.zeros(3, 1, 1), noise(3, 1)]
    scores = scorer(mixed)
    assert scores.maps.shape == (5, SIZE, SIZE)
    for index, image in enumerate(mixed):
        np.testing.assert_allclose(scorer([image]).scores[0], scores.scores[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["picture", "grey array", "grey tensor", "uint8 tensor", "float tensor", "array"])
def test_one_picture_is_a_batch_of_one(scorer, form):
    forms = {"picture": lambda image: image, "grey array": lambda image: np.asarray(image.convert("L")), **COLOUR}
    forms["grey tensor"] = lambda image: torch.from_numpy(np.array(image.convert("L")))
    image = noise(0)
    assert_same(scorer(forms[form](image)), scorer([image.convert("L") if "grey" in form else image]))


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 8, 8, 3)), torch.zeros(0, 3, 8, 8), iter([])])
def test_no_pictures_have_no_scores(scorer, nothing):
    scores = scorer(nothing)
    assert (scores.maps.shape, scores.maps.dtype) == ((0, SIZE, SIZE), np.float32)
    assert (scores.scores.shape, scores.p_values.shape) == ((0,), (0,))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_any_precision(scorer, kind):
    rounded = (COLOUR["float tensor"](noise(0))).to(kind)
    assert_same(scorer([rounded]), scorer([rounded.float()]))


def test_a_long_sequence_goes_in_batches(scorer, crops, monkeypatch):
    whole, sizes, score_batch = scorer(crops), [], scorer.score_batch

    def recorded(images_BCSS):
        sizes.append(len(images_BCSS))
        return score_batch(images_BCSS)

    monkeypatch.setattr(scorer, "score_batch", recorded)
    assert_same(scorer((crop for crop in crops), batch_size=5), whole)
    assert sizes == [5, 5, 2]


def test_threads_may_share_a_scorer(scorer, crops):
    alone = [scorer([crop]) for crop in crops]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda crop: scorer([crop]), crops), alone, strict=True):
            assert_same(found, expected)


@contextmanager
def default(change: Callable[[object], None], value: object, usual: object) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(usual)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dtype": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "device": lambda: default(torch.set_default_device, "meta", None),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("around", AROUND)
def test_scores_do_not_depend_on_the_program_around(debug_run, scorer, crops, around):
    expected = scorer(crops[:4])
    with AROUND[around]():
        random = torch.get_rng_state()
        loaded = trajdist.load(debug_run, device="cpu")
        assert torch.equal(random, torch.get_rng_state())
        inside = [scorer(crops[:4]), loaded(crops[:4])]
    for scores in (*inside, loaded(crops[:4])):
        assert_same(scores, expected, 1e-6)
        np.testing.assert_array_equal(scores.p_values, expected.p_values)


def test_loading_leaves_the_random_numbers_of_gpus_alone(debug_run, monkeypatch):
    """torch.manual_seed seeds them too, and nothing would restore them."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    trajdist.load(debug_run, device="cpu")
    assert not seeded


def test_random_weights_are_the_runs_in_whatever_thread(debug_run, scorer, crops, monkeypatch):
    """Several threads that load at once would draw from one generator."""
    inside: list[int] = []

    def seeing(*arguments):
        inside.append(len(inside))
        time.sleep(0.05)
        assert inside.pop() == 0
        return build_network(*arguments)

    build_network = backbones.build_network
    monkeypatch.setattr(backbones, "build_network", seeing)
    with ThreadPoolExecutor(3) as pool:
        for loaded in pool.map(lambda _: trajdist.load(debug_run, device="cpu"), range(3)):
            assert_same(loaded(crops[:2]), scorer(crops[:2]))


@pytest.mark.parametrize("make", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_scorer_is_loaded_where_it_is_needed(scorer, make):
    with pytest.raises(TypeError, match=r"call trajdist\.load there"):
        make(scorer)


@pytest.mark.parametrize("size", [0, 2.5, None, "3"])
def test_a_batch_of_none_is_refused(scorer, crops, size):
    with pytest.raises(ConfigError, match=f"batch_size={size!r}"):
        scorer(crops, batch_size=size)


NO_PICTURES = {
    "nan": torch.full((3, 8, 8), torch.nan),
    "one nan": torch.cat([torch.zeros(3, 7, 8), torch.full((3, 1, 8), torch.nan)], 1),
    "infinite": np.full((8, 8, 3), np.inf),
    "normalised": torch.linspace(-1, 1, 192).view(3, 8, 8),
    "0 to 255 as floats": np.full((8, 8, 3), 200.0),
    "too large": np.full((8, 8, 3), 300),
    "negative": torch.full((3, 8, 8), -1),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "channels last": torch.zeros(8, 8, 3),
    "nothing in it": np.zeros((0, 8, 3), np.uint8),
    "a number": 3,
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused(scorer, name):
    with pytest.raises(DataError, match="a picture of"):
        scorer([NO_PICTURES[name]])


def test_files_score_as_on_the_command_line(debug_run, scorer, tmp_path):
    """A large JPEG is decoded at a reduced scale there, which gives other pixels than Pillow's full ones."""
    noise(0, 1500).save(tmp_path / "large.jpg")
    assert main(["score", str(debug_run), str(tmp_path), "--out", str(tmp_path / "out"), "--overlays", "none"]) == 0
    (row,) = read_rows(tmp_path / "out")
    for images in ([tmp_path / "large.jpg"], str(tmp_path / "large.jpg")):
        scores = scorer(images)
        assert (scores.scores[0], scores.p_values[0]) == (pytest.approx(row["score"], abs=1e-4), row["p_value"])
    assert abs(scorer(Image.open(tmp_path / "large.jpg")).scores[0] - row["score"]) > 1e-3


def test_a_file_that_is_not_there_is_named(scorer):
    with pytest.raises(DataError, match=r"images\[0\]='0001\.png' cannot be used \(FileNotFoundError"):
        scorer(["0001.png"])


def truncated() -> Image.Image:
    """Pillow has read the header only."""
    file = io.BytesIO()
    noise(0).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:-2000]))


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (truncated, r"images\[3\] cannot be used \(OSError: image file is truncated"),
        (lambda: Image.new("RGB", (0, 8)), r"images\[3\] cannot be used \(.*Error: "),
    ],
    ids=["truncated", "no pixels"],
)
def test_a_picture_that_cannot_be_used_is_named_by_its_number(scorer, picture, words):
    with pytest.raises(DataError, match=words) as caught:
        scorer([noise(0), noise(1), noise(2), picture()], batch_size=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (None, r"images=None of type NoneType is not a picture"),
        (5, r"images=5 of type int is not a picture"),
        (torch.tensor(5), r"images=tensor\(5\) of type Tensor is not a picture"),
    ],
)
def test_what_is_no_sequence_of_pictures_is_refused(scorer, images, words):
    with pytest.raises(DataError, match=words):
        scorer(images)


def test_deep_colour_is_not_wrapped(scorer):
    deep = np.asarray(noise(2)).astype(np.uint16)
    assert_same(scorer([deep * 257]), scorer([noise(2)]))


# ---------------------------------------------------------------------------- as the command line has it


def command_line(run_dir: Path, images: Path | str, out: Path, *options: str) -> list[dict[str, object]]:
    assert main(["score", str(run_dir), str(images), "--out", str(out), "--overlays", "none", *options]) == 0
    return read_rows(out)


@pytest.mark.parametrize("phase", [1, 2])
def test_scores_of_the_command_line_are_those_of_the_api(debug_run, tmp_path, fresh_accelerate, phase):
    folder = write_images(tmp_path / "images", 3)
    noise(9, 300).resize((300, 120)).save(folder / "wide.jpg", quality=95)
    noise(8).convert("L").save(folder / "grey.png")
    rows = command_line(debug_run, folder, tmp_path / "out", "--phase", str(phase))
    api = trajdist.load(debug_run, phase=phase, device="cpu")
    scores = api([Image.open(folder / str(row["image"])) for row in rows])
    assert len(rows) == 5
    # A large JPEG is decoded at a reduced scale on the command line.
    np.testing.assert_allclose([row["score"] for row in rows], scores.scores, rtol=5e-2, atol=0.1)
    exact = [index for index, row in enumerate(rows) if str(row["image"]).endswith(".png")]
    np.testing.assert_allclose([rows[index]["score"] for index in exact], scores.scores[exact], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([rows[index]["p_value"] for index in exact], scores.p_values[exact], atol=1e-9)


def test_a_photograph_on_its_side_scores_alike(debug_run, scorer, tmp_path, fresh_accelerate):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "images").mkdir()
    file = tmp_path / "images" / "phone.png"
    noise(5).save(file, exif=exif)
    rows = command_line(debug_run, tmp_path / "images", tmp_path / "out")
    assert scorer([Image.open(file)]).scores[0] == pytest.approx(rows[0]["score"], rel=1e-3)


# -------------------------------------------------------------------------------------- phases and adapters


def test_phase_1_is_without_the_adapter(debug_run, scorer, crops):
    unadapted, adapted = (trajdist.load(debug_run, phase=phase, device="cpu") for phase in (1, 2))
    assert [each.detectors[0].name for each in (unadapted, adapted)] == ["phase1", "run"]
    assert_same(adapted(crops), scorer(crops))
    # Calibrated on photographs or on gravel: the same pictures are not equally odd.
    assert np.abs(unadapted(crops).scores - adapted(crops).scores).min() > 1e-3


def test_an_adapter_by_name_is_the_runs_own(debug_run, scorer, crops):
    named = trajdist.load(debug_run, adapter=debug_run / "phase2" / "adapter", device="cpu")
    assert_same(named(crops), scorer(crops))


@pytest.mark.parametrize("several", [False, True])
def test_an_adapter_may_lie_at_home(debug_run, scorer, crops, monkeypatch, several):
    monkeypatch.setenv("HOME", str(debug_run))
    adapter = "~/phase2/adapter"
    named = trajdist.load("~", adapter=[adapter] if several else adapter, device="cpu")
    assert_same(named(crops), scorer(crops))


def test_phase_1_with_an_adapter_is_refused(debug_run):
    with pytest.raises(UserError):
        trajdist.load(debug_run, adapter=debug_run / "phase2" / "adapter", phase=1, device="cpu")


def test_an_adapter_twice_is_refused(debug_run):
    with pytest.raises(ConfigError, match="twice"):
        trajdist.load(debug_run, adapter=[debug_run / "phase2" / "adapter", debug_run / "phase1/../phase2/adapter"])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/runs/gravel/phase2/adapter", "/runs/brick/phase2/adapter"], ["gravel", "brick"]),
        (["/a/run/phase2/adapter", "/b/run/phase2/adapter", "/b/c/phase2/adapter"], ["a/run", "b/run", "c"]),
        (["/run/phase2/adapter", "/b/run/phase2/adapter"], ["/run", "b/run"]),
        (["/run/phase2/adapter", "/run/adapter"], ["/run/phase2/adapter", "/run/adapter"]),
    ],
)
def test_adapters_are_called_so_that_they_can_be_told_apart(folders, names):
    assert list(_names([Path(folder) for folder in folders])) == names


def test_a_run_without_phase_2(debug_run, tmp_path, crops):
    shutil.copytree(debug_run / "phase1", tmp_path / "run" / "phase1")
    only = trajdist.load(tmp_path / "run", device="cpu")
    assert_same(only(crops), trajdist.load(debug_run, phase=1, device="cpu")(crops))
    with pytest.raises(ArtifactError, match=r"phase2/adapter.*--phase 1"):
        trajdist.load(tmp_path / "run", phase=2, device="cpu")


@pytest.mark.parametrize(("phase", "options", "told"), [(1, (), False), (2, (), True), (2, ("--phase", "1"), False)])
def test_who_scores_with_an_unfinished_run_is_told(debug_run, tmp_path, capsys, fresh_accelerate, phase, options, told):
    shutil.copytree(debug_run / "phase1", tmp_path / "run" / "phase1")
    RunDir(tmp_path / "run").write_status("running", phase, 3)
    command_line(tmp_path / "run", write_images(tmp_path / "images", 1), tmp_path / "out", *options)
    assert ("did not finish its Phase 2" in capsys.readouterr().out) == told


def test_an_adapted_run_in_a_folder_called_phase1_is_adapted(debug_run, tmp_path, capsys, fresh_accelerate):
    shutil.copytree(debug_run, tmp_path / "phase1")
    command_line(tmp_path / "phase1", write_images(tmp_path / "images", 1), tmp_path / "out")
    said = capsys.readouterr().out
    assert "phase1: threshold" in said
    assert "did not finish its Phase 2" not in said


# ------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def copied(debug_run, tmp_path) -> Path:
    for part in ("phase1", "phase2"):
        shutil.copytree(debug_run / part, tmp_path / "run" / part)
    return tmp_path / "run"


def test_no_run_there(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ArtifactError, match=r"has no phase1/trajectory\.safetensors"):
            trajdist.load(folder)


def test_a_run_whose_name_is_no_unicode(debug_run, tmp_path):
    """The safetensors library opens no such file."""
    shutil.copytree(debug_run, tmp_path / "caf\udce9")
    with pytest.raises(ArtifactError, match="rename the folder"):
        trajdist.load(tmp_path / "caf\udce9")


def test_no_adapter_there(debug_run, tmp_path):
    with pytest.raises(ArtifactError, match="nothing"):
        trajdist.load(debug_run, adapter=tmp_path / "nothing")


def test_a_folder_around_the_adapter(debug_run):
    for folder in (debug_run, debug_run / "phase2"):
        with pytest.raises(ArtifactError, match=r"has no adapter_config\.json: name '.*/phase2/adapter'\.$"):
            trajdist.load(debug_run, adapter=folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    changed = {**read_tensors(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    write_tensors(file, {name: t for name, t in changed.items() if t is not None}, read_document(file))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "not a valid safetensors file"),
    "empty": (lambda file: file.write_bytes(b""), "not a valid safetensors file"),
    "missing": (Path.unlink, "does not exist"),
    "text": (lambda file: file.write_text('{"kind": "calibration"}'), "not a valid safetensors file"),
    "no document": (lambda file: save_file(read_tensors(file), file), "not a trajdist calibration"),
    "another kind": (lambda file: write_tensors(file, read_tensors(file), {"kind": "model"}), "not a trajdist calib"),
    "a list": (
        lambda file: save_file(read_tensors(file), file, {METADATA_KEY: '["calibration"]'}),
        "not a trajdist calibration",
    ),
    "a tensor too few": (lambda file: change(file, residual__spread=None), "lacks tensor 'spread'"),
    "a tensor too many": (lambda file: change(file, residual__extra=torch.ones(1)), "unknown tensor 'extra'"),
    "another grid": (lambda file: change(file, residual__usual_P=torch.zeros(49)), "usual_P"),
    "another type": (lambda file: change(file, residual__spread=torch.ones((), dtype=torch.float64)), "spread"),
    "no clean scores": (lambda file: change(file, images__edges=None), "lacks the score histogram 'images'"),
}


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_calibration(copied, damage, phase):
    spoil, words = DAMAGES[damage]
    spoil(copied / f"phase{phase}" / "calibration.safetensors")
    with pytest.raises(ArtifactError, match=words) as caught:
        trajdist.load(copied, phase=phase)
    assert f"phase{phase}/calibration.safetensors" in str(caught.value)


@pytest.mark.parametrize(("phase", "name"), [(1, "model"), (1, "calibration"), (2, "calibration")])
def test_a_run_that_was_killed_before_its_end(copied, phase, name):
    (copied / f"phase{phase}" / f"{name}.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"does not exist: the run is not finished; .* run its command again"):
        trajdist.load(copied, phase=phase)


def test_an_adapter_that_left_its_calibration_behind(debug_run, tmp_path):
    shutil.copytree(debug_run / "phase2" / "adapter", tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="does not exist: finish the adapter's run, or copy the file from there"):
        trajdist.load(debug_run, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("phase", [1, 2])
def test_the_calibration_of_another_model(copied, phase):
    target, other = (copied / f"phase{which}" / "calibration.safetensors" for which in (phase, 3 - phase))
    shutil.copy(other, target)
    with pytest.raises(ArtifactError, match="was made for another model") as caught:
        trajdist.load(copied, phase=phase)
    assert str(target) in str(caught.value)


def test_weights_that_changed_after_the_calibration(copied):
    file = copied / "phase2" / "adapter" / "adapter_model.safetensors"
    tensors = read_tensors(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1e-3}, file)
    with pytest.raises(ArtifactError, match=r"phase2/calibration\.safetensors' was made for another model"):
        trajdist.load(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_calibration_that_is_not_finite(copied, value):
    change(copied / "phase2" / "calibration.safetensors", residual__spread=torch.tensor(value))
    with pytest.raises(ArtifactError, match=r"phase2/calibration\.safetensors"):
        trajdist.load(copied)


def test_a_calibration_goes_to_where_its_detector_is(debug_run):
    """Training on a GPU loads one there; ``meta`` stands in for it."""
    rundir = RunDir(debug_run)
    detector = trajdist.load(debug_run, phase=1, device="cpu").detectors[0].to(torch.device("meta"))
    detector.load(rundir.calibration(1), read_document(rundir.calibration(1))["base"])
    assert {tensor.device.type for tensor in detector.residual.buffers()} == {"meta"}


def test_a_detector_drops_no_unit_out_and_leaves_padding_out():
    """Training calibrates with the model that it has just trained."""
    model = build_model(
        "autoencoder", length=2, width=3, hidden_dim=8, latent_dim=4, num_layers=1, num_heads=1, dropout=0.5
    )
    valid, trajectories = torch.tensor([[True, True, False], [True, True, True]]), torch.ones(4, 1, 1, 2, 3)
    detector = Detector("phase1", model.train(), valid, 1)
    with torch.no_grad():
        first, second = (detector.residuals(trajectories) for _ in range(2))
        errors = trajectories[:, 0, 0] - model(trajectories[:, 0, 0]).output_NLD
    assert torch.equal(first, second)
    assert torch.equal(first, errors.flatten(1)[:, [0, 1, 3, 4, 5]])


def test_held_out_images_were_scored_as_new_ones_are(tmp_path, fresh_accelerate):
    """Wide photographs: training crops them, scoring does not, and neither does what it is compared with.

    Neither of the batches fills its last step, and of the images held out, as of the others, one cannot be read.
    """
    folder, run_dir = tmp_path / "wide", tmp_path / "run"
    folder.mkdir()
    for number in range(20):
        noise(number).resize((96, 48)).save(folder / f"{number:02}.png")
    keys = [f"data.imagenet.path={folder}", "data.imagenet.num_samples=-1", "calibration.holdout_fraction=0.4"]
    keys += ["data.imagenet.fit=crop", "data.imagenet.batch_size=5", "data.max_bad_fraction=0.2"]
    source = open_source(str(folder), "source")
    selection = draw_selection(load_config("debug", keys), 1, source, max_holdout=None)
    held_out = selection.holdout(0, np.arange(selection.num_holdout)).tolist()
    trained = sorted(set(range(20)) - set(held_out))
    for unreadable in (held_out.pop(), trained.pop()):
        (folder / f"{unreadable:02}.png").write_bytes(b"no picture")
    assert main(["train", "debug", f"run_dir={run_dir}", *keys]) == 0
    scorer = trajdist.load(run_dir, device="cpu")
    (detector,) = scorer.detectors

    def scored(indices: list[int], fit: str) -> CellScores:
        squares = np.stack([to_square(source.load(index, SIZE), SIZE, fit) for index in indices])
        return scorer.score_batch(torch.from_numpy(squares).permute(0, 3, 1, 2))[0]

    def calibrated(sketch: QuantileSketch) -> np.ndarray:
        edges, counts = sketch.histogram.occupied()
        return edges.repeat_interleave(counts.long()).numpy()

    scores = scorer([source.load(index, None) for index in held_out]).scores
    np.testing.assert_allclose(np.sort(scores), calibrated(detector.images), rtol=2e-3)
    cells = scored(held_out, "squash").cells_BHW.flatten().numpy()
    np.testing.assert_allclose(np.sort(cells), calibrated(detector.cells), rtol=2e-3, atol=1e-3)
    roots_BP = scored(trained, "crop").energies_BHWL.sqrt().mean(-1).flatten(1).double().numpy()
    mean_P = roots_BP.mean(0)
    np.testing.assert_allclose(detector.residual.usual_P, mean_P - mean_P.mean(), atol=1e-3)
    assert detector.residual.spread.item() == pytest.approx(np.sqrt(roots_BP.var(0).mean()), rel=1e-3)


@pytest.mark.parametrize("options", [{"phase": 3}, {"device": "gpu"}, {"device": "cuda:99"}])
def test_what_is_no_phase_and_no_device(debug_run, options):
    ((key, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{key}={value!r}"):
        trajdist.load(debug_run, **options)
