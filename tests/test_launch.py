"""The scripts of launch/: what they print and start, and that they run to the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from jobs import REPOSITORY, environment
from outcome import assert_done, read

LAUNCH = REPOSITORY / "launch"
# environment.sh is sourced by the others.
SCRIPTS = [path.name for path in sorted(LAUNCH.glob("*.s*")) if path.name != "environment.sh"]
# A run of both phases, as small as it gets.
TINY = ("data.imagenet.num_samples=16", "data.imagenet.num_epochs=1", "data.domain.num_epochs=1")
# Stands for a program: says what it was started with, and answers what the scripts ask.
STAND_IN = f"""#!/usr/bin/env bash
case "${{0##*/}} $1" in
  "trajdist config") echo "{{run_dir: runs/it, phase1: null}}" ;;
  "scontrol show") echo first ;;
  "scontrol -o") echo "JobId=1 JobState=RUNNING Reason=None" ;;
  "python -c") exec {sys.executable} "$@" ;;
  "python -") cat > /dev/null ;;
  *) echo "${{0##*/}} $* OMP_NUM_THREADS=$OMP_NUM_THREADS" ;;
esac
if [ "${{0##*/}}" = "${{BROKEN:-}}" ]; then exit 1; fi
"""
PROGRAMS = ("accelerate", "mypy", "python", "ruff", "scontrol", "srun", "trajdist")
# What Slurm sets in the first job of an array, with two nodes.
SLURM = {
    "SLURM_JOB_ID": "20007",
    "SLURM_ARRAY_JOB_ID": "20007",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_SUBMIT_DIR": str(REPOSITORY),
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_CPUS_ON_NODE": "64",
}


def bash(
    script: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=environment({"TRAJDIST_VENV": sys.prefix, **(env or {})}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def stand_ins(tmp_path) -> dict[str, str]:
    """An environment whose programs only say what they were started with."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name in PROGRAMS:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return {"TRAJDIST_VENV": str(folder.parent)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, tmp_path):
    """From any folder, and without making an environment."""
    done = bash(script, "--help", env={"TRAJDIST_VENV": str(tmp_path)}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script}" in done.stdout
    assert "#" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_says_what_it_runs_and_passes_unknown_options_on(script, stand_ins):
    first = {"quickstart.sh": [], "test.sh": [], "slurm_array.sbatch": ["debug", "/data/one"]}.get(script, ["debug"])
    slurm = SLURM if script.endswith(".sbatch") else {}
    done = bash(script, *first, "--fresh", "--unheard-of=1", "seed=2", env={**stand_ins, **slurm, "NUM_PROCESSES": "2"})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "--fresh --unheard-of=1 seed=2" in line]
    assert lines[0].startswith("+ ")
    assert not lines[-1].startswith("+ ")


def test_a_precision_that_was_asked_for_is_not_that_of_the_config(stand_ins):
    settings = {"NUM_PROCESSES": "2", "ACCELERATE_USE_CPU": "", "ACCELERATE_MIXED_PRECISION": "fp16"}
    done = bash("multi_gpu.sh", "debug", env={**stand_ins, **settings})
    assert "--num_processes 2 --mixed_precision fp16 -m trajdist run debug" in done.stdout


def test_an_interrupt_ends_the_tests_in_the_background_too(tmp_path, stand_ins):
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f"#!/usr/bin/env bash\necho $$ >> {tmp_path}/started\nexec sleep 60\n")
    started = tmp_path / "started"
    # A job in the background ignores SIGINT, and so would all that it starts.
    hears = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', sys.argv)"
    command = [sys.executable, "-c", hears, LAUNCH / "test.sh"]
    job = subprocess.Popen(command, env=environment(stand_ins), start_new_session=True)
    try:
        while not started.exists() or len(started.read_text().split()) < 2:
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(20) == 130
        for pid in started.read_text().split():
            wait_until_gone(int(pid))
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def wait_until_gone(pid: int, timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, f"{pid} lives"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, ["--num_processes 16", "OMP_NUM_THREADS=8", "--mixed_precision bf16"]),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "32"}, ["--cpus-per-task=32", "OMP_NUM_THREADS=4"]),
        ({"NUM_PROCESSES_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "2"}, ["--num_processes 8", "OMP_NUM_THREADS=1"]),
        ({"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "4"}, ["--num_machines 1", "--num_processes 4"]),
        ({}, ["--ntasks=2", "--num_machines 2", "--num_processes 2", "--main_process_ip first", "_port 10007"]),
    ],
)
def test_a_slurm_job_uses_what_it_was_given(settings, expected, stand_ins):
    on_cpu = {} if "SLURM_GPUS_ON_NODE" in settings else {"ACCELERATE_USE_CPU": "true"}
    done = bash("slurm.sbatch", "debug", env={"ACCELERATE_USE_CPU": "", **stand_ins, **SLURM, **settings, **on_cpu})
    started = done.stdout.splitlines()[-1]
    assert started.startswith("srun ")
    assert [part for part in expected if part not in started] == []
    assert ("--mixed_precision no" in started) == bool(on_cpu)


def test_one_process_in_all_needs_no_launcher(stand_ins):
    done = bash("slurm.sbatch", "debug", env={**stand_ins, **SLURM, "SLURM_NNODES": "1"})
    assert "accelerate" not in done.stdout
    assert "trajdist run debug" in done.stdout


def test_a_job_whose_nodes_do_not_answer_comes_back(stand_ins):
    """Processes that lost a peer may end before Slurm knows that its node is gone."""
    done = bash("slurm.sbatch", "debug", env={**stand_ins, **SLURM, "BROKEN": "srun"})
    assert done.returncode == 1
    assert "+ scontrol requeue 20007_0 (lost a node)" in done.stdout
    assert "scontrol requeue 20007_0 OMP" in done.stdout


@pytest.mark.parametrize("stopped", [True, False])
def test_a_job_that_was_stopped_comes_back_whatever_the_clocks_say(stopped, stand_ins, tmp_path):
    """The node that trains has its clock behind; a status of the start before this one does not count."""
    folder, told = Path(stand_ins["TRAJDIST_VENV"]) / "bin", tmp_path / "status.json"
    told.write_text('{"status": "stopped", "why": "received SIGTERM", "time": 8.0}\n')
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "trajdist").write_text(f"#!/bin/sh\necho run_dir: {tmp_path}\n")
    told_now = told.read_text().replace("8.0", "9.0") if stopped else told.read_text()
    (folder / "srun").write_text(f"#!/bin/sh\necho '{told_now}' > {told}\n")
    done = bash("slurm.sbatch", "debug", env={**stand_ins, **SLURM})
    assert ("+ scontrol requeue 20007_0 (told by Slurm)" in done.stdout) == stopped
    assert done.returncode == (75 if stopped else 0), done.stderr


def test_each_task_has_its_own_domain(stand_ins, tmp_path):
    """Lines of a file and folders, in their order; an index without one is refused."""
    (tmp_path / "domains.txt").write_text("/data/a b/train\n\n/data/c/train\n")
    arguments = ["debug", str(tmp_path / "domains.txt"), "relative/d", "seed=1"]
    for task, (path, name) in enumerate([("a\\ b/train", "a-b-train"), ("c/train", "c-train")]):
        done = bash("slurm_array.sbatch", *arguments, env={**stand_ins, **SLURM, "SLURM_ARRAY_TASK_ID": str(task)})
        expected = f"phase1=runs/it data.domain.path=/data/{path} run_dir=runs/it/domains/data-{name}"
        assert expected in done.stdout.splitlines()[0]
        assert "trajdist adapt debug" in done.stdout
    done = bash("slurm_array.sbatch", *arguments, env={**stand_ins, **SLURM, "SLURM_ARRAY_TASK_ID": "3"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "--array=0-2" in done.stderr


@pytest.mark.parametrize("other", ["/data/tile-v1", "/data/tile v1", "/data/tile/v1/"])
@pytest.mark.parametrize("task", ["0", "1", "2"])
def test_domains_that_would_share_a_run_directory_are_refused(stand_ins, other, task):
    domains = ["/data/tile/v1", "/data/c", other]
    done = bash("slurm_array.sbatch", "debug", *domains, env={**stand_ins, **SLURM, "SLURM_ARRAY_TASK_ID": task})
    assert (done.returncode, done.stdout) == (2, "")
    told = f"The domains '/data/tile/v1' and '{other}' would both go to domains/data-tile-v1: rename one of the"
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_array.sbatch"])
def test_outside_of_slurm_it_says_how_to_submit(script, stand_ins):
    done = bash(script, "debug", "/data/one", env=stand_ins)
    assert done.returncode == 2
    assert "sbatch " in done.stderr


def test_the_quickstart_runs_to_the_end(tmp_path):
    """The README's first command, small; its run directory as a shell passes it on that leaves ``~`` alone."""
    small = ("data.image_size=64", "model.spatial_resolution=4")
    done = bash("quickstart.sh", "run_dir=~/first", *TINY, *small, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert_done(tmp_path / "first")
    assert read(tmp_path / "first" / "evaluation", "metrics.json")["num_good"] == 36
    assert (tmp_path / "first" / "evaluation" / "report.html").is_file()
    assert not (REPOSITORY / "~").exists()


def test_debug_runs_to_the_end(tmp_path):
    done = bash("debug.sh", f"run_dir={tmp_path / 'run'}", *TINY)
    assert (done.returncode, done.stderr) == (0, "")
    assert_done(tmp_path / "run")


def test_multi_gpu_runs_to_the_end_on_the_cpu(tmp_path):
    done = bash("multi_gpu.sh", "debug", f"run_dir={tmp_path / 'run'}", *TINY, env={"NUM_PROCESSES": "2"})
    assert done.returncode == 0, done.stderr
    assert_done(tmp_path / "run")
    assert read(tmp_path / "run", "summary.json")["phase2"]["num_processes"] == 2


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    files = [*LAUNCH.glob("*.s*"), REPOSITORY / ".ci" / "run", *(REPOSITORY / "tests").glob("*/*.sh")]
    command = ["shellcheck", "--external-sources", *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
