"""launch/slurm.sbatch and launch/slurm_array.sbatch on a real Slurm of two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import ONE_NODE, TWO_NODES, Cluster, Submitted, training
from outcome import assert_done, assert_same_bits, read

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def begin(cluster: Cluster, folder: Path, *overrides: str, options: tuple[str, ...] = TWO_NODES) -> Submitted:
    """Submit a run and wait until it trains."""
    job = cluster.submit(folder / "log", *options, *training(folder / "run", *overrides))
    job.wait_for((folder / "run" / "ledger.jsonl").exists)
    return job


def test_two_nodes(uninterrupted):
    job, run_dir = uninterrupted
    assert job.record()["JobState"] == "COMPLETED", job.told()
    assert job.record()["Restarts"] == "0"
    assert {phase["num_processes"] for phase in read(run_dir, "summary.json").values()} == {2}
    assert_done(run_dir)
    printed = job.log.read_text()
    assert "+ srun --ntasks=2" in printed
    assert printed.count("files are in") == 1


def test_two_processes_on_each_of_two_nodes(cluster, tmp_path):
    job = cluster.submit(
        tmp_path / "log",
        *TWO_NODES,
        *training(tmp_path / "run", "data.imagenet.num_epochs=2"),
        env={"NUM_PROCESSES_PER_NODE": "2"},
    )
    assert job.end()["JobState"] == "COMPLETED", job.told()
    summary = read(tmp_path / "run", "summary.json")
    assert {name: phase["num_processes"] for name, phase in summary.items()} == {"phase1": 4}
    assert_done(tmp_path / "run")


def test_warned_it_saves_and_comes_back(cluster, uninterrupted, tmp_path):
    job = begin(cluster, tmp_path)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for(lambda: job.record()["JobState"] == "PENDING")
    assert read(tmp_path / "run", "status.json")["status"] == "stopped"
    record = job.end()
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), job.told()
    assert "resuming after" in job.log.read_text()
    assert_same_bits(tmp_path / "run", uninterrupted[1])


def test_a_cancelled_job_stays_away(cluster, tmp_path):
    """It saves what it has: the same command submitted again would go on."""
    job = begin(cluster, tmp_path, options=ONE_NODE)
    cluster.run("scancel", job.number)
    record = job.end()
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), job.told()
    job.wait_for(lambda: read(tmp_path / "run", "status.json")["status"] == "stopped")


def test_a_job_told_by_a_stop_file_stays_away(cluster, tmp_path):
    job = begin(cluster, tmp_path, options=ONE_NODE)
    (tmp_path / "run" / "STOP").touch()
    record = job.end()
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "75:0", "0"), job.told()
    assert read(tmp_path / "run", "status.json")["status"] == "stopped"


def test_a_job_that_fails_stays_away(cluster, tmp_path):
    job = cluster.submit(tmp_path / "log", *ONE_NODE, *training(tmp_path / "run", "data.imagenet.path=/nowhere"))
    record = job.end()
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "3:0", "0"), job.told()


def test_a_node_that_loses_power(cluster, uninterrupted, tmp_path):
    """The job comes back when the node does."""
    job = begin(cluster, tmp_path)
    job.wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*")))
    cluster.power_off("n2")
    try:
        job.wait_for(lambda: job.record()["Restarts"] == "1")
    finally:
        cluster.power_on("n2")
    # The signals that ended the first start's steps, 0 and 1, are still on their way to n2.
    job.wait_for(lambda: f"StepId={job.number}.2 " in cluster.run("scontrol", "show", "steps"))
    assert job.end()["JobState"] == "COMPLETED", job.told()
    assert_same_bits(tmp_path / "run", uninterrupted[1])


def test_an_array_adapts_to_each_domain(cluster, uninterrupted, tmp_path):
    """One adapter each, on one Phase 1; a task that is warned comes back, and the other is left alone."""
    domains = tmp_path / "domains.txt"
    domains.write_text("skimage:gravel\n\nskimage:grass\n")
    script = ["--array=0-1", "--nodes=1", "launch/slurm_array.sbatch"]
    settings = [*training(tmp_path / "run"), f"phase1={uninterrupted[1]}", "data.domain.num_epochs=8"]
    array = cluster.submit(tmp_path / "log-%a", *script, settings[0], domains, *settings[1:])
    runs = [tmp_path / "run" / "domains" / name for name in ("skimage-gravel", "skimage-grass")]
    tasks = [Submitted(cluster, f"{array.number}_{number}", tmp_path / f"log-{number}") for number in range(2)]
    tasks[1].wait_for((runs[1] / "ledger.jsonl").exists)
    cluster.run("scancel", "--batch", "--signal=USR1", tasks[1].number)
    tasks[1].wait_for(lambda: tasks[1].record()["Restarts"] == "1")
    for number, task in enumerate(tasks):
        record = task.end()
        assert (record["JobState"], record["Restarts"]) == ("COMPLETED", str(number)), task.told()
        assert_done(runs[number])
    adapters = [(run / "phase2" / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] != adapters[1]
    models = {(run / "phase1" / "model.safetensors").read_bytes() for run in [*runs, uninterrupted[1]]}
    assert len(models) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("warning", ["B:USR1@25", "B:CONT@1"], ids=["warned", "unwarned"])
def test_the_time_limit(warning, cluster, tmp_path):
    """The job comes back after the warning, and without one at the limit itself."""
    options = ("--time=1", f"--signal={warning}", *TWO_NODES)
    job = begin(cluster, tmp_path, "data.imagenet.num_epochs=100000", options=options)
    job.wait_for(lambda: job.record()["Restarts"] == "1", 180)
    job.wait_for(lambda: "resuming after" in job.log.read_text())
    cluster.run("scancel", job.number)
    assert job.end()["Restarts"] == "1", job.told()
