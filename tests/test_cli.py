"""The command line as a user meets it: exit codes, one-sentence errors, what it prints, what it leaves behind."""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from images import write_images
from jobs import REPOSITORY, Finished, launch
from outcome import flip_a_weight, read_lines, read_rows
from safetensors.torch import load_file, save_file

from trajdist.artifacts import METADATA_KEY, read_document, read_tensors
from trajdist.cli import main
from trajdist.config_files import load_config
from trajdist.errors import ArtifactError
from trajdist.runtime.clock import STAGES
from trajdist.saved.bundle import TrajectoryDocument
from trajdist.saved.rundir import RunDir
from trajdist.scoring.scorer import load
from trajdist.training import loop
from trajdist.training.doctor import smaller

CONTROL = {chr(code) for code in range(32)} - {"\n"}


def assert_sentence(text: str, *words: str) -> None:
    """One line that names what is wrong, without a traceback."""
    assert text.startswith("trajdist: ")
    assert text.count("\n") == 1, text
    assert text.endswith((".\n", "?\n")), text
    assert "Traceback" not in text
    assert all(word in text for word in words), text


def without_torch(*args: str | Path, cwd: Path) -> Finished:
    """Run a command in a process in which importing torch fails."""
    code = "import sys; sys.modules['torch'] = None; from trajdist.cli import main; sys.exit(main(sys.argv[1:]))"
    (cwd / "start.py").write_text(code)
    return launch(args, module="start", cwd=cwd, timeout_s=60, from_nothing=True)


MISTAKES = [
    ("data.imagenet.path={folder}/nothing", 3, ["data.imagenet.path", "nothing", "does not exist"]),
    ("data.imagenet.path={folder}/empty", 3, ["data.imagenet.path", "empty", "holds no images"]),
    ("data.imagenet.path={folder}/texts", 3, ["data.imagenet.path", "texts", "holds no images"]),
    ("data.imagenet.path=null", 3, ["data.imagenet.path is not set"]),
    ("data.domain.path={folder}/nothing", 3, ["data.domain.path", "does not exist"]),
    ("model.type=lstm", 2, ["model.type", "'lstm'", "'autoencoder'"]),
    ("data.imagenet.batchsize=3", 2, ["data.imagenet.batchsize", "did you mean data.imagenet.batch_size?"]),
    ("model.hidden_dim=-1", 2, ["model.hidden_dim", "-1"]),
    ("data.imagenet.num_samples=0", 2, ["data.imagenet.num_samples = 0", "use -1 for all"]),
    ("model.num_heads=3", 2, ["model.num_heads=3", "model.hidden_dim=64"]),
    ("model.hidden_dim", 2, ["'model.hidden_dim'", "key=value"]),
]


@pytest.mark.parametrize(("mistake", "code", "words"), MISTAKES, ids=[mistake for mistake, *_ in MISTAKES])
def test_mistakes_end_before_torch_is_imported(tmp_path, mistake, code, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.txt").write_text("no image")
    overrides = ["model.type=transformer", mistake.format(folder=tmp_path), f"run_dir={tmp_path}/run"]
    done = without_torch("run", "debug", *overrides, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert_sentence(done.stderr, *words)
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["This is no config, it is a letter.\n", "\x00\x01\x02", "a: [1,\n"])
def test_a_text_that_is_called_yaml(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    done = without_torch("run", tmp_path / "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert_sentence(done.stderr, "mine.yaml")


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["run", "--help"], ["config", "debug"], ["config", "--schema"]]
)
def test_help_and_config_need_no_torch(tmp_path, args):
    done = without_torch(*args, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    "args",
    [[], ["dance"], ["run"], ["run", "debug", "--no-such-option"], ["audit", "runs/mine", "--debug", "seed=1"]],
)
def test_wrong_usage(tmp_path, args):
    done = without_torch(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: trajdist" in done.stderr


@pytest.mark.parametrize("words", [["--data.imagenet.path=/x"], ["--seed=1"], ["--data.imagenet.path", "/x"]])
def test_a_key_with_dashes_is_told_how_to_be_written(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(["train", "debug", *words])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    # Newer Pythons take the word after an unknown option for one of the overrides.
    unknown = "|".join({words[0], " ".join(words)})
    assert re.search(f"unrecognized arguments: ({unknown}): write keys of the config as key=value, without the", told)


@pytest.mark.parametrize(
    "command",
    [
        ["score", "run", "images", "--out="],
        ["evaluate", "run", "images", "--out", ""],
        ["merge", "run", "--out", ""],
        ["export", "run", "--format", "onnx", "--out="],
        ["pack", "images", ""],
    ],
)
def test_an_output_without_a_name_is_not_the_current_folder(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "the name is empty" in capsys.readouterr().err


def test_an_unknown_option_is_no_key(capsys):
    for command in (["train", "debug", "--frehs"], ["inspect", "here", "--seed=1"]):
        with pytest.raises(SystemExit):
            main(command)
        assert "keys" not in capsys.readouterr().err


def test_overrides_may_follow_an_option(tmp_path, capsys):
    assert main(["config", "debug", "seed=7", "--debug", "model.hidden_dim=96", "model.latent_dim=8"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["seed"], config["model"]["hidden_dim"], config["model"]["latent_dim"]) == (7, 96, 8)


def test_config_prints_what_it_reads(capsys, tmp_path):
    assert main(["config", "debug", "seed=7"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert main(["config", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == (tmp_path / "again.yaml").read_text()
    assert main(["config", "seed=7"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert main(["config", "--schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_debug_shows_the_traceback(tmp_path):
    done = without_torch("run", "debug", "model.type=lstm", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "keys", "mend"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), [], "): lower data.num_workers and"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GiB)"), ["memory.images_per_pass=6"], "pass=3 or"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
            ["memory.images_per_pass=1"],
            "start a new run with a small",
        ),
        (MemoryError(), [], "on cpu (MemoryError): lower"),
    ],
)
def test_a_lack_of_memory_is_one_sentence(tmp_path, capsys, monkeypatch, fresh_accelerate, error, keys, mend):
    def allocate(*_):
        raise error

    monkeypatch.setattr(loop, "add_gradients", allocate)
    images = f"data.imagenet.path={write_images(tmp_path / 'images', 8)}"
    sizes = ["data.imagenet.batch_size=8", "calibration.holdout_fraction=0"]
    assert main(["train", "debug", f"run_dir={tmp_path}/run", images, *sizes, *keys]) == 1
    said = capsys.readouterr().err
    assert_sentence(said, "process 0 ran out of memory on cpu", mend, "data.imagenet.batch_size")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], f"trajdist: {status['why']}\n") == ("failed", said)


def test_what_takes_less_memory_depends_on_the_device():
    small = ["data.imagenet.batch_size=1", "data.num_workers=0"]
    assert "images_per_pass=16 or less" in smaller(load_config("default"), 1, "cuda")
    assert "images_per_pass" not in smaller(load_config("default"), 1, "cpu")
    assert smaller(load_config("default", small), 1, "cuda").startswith("start a new run with a smaller backbone")


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch, fresh_accelerate):
    def fail(*_):
        raise RuntimeError("a size that does not fit")

    monkeypatch.setattr(loop, "add_gradients", fail)
    with pytest.raises(RuntimeError, match="does not fit"):
        main(["train", "debug", f"run_dir={tmp_path}/run"])


def test_a_run_on_no_terminal(tmp_path):
    """From a folder of its own, with a config of its own: plain lines, all files, nothing on stderr."""
    images = write_images(tmp_path / "images", 8)
    shutil.copy(REPOSITORY / "configs" / "debug.yaml", tmp_path / "mine.yaml")
    overrides = [f"data.{name}.path={images}" for name in ("imagenet", "domain")]
    done = launch(["run", "mine.yaml", "run_dir=out", *overrides], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not CONTROL & set(done.stdout)
    assert "phase 1: epoch 2 step 2" in done.stdout
    assert "phase 2: epoch 2 step 2" in done.stdout
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["status"], status["phase"]) == ("done", 2)


def test_run_directory(debug_run):
    files = {str(file.relative_to(debug_run)) for file in debug_run.rglob("*") if file.is_file()}
    assert files >= {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "status.json",
        "phase1/model.safetensors",
        "phase1/trajectory.safetensors",
        "phase1/calibration.safetensors",
        "phase2/calibration.safetensors",
        "phase2/adapter/adapter_config.json",
        "phase2/adapter/adapter_model.safetensors",
        "checkpoints/step-00000012/manifest.json",
    }
    keys = {"phase", "epoch", "step", "images", "loss", "recon", "kl", "lr", "images_per_s", "peak_memory_bytes"}
    lines = read_lines(debug_run, "metrics.jsonl")
    assert {line["phase"] for line in lines} == {1, 2}
    assert all({*keys, "memory_bytes"} <= line.keys() for line in lines)
    summary = json.loads((debug_run / "summary.json").read_text())
    assert (summary["phase1"]["images"], summary["phase2"]["images"]) == (64, 32)
    assert (summary["phase1"]["steps"], summary["phase2"]["steps"]) == (8, 4)
    time = summary["phase1"]["time"]
    assert set(time) == {*STAGES, "other"}
    assert sum(time.values()) == pytest.approx(summary["phase1"]["seconds"])
    assert summary["phase1"]["doctor"].endswith(".")


def test_no_pickle_in_a_run_directory(debug_run):
    for file in (file for file in debug_run.rglob("*") if file.is_file()):
        raw = file.read_bytes()
        assert not zipfile.is_zipfile(file), file
        assert not raw.startswith((b"\x80", b"\x1f\x8b")), file
        if file.suffix == ".safetensors":
            read_tensors(file)
        else:
            raw.decode("utf-8")


@pytest.mark.parametrize(
    "words",
    [
        ["adapt", "debug", "run_dir={folder}/run", "phase1={long}"],
        ["train", "debug", "run_dir={folder}/run", "backbone.weights={long}"],
        ["train", "debug", "run_dir={long}", "--fresh"],
        ["score", "{long}", "skimage:gravel", "--out", "{folder}/out"],
        ["score", "{run}", "skimage:gravel", "--adapter", "{long}", "--out", "{folder}/out"],
        ["merge", "{run}", "--out", "{long}"],
        ["export", "{run}", "--format", "torch", "--out", "{long}"],
        ["audit", "{long}"],
        ["inspect", "{long}"],
    ],
    ids=lambda words: " ".join(words[:1] + [word for word in words if "long" in word]),
)
def test_a_name_that_the_system_refuses_is_one_sentence(debug_run, tmp_path, capsys, fresh_accelerate, words):
    """Python's own methods raise, or since Python 3.14 say that it is not there, as in a folder without permission."""
    long = tmp_path / ("n" * 300)
    assert main([word.format(folder=tmp_path, long=long, run=debug_run) for word in words]) == 4
    assert_sentence(capsys.readouterr().err.splitlines(keepends=True)[-1], str(long), "File name too long")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("ledger.jsonl", ["audit", "{run}"]),
        ("phase1/calibration.safetensors", ["adapt", "debug", "run_dir={folder}/other", "phase1={run}"]),
        ("checkpoints", ["run", "debug", "run_dir={run}", "runtime.mixed_precision=no"]),
        ("phase1/model.safetensors", ["score", "{run}", "skimage:gravel", "--out", "{folder}/out"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_file_that_may_not_be_read_is_one_sentence(
    debug_run, tmp_path, capsys, monkeypatch, fresh_accelerate, file, words
):
    """``safetensors`` says of such a file that it does not exist."""
    shutil.copytree(debug_run, tmp_path / "run")
    (tmp_path / "run" / "phase2" / "calibration.safetensors").unlink()
    refused = str(tmp_path / "run" / file)
    if file == "phase1/model.safetensors":
        Path(refused).write_bytes(b"")

    def refusing(original):
        def refuse(path, *args, **options):
            if str(path) == refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), refused)
            return original(path, *args, **options)

        return refuse

    for holder, name in ((builtins, "open"), (Path, "read_bytes"), (Path, "iterdir")):
        monkeypatch.setattr(holder, name, refusing(getattr(holder, name)))
    assert main([word.format(run=tmp_path / "run", folder=tmp_path) for word in words]) == 4
    told = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert_sentence(told, str(tmp_path / "run"), "(Permission denied): make", "readable")


def test_an_adapter_out_of_reach_is_not_taken_for_none(debug_run, tmp_path):
    """Scores of the unadapted model would pass for those of the adapted one."""
    shutil.copytree(debug_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "phase2")
    (tmp_path / "run" / "phase2").symlink_to("phase2")
    with pytest.raises(ArtifactError, match=r"phase2/adapter' cannot be reached \(Too many levels of symbolic links\)"):
        load(tmp_path / "run")


def test_a_second_run_does_nothing(debug_run, tmp_path, capsys, fresh_accelerate):
    shutil.copytree(debug_run, tmp_path / "run")
    before = (tmp_path / "run" / "summary.json").read_text()
    command = ["run", "debug", f"run_dir={tmp_path}/run", "runtime.mixed_precision=no"]
    assert main(command) == 0
    assert "phase 1 is done" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").read_text() == before
    assert main([*command, "model.latent_dim=8"]) == 2
    assert_sentence(capsys.readouterr().err, "model.latent_dim=8", "began with 16", "--fresh")


@pytest.mark.parametrize("command", [["config"], ["inspect", "{run}"], ["audit", "{run}"]])
def test_what_is_printed_to_a_full_disk_or_to_nobody(debug_run, monkeypatch, capsys, command):
    words = [word.format(run=debug_run) for word in command]
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert main(words) == 4
    assert_sentence(capsys.readouterr().err, "stdout cannot be written (No space left on device)")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", gone)
        assert main(words) == 141
    assert capsys.readouterr().err == ""


def test_a_run_that_is_done_stays_done_if_nobody_reads_it(tmp_path, monkeypatch, fresh_accelerate):
    reader, writer = os.pipe()
    os.close(reader)
    run_dir = tmp_path / "run"
    monkeypatch.setattr("trajdist.training.session.Session.say", lambda self, text: None)
    monkeypatch.setattr("trajdist.runtime.progress.Progress.show", lambda self, record: None)
    with open(writer, "w") as gone, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", gone)
        assert main(["train", "debug", f"run_dir={run_dir}", "runtime.mixed_precision=no"]) == 141
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"


def test_a_process_without_stdout_says_what_is_wrong(tmp_path):
    """As under a launcher whose shell closed it."""
    command = [sys.executable, "-m", "trajdist", "config", "debug", "model.latent_dim=x"]
    environment = {**os.environ, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    closed = ["bash", "-c", 'exec "$@" >&-', "bash", *command]
    done = subprocess.run(closed, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert_sentence(done.stderr, "model.latent_dim")


@pytest.mark.parametrize(
    ("phase2", "lacks"),
    [(3, "figures"), ({"epochs": 2}, "images"), ({"domains": {"road": {}}}, "images"), ({"domains": 3}, "figures")],
)
def test_a_damaged_summary_is_one_sentence(debug_run, tmp_path, capsys, fresh_accelerate, phase2, lacks):
    summary = json.loads((debug_run / "summary.json").read_text())
    run_dir = shutil.copytree(debug_run, tmp_path / "run")
    whole = summary["phase2"] if "domains" in (phase2 if isinstance(phase2, dict) else {}) else {}
    changed = {**whole, **phase2} if isinstance(phase2, dict) else phase2
    (run_dir / "summary.json").write_text(json.dumps({**summary, "phase2": changed}))
    for command in (["run", "debug", f"run_dir={run_dir}", "runtime.mixed_precision=no"], ["inspect", f"{run_dir}"]):
        assert main(command) == 4
        assert_sentence(capsys.readouterr().err, "summary.json' is damaged", f"its phase2 has no {lacks}; restore")
    assert main(["audit", str(run_dir)]) == 4


def test_damaged_sizes_of_the_records_truncate_nothing(debug_run, tmp_path, capsys, fresh_accelerate):
    run_dir = shutil.copytree(debug_run, tmp_path / "run")
    shutil.rmtree(run_dir / "phase2")
    shutil.rmtree(run_dir / "checkpoints")
    RunDir(run_dir).remember("records_after_phase1", {"metrics.jsonl": "2 KiB"}, replace=True)
    assert main(["adapt", "debug", f"run_dir={run_dir}", "runtime.mixed_precision=no"]) == 4
    assert_sentence(capsys.readouterr().err, "run.json' is damaged: records_after_phase1=", "2 KiB")
    assert (run_dir / "metrics.jsonl").read_bytes() == (debug_run / "metrics.jsonl").read_bytes()


def test_an_output_folder_that_cannot_be_made(debug_run, tmp_path, capsys, fresh_accelerate):
    images = write_images(tmp_path / "images", 1)
    (tmp_path / "file").touch()
    assert main(["score", str(debug_run), str(images), "--out", str(tmp_path / "file" / "out")]) == 4
    assert_sentence(capsys.readouterr().err, "file/out' cannot be made (Not a directory): name a folder that can be")
    assert main(["score", str(debug_run), str(images), "--out", str(tmp_path / "file")]) == 4
    assert_sentence(capsys.readouterr().err, "file' is not a folder")


@pytest.mark.parametrize("kind", ["autoencoder", "vae", "transformer"])
def test_target_modules_that_are_not_there_cost_no_phase_1(tmp_path, capsys, kind):
    targets = "domain_adaptation.lora.target_modules=[nothing]"
    command = ["run", "debug", f"run_dir={tmp_path}/run", f"model.type={kind}", targets]
    assert main(command) == 2
    assert_sentence(capsys.readouterr().err, "target_modules=['nothing']", "encoder.0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("", ["phase1", "done", "model.safetensors"]),
        ("phase1", ["autoencoder", "encoder.0.weight", "backbone_fingerprint"]),
        ("phase1/model.safetensors", ["hidden_dim", "encoder.0.weight"]),
        ("phase2/adapter", ["LORA", "lora_A.weight"]),
        ("checkpoints/step-00000012", ["cursor", "hold"]),
    ],
)
def test_inspect(debug_run, capsys, part, words):
    assert main(["inspect", str(debug_run / part)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words), shown


@pytest.mark.parametrize(
    "damaged",
    [["phase1/model.safetensors"], ["status.json", "phase1/model.safetensors", "phase2/adapter/adapter_config.json"]],
    ids=len,
)
def test_inspect_shows_what_is_whole_and_names_what_is_damaged(damaged, debug_run, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(debug_run, run_dir)
    for name in damaged:
        os.truncate(run_dir / name, 20)
    assert main(["inspect", str(run_dir)]) == 4
    shown = capsys.readouterr()
    assert all(str(run_dir / name) in shown.err for name in damaged)
    assert "cursor" in shown.out, "checkpoints come last"
    assert "bad_images.jsonl" in shown.out, "the files are listed first"
    assert ("3 problems: " in shown.err) == (len(damaged) == 3)
    assert shown.err.count("trajdist: ") == 1


def test_inspect_of_a_folder_goes_on_after_a_damaged_file(debug_run, tmp_path, capsys):
    shutil.copytree(debug_run / "phase1", tmp_path / "phase1")
    os.truncate(tmp_path / "phase1" / "calibration.safetensors", 20)
    assert main(["inspect", str(tmp_path / "phase1")]) == 4
    shown = capsys.readouterr()
    assert "calibration.safetensors' is not a valid safetensors file" in shown.err
    assert "encoder.0.weight" in shown.out


def test_inspect_names_damaged_checkpoints(debug_run, tmp_path, capsys):
    shutil.copytree(debug_run, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000008"
    os.truncate(damaged / "model.safetensors", 20)
    assert main(["inspect", str(tmp_path / "run")]) == 4
    shown = capsys.readouterr()
    assert f"the checkpoint '{damaged}' is damaged" in shown.err
    assert "step-00000012" in shown.out


def inspected(run_dir: Path, capsys) -> str:
    capsys.readouterr()
    assert main(["inspect", str(run_dir)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_inspect_folds_folders_of_many_files(debug_run, tmp_path, capsys):
    run_dir = shutil.copytree(debug_run, tmp_path / "run")
    maps = run_dir / "evaluation" / "maps"
    maps.mkdir(parents=True)
    for number in range(30):
        (maps / f"{number}.png").write_bytes(b"x" * 100)
    (maps.parent / "metrics.json").write_text("{}")
    shown = inspected(run_dir, capsys)
    assert "evaluation/maps/ 30 files, 3,000 bytes" in shown
    assert ".png" not in shown
    assert "evaluation/metrics.json 2 bytes" in shown
    assert "phase2/adapter/adapter_config.json" in shown


@pytest.mark.parametrize("is_there", [True, False])
def test_inspect_while_a_run_removes_a_file(debug_run, tmp_path, capsys, monkeypatch, is_there):
    """It is gone after it was looked at, or once it was listed."""
    run_dir = shutil.copytree(debug_run, tmp_path / "run")
    (run_dir / "checkpoints" / "old").write_text("x")
    stat = os.stat

    def seen_last(path: object, **options: object) -> os.stat_result:
        found = stat(path, **options)
        if str(path).endswith("checkpoints/old"):
            os.unlink(path)
        return found if is_there else stat(path, **options)

    monkeypatch.setattr(os, "stat", seen_last)
    assert ("checkpoints/old 1 bytes" in inspected(run_dir, capsys)) == is_there


@pytest.mark.parametrize(
    ("time", "words"),
    [(1795699843.06, r"2026-11-2\d \d\d:\d\d:43[+-]\d\d:\d\d "), ("noon", "noon"), (1e300, r"1e\+300"), (None, "None")],
)
def test_inspect_shows_the_date_here(debug_run, tmp_path, capsys, time, words):
    run_dir = shutil.copytree(debug_run, tmp_path / "run")
    (run_dir / "status.json").write_text(json.dumps({"status": "done", "time": time}))
    assert re.search(rf"time\W+{words}", inspected(run_dir, capsys))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[12] ^= 0xFF
    file.write_bytes(raw)


DAMAGED = ["phase1/model.safetensors", "phase1/trajectory.safetensors"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", [cut, flip, flip_a_weight, lambda file: file.write_bytes(b""), Path.unlink])
def test_damaged_artifacts(debug_run, tmp_path, capsys, fresh_accelerate, name, damage):
    shutil.copytree(debug_run / "phase1", tmp_path / "old" / "phase1")
    shutil.copy(debug_run / "summary.json", tmp_path / "old")
    damage(tmp_path / "old" / name)
    command = ["adapt", "debug", f"run_dir={tmp_path}/new", f"phase1={tmp_path}/old", "runtime.mixed_precision=no"]
    assert main(command) == 4
    assert_sentence(capsys.readouterr().err, Path(name).name)


def test_a_model_that_its_calibration_does_not_know(debug_run, tmp_path, capsys, fresh_accelerate):
    """As a flipped bit in a file of an earlier version, which has no fingerprint of its tensors."""
    run_dir = Path(shutil.copytree(debug_run / "phase1", tmp_path / "old" / "phase1"))
    metadata = {METADATA_KEY: json.dumps(read_document(run_dir / "model.safetensors"))}
    flip_a_weight(run_dir / "model.safetensors")
    save_file(load_file(run_dir / "model.safetensors"), run_dir / "model.safetensors", metadata)
    command = ["adapt", "debug", f"run_dir={tmp_path}/new", f"phase1={run_dir.parent}", "runtime.mixed_precision=no"]
    assert main(command) == 4
    assert_sentence(capsys.readouterr().err, "model.safetensors", "is not the model that", "calibration.safetensors")


@pytest.mark.parametrize("phase", [1, 2])
def test_a_flipped_bit_in_a_calibration(debug_run, tmp_path, capsys, phase):
    run_dir, images = shutil.copytree(debug_run, tmp_path / "run"), write_images(tmp_path / "images", 1)
    flip_a_weight(run_dir / f"phase{phase}" / "calibration.safetensors")
    command = ["score", str(run_dir), str(images), "--out", str(tmp_path / "out"), "--phase", str(phase)]
    assert main(command) == 4
    assert_sentence(capsys.readouterr().err, "calibration.safetensors", "not those that were written")
    assert main(["inspect", str(run_dir)]) == 4
    assert "not those that were written" in capsys.readouterr().err


def test_an_adapter_that_is_gone(debug_run, tmp_path, capsys):
    run_dir, images = shutil.copytree(debug_run, tmp_path / "run"), write_images(tmp_path / "images", 1)
    shutil.rmtree(run_dir / "phase2" / "adapter")
    command = ["score", str(run_dir), str(images), "--out", str(tmp_path / "out")]
    assert main(command) == 4
    assert_sentence(capsys.readouterr().err, "adapter' is gone", "phase 1 to do without it")
    assert main([*command, "--phase", "1"]) == 0


def test_damage_in_a_process_of_its_own(debug_run, tmp_path):
    shutil.copy(debug_run / "phase1" / "model.safetensors", tmp_path)
    cut(tmp_path / "model.safetensors")
    shutil.copytree(debug_run, tmp_path / "run")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "run" / "phase1" / "model.safetensors")
    done = launch(["score", tmp_path / "run", write_images(tmp_path / "images", 1), "--out", tmp_path / "scores"])
    assert done.returncode == 4
    assert_sentence(done.stderr, "model.safetensors", "restore it")


def test_adapter_of_another_base(debug_run, tmp_path, capsys, fresh_accelerate):
    """Two runs that differ in their seed alone: neither takes the other's adapter."""
    command = ["train", "debug", f"run_dir={tmp_path}/other", "seed=1", "runtime.mixed_precision=no"]
    assert main([*command, "data.imagenet.num_epochs=1"]) == 0
    capsys.readouterr()
    images = write_images(tmp_path / "images", 1)
    adapter = debug_run / "phase2" / "adapter"
    asked = ["score", str(tmp_path / "other"), str(images), "--out", str(tmp_path / "out"), "--adapter", str(adapter)]
    assert main(asked) == 4
    assert_sentence(capsys.readouterr().err, "adapter", "was trained on another base")


def test_trajectories_of_another_run(debug_run, tmp_path, capsys, fresh_accelerate):
    """A model beside the projection of another run meets noise: refused."""
    command = ["train", "debug", f"run_dir={tmp_path}/other", "trajectory.projection=random"]
    assert main([*command, "runtime.mixed_precision=no", "data.imagenet.num_epochs=1"]) == 0
    shutil.copy(debug_run / "phase1" / "trajectory.safetensors", tmp_path / "other" / "phase1")
    capsys.readouterr()
    command = ["adapt", "debug", f"run_dir={tmp_path}/new", f"phase1={tmp_path}/other", "runtime.mixed_precision=no"]
    assert main(command) == 4
    assert_sentence(capsys.readouterr().err, "model.safetensors")


def test_a_run_with_subcells(debug_run, tmp_path, capsys, fresh_accelerate):
    """From training to the depth profile; Phase 2 keeps to what Phase 1 has."""
    run_dir, images = tmp_path / "run", write_images(tmp_path / "images", 2)
    fixed = ["runtime.mixed_precision=no", "data.imagenet.num_epochs=1", "data.domain.num_epochs=1"]
    assert (
        main(["run", "debug", f"run_dir={run_dir}", "trajectory.subcells=2", "memory.images_per_pass=3", *fixed]) == 0
    )
    assert main(["score", str(run_dir), str(images), "--out", str(tmp_path / "out"), "--explain"]) == 0
    names = list(read_rows(tmp_path / "out")[0]["blocks"])
    assert names[:3] == ["layer1.0 2 x 2", "layer1.0", "layer1.1 2 x 2"]
    assert names[-2:] == ["layer4.0", "layer4.1"]
    assert len(names) == 12
    capsys.readouterr()
    adapt = ["adapt", "debug", f"phase1={debug_run}", f"run_dir={tmp_path}/new", *fixed]
    assert main([*adapt, "trajectory.subcells=2"]) == 2
    assert_sentence(capsys.readouterr().err, "trajectory.subcells=2", "has 1")
    # Nothing has come of the wrong command.
    assert main(adapt) == 0


@pytest.mark.parametrize(("resolution", "subcells"), [(4, 16), (1, 16)])
def test_subcells_that_cannot_be(tmp_path, capsys, fresh_accelerate, resolution, subcells):
    overrides = [f"trajectory.subcells={subcells}", f"model.spatial_resolution={resolution}"]
    assert main(["train", "debug", f"run_dir={tmp_path}/run", *overrides]) == 2
    assert_sentence(capsys.readouterr().err, *overrides)


def test_a_key_that_an_older_version_did_not_know(debug_run, tmp_path, capsys, fresh_accelerate):
    """It was as its default: another value is a change."""
    shutil.copytree(debug_run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    known = yaml.safe_load(config.read_text())
    del known["trajectory"]["subcells"]
    config.write_text(yaml.safe_dump(known))
    command = ["run", "debug", f"run_dir={tmp_path}/run", "runtime.mixed_precision=no"]
    assert main([*command, "trajectory.subcells=2"]) == 2
    assert_sentence(capsys.readouterr().err, "trajectory.subcells=2", "began with 1")
    assert main(command) == 0


def test_files_of_older_versions_can_be_read(debug_run):
    """From before there were sub-cells, and with globs that nothing reads any more."""
    document = read_document(debug_run / "phase1" / "trajectory.safetensors")
    assert document.pop("subcells") == 1
    read = TrajectoryDocument.model_validate({**document, "patterns": ["layer*"]})
    assert read.subcells == 1
    assert "patterns" not in {**document, **read.model_dump()}


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_domain_whose_path_is_no_text(tmp_path):
    """Linux allows any bytes in a path; the adapter's card shows what it can."""
    domain = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_images(domain, 8)
    run_dir = tmp_path / "run"
    assert main(["run", "debug", f"run_dir={run_dir}", f"data.domain.path={domain}"]) == 0
    assert "caf" in (run_dir / "phase2/adapter/README.md").read_text()
