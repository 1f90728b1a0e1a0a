"""The documentation: it builds without a warning, its commands run, its tables are current, its quotations real."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import noise, write_images
from jobs import REPOSITORY, launch

from trajdist.cli import build_parser, main
from trajdist.config_files import load_config
from trajdist.tools import export

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
TRAINING = ("run", "train", "adapt", "plan")
# An export takes seconds for each block.
SMALL = ("debug", "runtime.mixed_precision=no", "backbone.blocks=[layer1.1, layer2.1]")
# What has tests of its own, or belongs to the shell.
ELSEWHERE = ("source", "pip", "bash launch/quickstart.sh", "bash launch/test.sh", "bash launch/debug.sh")


def commands(page: Path) -> Iterator[str]:
    """Every line of the bash blocks of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return (line for line in lines if line and not line.startswith(("#", *ELSEWHERE)))


COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.fixture(scope="module")
def made() -> set[tuple[str, str]]:
    """Which page's commands have written to which output, so far."""
    return set()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder in which the pages' paths mean something; /data is the folder data in it."""
    folder = tmp_path_factory.mktemp("workspace")
    trained = tmp_path_factory.mktemp("small") / "run"
    assert main(["run", *SMALL, f"run_dir={trained}"]) == 0
    for name in ("mine", "a", "b", "base", "quickstart"):
        shutil.copytree(trained, folder / "runs" / name)
    for name in ("plant", "plant/domains/road", "plant/domains/gravel"):
        shutil.copytree(trained, folder / "runs" / name, dirs_exist_ok=True)
    for name in ("imagenet/train", "mine", "new", "road", "gravel"):
        write_images(folder / "data" / name, 24)
    done = launch(["skimage:gravel/heldout", folder / "data" / "labelled"], module="trajdist.data.defects")
    assert done.returncode == 0, done.stderr
    (folder / "domains.txt").write_text(f"{folder}/data/mine\n")
    return folder


def arguments(command: str, workspace: Path) -> list[str]:
    """Those of the trajdist command in a line, its launcher left out, its paths in the workspace, small."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[0] == "sbatch" or words[:2] == ["bash", "launch/multi_gpu.sh"]:
        script = next(number for number, word in enumerate(words) if word.startswith("launch/"))
        assert (REPOSITORY / words[script]).is_file()
        words = ["run", *[word for word in words[script + 1 :] if not word.endswith(".txt")]]
    elif words[0] in ("accelerate", "srun"):
        assert words[0] == "srun" or words[1] == "launch"
        words = words[words.index("trajdist") + 1 :]
    else:
        assert words[0] == "trajdist", f"nothing here knows how to try {command!r}"
        words = words[1:]
    if words[0] in TRAINING:
        load_config(words[1], [word for word in words[2:] if "=" in word and not word.startswith("--")])
        one_domain = ["data.domain.path=null"] if "data.domains." in command else []
        words[1:2] = [*SMALL, *one_domain]
        words += ["--no-probe"] if words[0] == "plan" else []
    return [word.replace("/data/", f"{workspace}/data/") for word in words]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_commands(page, command, workspace, made, monkeypatch, fresh_accelerate):
    """Every command runs, after those above it on its page: those that train with the debug config, in one process."""
    monkeypatch.chdir(workspace)
    if command.startswith("python -m trajdist.data.defects"):
        done = launch(shlex.split(command)[3:], module="trajdist.data.defects", cwd=workspace)
        assert done.returncode == 0, done.stderr
        return
    words = arguments(command, workspace)
    parsed = build_parser().parse_args(words)
    out = getattr(parsed, "out", None)
    if out and (page, out) not in made:  # What another page has made.
        made.add((page, out))
        shutil.rmtree(out, ignore_errors=True)
    if words[0] in TRAINING and not any(word.startswith("run_dir=") for word in words):
        words.insert(2, f"run_dir={workspace / 'runs' / str(abs(hash(command)))}")
    elif words[0] in ("run", "train", "adapt"):
        words.append("--fresh")
    assert main(words) == 0


def test_there_are_commands_of_every_kind(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    tried = [arguments(command, Path("/")) for _, command in COMMANDS if "data.defects" not in command]
    kinds = {build_parser().parse_args(words).command.__name__ for words in tried}
    assert kinds >= {"_train", "_plan", "_score", "_evaluate", "_audit", "_inspect", "_pack", "_export", "_merge"}


@pytest.mark.parametrize("name", [page.name for page in PAGES if "```python" in page.read_text()])
def test_python_examples_run(name, workspace, tmp_path, monkeypatch, fresh_accelerate):
    """The examples of a page one after another, with a picture called ``image`` as some of them say."""
    page = next(page for page in PAGES if page.name == name)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    shutil.copytree(workspace / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    noise(0).save("part.jpg")
    if name == "export.md":
        for kind, file in export.FILES.items():
            # The page's commands have made them already, unless this test runs alone.
            assert Path("runs/mine", file).exists() or main(["export", "runs/mine", "--format", kind]) == 0
    if name == "api.md":
        assert main(["score", "runs/mine", str(workspace / "data" / "new"), "--out", "found"]) == 0
    names = {"image": noise(0)}
    for block in blocks:
        if "huggingface_hub" in block:  # There is no network.
            compile(block, name, "exec")
        else:
            exec(block, names)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page.parent.name for page in (tmp_path / "site").rglob("index.html")}
    assert {"idea", "configuration", "faq", "comparison", "architecture"} <= pages
    assert "imports point down" in (tmp_path / "site" / "architecture" / "index.html").read_text()


def test_the_configuration_page_is_current():
    spec = importlib.util.spec_from_file_location("config_table", DOCS / "config_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "configuration.md").read_text() == module.page(), "python docs/config_table.py --page"


def test_the_errors_in_the_faq_are_in_the_code():
    source = " ".join(path.read_text() for path in sorted((REPOSITORY / "trajdist").rglob("*.py")))
    # A sentence in the code is cut into strings, with fields in it.
    source = re.sub(r'"\s+f?"', "", source)
    rows = [line.split("|")[1] for line in (DOCS / "faq.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) > 8
    for row in rows:
        for quotation in re.findall(r"`([^`]+)`", row):
            assert quotation in source, f"no error says {quotation!r}"


def test_pictures_are_small():
    pictures = sorted(DOCS.glob("*.png"))
    assert {"tour-maps.png", "tour-scores.png", "tour-training.png"} <= {picture.name for picture in pictures}
    assert all(picture.stat().st_size < 300_000 for picture in pictures)
