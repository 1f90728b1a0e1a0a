"""What a user installs: the wheel has all it needs, hooks are CI's commands, and examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from images import noise
from jobs import REPOSITORY

import trajdist

PACKAGE = Path(trajdist.__file__).parent
DOCTESTED = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
    if "configs" not in file.parts and ">>>" in file.read_text()
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing of it stays in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in files.splitlines():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPOSITORY / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="the list of files is git's")
def test_the_wheel_is_whole_and_runs_from_anywhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    wanted = {f"trajdist/{file.relative_to(PACKAGE)}" for file in PACKAGE.rglob("*.py")}
    wanted |= {f"trajdist/configs/{file.name}" for file in (REPOSITORY / "configs").glob("*.yaml")}
    assert wanted | {"trajdist/py.typed", "trajdist/scoring/report.html"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs", "launch"))]
    (tmp_path / "empty").mkdir()
    code = "import trajdist.cli as cli; print(cli.__file__); cli.main(['config', 'quickstart'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "site") in done.stdout
    assert "efficientnet_lite0" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_runs_the_quickstart_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    programs, empty = tmp_path / "venv" / "bin", tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    commands = (
        [programs / "pip", "install", "--quiet", f"{wheel}[quickstart]"],
        [programs / "trajdist", "run", "quickstart"],
        [programs / "python", "-m", "trajdist.data.defects", "skimage:gravel/heldout", "heldout"],
        [programs / "trajdist", "evaluate", "runs/quickstart", "heldout", "--out", "evaluation"],
    )
    for command in commands:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (empty / "evaluation" / "report.html").is_file()


def test_the_hooks_are_the_commands_of_the_test_script():
    script = (REPOSITORY / "launch" / "test.sh").read_text().replace('"$venv"/bin/', "")
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert len(hooks) == 4
    for hook in hooks:
        assert re.sub(r"^env \S+ ", "", hook["entry"]) in script


@pytest.mark.parametrize("module", DOCTESTED)
def test_examples_in_docstrings(module, debug_run):
    names = {"run_dir": debug_run, "image": noise(0, 100)}
    failures, tried = doctest.testmod(importlib.import_module(module), extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert failures == 0
    assert tried


def test_all_that_is_public_has_an_example_and_a_place_in_the_docs():
    page = (REPOSITORY / "docs" / "api.md").read_text()
    assert {"trajdist", "trajdist.scoring.scorer"} <= set(DOCTESTED)
    for name in trajdist.__all__:
        assert f"`trajdist.{name}" in page
        assert getattr(trajdist, name).__doc__
