"""Processes that do not fit together are told apart before anything is written; a restarted launcher goes on."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from images import write_images
from jobs import REPOSITORY, Finished, environment, launch
from outcome import assert_done, assert_same_bits
from torch.distributed.distributed_c10d import PrefixStore

from trajdist import launcher
from trajdist.config_files import load_config
from trajdist.errors import ConfigError, TrainingError
from trajdist.runtime import preflight, processes
from trajdist.runtime.preflight import Meeting, check_all_reduce

TESTS = REPOSITORY / "tests"
HOST = socket.gethostname()


def arguments(run_dir: Path, *overrides: str) -> list[str]:
    fixed = ["runtime.mixed_precision=no", "checkpoint.every_steps=2", "data.num_workers=0"]
    return ["run", "debug", f"run_dir={run_dir}", *fixed, *overrides]


def run(peculiar: str, run_dir: Path, *overrides: str, world: int = 2, **options) -> Finished:
    env = {"PYTHONPATH": f"{REPOSITORY}:{TESTS}", "PECULIAR": peculiar, "SUM_S": "5"}
    return launch(arguments(run_dir, *overrides), world, env=env, module="peculiar", timeout_s=100, **options)


def assert_refused(done: Finished, sentence: str, run_dir: Path) -> None:
    """Said once, by the main process, before anything was written."""
    assert done.returncode != 0
    assert done.stderr.count(sentence) == 1, done.stderr
    # The launcher has a traceback of its own, the processes have none.
    assert "open_session" not in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("peculiar", "sentence"),
    [
        (
            "2:config:data.imagenet.batch_size=16",
            f"trajdist: process 2 on {HOST}: config data.imagenet.batch_size is 16, process 0 has 8: "
            "start all processes with the same command.",
        ),
        (
            "1:version:0.0.1",
            f"trajdist: process 1 on {HOST}: trajdist is '0.0.1', process 0 has",
        ),
        (
            "1:device:cuda",
            f"trajdist: process 1 on {HOST}: device is 'cuda', process 0 has 'cpu': give all processes the same kind",
        ),
    ],
    ids=["config", "version", "device"],
)
def test_a_process_that_differs_is_named(peculiar, sentence, tmp_path):
    assert_refused(run(peculiar, tmp_path / "run", world=3), sentence, tmp_path / "run")


def test_other_images_behind_the_same_path(tmp_path):
    """As on a machine where the folder was copied before it was complete."""
    write_images(tmp_path / "here" / "images", 5)
    write_images(tmp_path / "there" / "images", 4)
    run_dir = tmp_path / "run"
    done = run(
        f"1:folder:{tmp_path / 'there'}", run_dir, "data.imagenet.path=images", "data.domain.path=images",
        cwd=tmp_path / "here",
    )  # fmt: skip
    sentence = "number of images in data.imagenet.path is 4, process 0 has 5: let all machines see the same files."
    assert_refused(done, f"trajdist: process 1 on {HOST}: {sentence}", run_dir)


def test_a_process_that_never_comes_is_named(tmp_path):
    done = run("1:late", tmp_path / "run", "runtime.timeout_s=3")
    assert done.returncode != 0
    assert "trajdist: process 1 did not answer within 3 seconds of the start: check that machine" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_main_process_that_never_comes_is_named(tmp_path):
    done = run("0:late", tmp_path / "run", "runtime.timeout_s=2")
    assert done.returncode != 0
    assert "trajdist: [process 1] process 0 did not answer within 2 seconds of the start" in done.stderr


def test_a_sum_that_does_not_end(tmp_path):
    done = run("1:stuck", tmp_path / "run")
    assert done.returncode != 0
    assert "the first sum over gloo did not end within 5 seconds: check the network" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("local_rank", "mend"), [(None, "set LOCAL_RANK"), ("0", "set ACCELERATE_USE_CPU=true")])
def test_processes_that_accelerate_takes_for_one_each(local_rank, mend, monkeypatch):
    """Without a launcher, or on a machine without a GPU."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ConfigError, match=f"sees 1 processes where WORLD_SIZE is 2: .*{mend}"):
        check_all_reduce(SimpleNamespace(world=1))


def test_a_sum_that_is_wrong(tmp_path):
    done = run("0:wrong", tmp_path / "run")
    assert done.returncode != 0
    assert "trajdist: the first sum over gloo is 4 instead of 3: check the network" in done.stderr
    assert not (tmp_path / "run").exists()


STEP = {"SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("variables", "world", "alone"),
    [
        ({}, 1, False),
        ({**STEP, **ELASTIC, "GROUP_WORLD_SIZE": "2"}, 16, False),
        # Each node trains by itself: --num_machines 1, or --cpu, with which the launcher forgets the other machines.
        ({**STEP, **ELASTIC, "GROUP_WORLD_SIZE": "1"}, 8, True),
        ({**STEP, "ACCELERATE_DYNAMO_BACKEND": "no"}, 1, True),
        # One task, although there is more in the allocation; or the batch script itself.
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NNODES": "4", "ACCELERATE_DYNAMO_BACKEND": "no"}, 1, False),
        ({"SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", **ELASTIC, "GROUP_WORLD_SIZE": "1"}, 8, False),
        # srun starts every process, without a launcher; or independent ones.
        ({**STEP, "RANK": "0", "WORLD_SIZE": "2"}, 2, False),
        (STEP, 1, False),
    ],
)
def test_launchers_that_did_not_find_each_other(variables, world, alone, monkeypatch):
    for name in (*STEP, *ELASTIC, "GROUP_WORLD_SIZE", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert bool(launcher.slurm_problem(world)) == alone


@pytest.mark.parametrize(
    ("gpus", "started", "visible", "crowded"),
    [(2, 2, None, False), (2, 4, None, True), (2, 4, "0,1", True), (1, 2, None, True), (1, 8, "5", False)],
)
def test_more_processes_than_gpus(gpus, started, visible, crowded, monkeypatch):
    """Where each process sees one GPU that was chosen for it, all is well."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(processes, "device_type", lambda: "cuda")
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, str(started))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sentence = difference({"host": HOST, "crowd": processes.crowd()})
    says = f"{started} processes were started on {HOST}, where they see {gpus} GPU"
    assert (says in sentence) == crowded
    if crowded:  # Scoring has no such meeting beforehand.
        with pytest.raises(ConfigError, match=says):
            processes.start_accelerator("no", 1.0, deterministic=False)


def difference(*facts: dict[str, str]) -> str:
    meeting = SimpleNamespace(ranks=range(len(facts)), see=lambda what, rank: facts[rank])
    return next(preflight._differences(meeting), "")


def test_an_older_version_is_named_though_it_says_less():
    older, newer = {"host": HOST, "trajdist": "0.0.1"}, {"host": HOST, "crowd": "", "trajdist": "1"}
    assert "trajdist is '0.0.1', process 0 has '1'" in difference(newer, older)
    assert difference(newer, newer | {"host": "other"}) == ""


def difference_of_domains(mine: list[str], theirs: list[str]) -> str:
    """Between two processes whose commands name these domains."""
    shown = []
    for names in (theirs, mine):
        domains = [f"data.domains.{name}.path=skimage:{name}" for name in names]
        config = load_config("debug", ["data.domain.path=null", *domains])
        shown.append(preflight._facts(config, {}, 2))
    return difference(*shown)


def test_a_domain_too_many_and_domains_in_another_order():
    """Either way their sums would be those of different domains."""
    more = difference_of_domains(["brick", "grass"], ["brick"])
    assert more.startswith(f"process 1 on {HOST}: config data.domains.grass.")
    assert "process 0 has None: start all processes with the same command." in more
    fewer = difference_of_domains(["brick"], ["brick", "grass"])
    assert fewer.startswith(f"process 1 on {HOST}: config data.domains.grass.")
    order = difference_of_domains(["grass", "brick"], ["brick", "grass"])
    assert "order of data.domains is ['grass', 'brick'], process 0 has ['brick', 'grass']" in order
    assert difference_of_domains(["grass", "brick"], ["grass", "brick"]) == ""


@pytest.mark.parametrize(
    ("last", "mend"),
    [
        ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000", "start one process for each GPU"),
        ("Cuda failure 'out of memory'", "end other programs"),
        ("socketStartConnect: Connect to 10.0.0.1 failed", "check the network"),
    ],
)
def test_the_first_sum_fails_for_a_reason(last, mend, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    error = torch.distributed.DistBackendError(f"NCCL error in: {'x' * 200}\nLast error:\n{last}")
    with pytest.raises(TrainingError, match=rf"the first sum over nccl failed \({re.escape(last)}\): {mend}"):
        preflight._check_sum(SimpleNamespace(world=2), error)


def test_what_nccl_left_of_a_dead_attempt_is_cleared(monkeypatch):
    """Its watchdogs read a key without any prefix, and would end the processes of the next attempt."""
    store = torch.distributed.HashStore()
    store.set("exception_dump", "1")
    monkeypatch.setattr(Meeting, "_connect", lambda meeting: PrefixStore("b", PrefixStore("a", store)))
    Meeting(rank=0, world=1, deadline_s=5)
    assert not store.check(["exception_dump"])


def test_the_machines_that_the_launcher_forgot(tmp_path):
    """``accelerate launch --cpu --num_machines 2`` runs the job twice."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "2"]
    launcher += ["--machine_rank", "0", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    launcher += ["--main_process_port", "29999", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, "-m", "trajdist", *arguments(tmp_path / "run")]
    done = subprocess.run(command, env=environment(STEP), capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "Slurm started 2 launchers (SLURM_STEP_NUM_TASKS), but only 1 joined this run of 1 process" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_launcher_restarts_what_was_killed(tmp_path):
    """``--max_restarts 1``: one SIGKILL, and the end is as if nothing had happened."""
    reference = run("", tmp_path / "reference")
    assert reference.returncode == 0, reference.stderr
    run_dir = tmp_path / "run"
    done = run(f"1:killed:{run_dir}", run_dir, launcher_options=["--max_restarts", "1"])
    assert done.returncode == 0, done.stderr
    assert "resuming after" in done.stdout
    assert_done(run_dir)
    assert_same_bits(run_dir, tmp_path / "reference")
