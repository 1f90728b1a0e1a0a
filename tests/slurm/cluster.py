"""A Slurm of two nodes, n1 and n2, on this machine, and jobs on it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jobs
import psutil

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "sinfo", "unshare", "setpriv")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
NODE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str:
    """Why there can be no cluster here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    # Containers without this capability cannot make namespaces.
    probe = subprocess.run([*NODE, "true"], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"needs namespaces: {probe.stderr.strip()}"


def wait_for(condition: Callable[[], object], timeout_s: float, what: Callable[[], str]) -> None:
    """Poll until it holds.

    Raises:
        AssertionError: with ``what()``, after ``timeout_s`` seconds.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


class Cluster:
    """The daemons. All of them live in one pid namespace and end with its first process."""

    def __init__(self) -> None:
        # Not pytest's folder: munged refuses a socket below one that others cannot read.
        self.base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.base.chmod(0o755)
        ports = [str(jobs.free_port()) for _ in range(3)]
        kept = {name: value for name, value in jobs.environment().items() if not name.startswith("SBATCH_")}
        own = {"SLURM_CONF": str(self.base / "etc" / "slurm.conf"), "PATH": SEARCH, "TRAJDIST_VENV": sys.prefix}
        # Phase 2 is the array's: PEFT takes longer to import than these jobs train.
        self.env = {**kept, **own, "TRAJDIST_COMMAND": "train"}
        namespace = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with (self.base / "out").open("wb") as out:
            self._process = subprocess.Popen(
                # Also when pytest is killed.
                ["setpriv", "--pdeathsig", "KILL", *namespace, "bash", HERE / "cluster.sh", self.base, *ports],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(self._is_ready, 30, lambda: "the cluster did not start")
        except AssertionError as error:
            log = "\n".join(file.read_text(errors="replace") for file in [self.base / "out", *self._logs()])
            self.stop()
            raise RuntimeError(f"{error}:\n{log}") from None

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, "the cluster ended"
        return (self.base / "ready").exists()

    def _logs(self) -> list[Path]:
        return sorted((self.base / "log").glob("*.out"))

    def _first(self) -> psutil.Process:
        """cluster.sh; with this first process of the namespace all others in it die."""
        return psutil.Process(self._process.pid).children()[0]

    def stop(self) -> None:
        """Kill everything and leave nothing.

        Raises:
            AssertionError: something is left behind.
        """
        if self._process.poll() is None:
            self._first().kill()
        self._process.wait(10)
        wait_for(lambda: not self.leftovers(), 10, lambda: f"left behind: {self.leftovers()}")
        shutil.rmtree(self.base)

    def leftovers(self) -> list[str]:
        """Processes and mounts that belong to this cluster."""
        own = str(self.base)
        found = [line for line in Path("/proc/mounts").read_text().splitlines() if own in line]
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF", "").startswith(own) or own in process.cmdline():
                    found.append(repr(process))
            except psutil.Error:
                continue
        return found

    def power_off(self, node: str) -> None:
        """SIGKILL to all that runs on a node."""
        unshare = self._unshare(node)
        unshare.children()[0].kill()
        wait_for(lambda: not unshare.is_running() or unshare.status() == "zombie", 10, lambda: f"{node} lives")

    def power_on(self, node: str) -> None:
        signals = {"n1": signal.SIGUSR1, "n2": signal.SIGUSR2}
        self._first().send_signal(signals[node])

    def _unshare(self, node: str) -> psutil.Process:
        """By its pid in the cluster's namespace, the only one that cluster.sh knows."""
        inner = int((self.base / "log" / f"{node}.pid").read_text())
        for process in self._first().children():
            status = Path(f"/proc/{process.pid}/status").read_text()
            pids = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if int(pids[-1]) == inner:
                return process
        raise AssertionError(f"{node} is off")

    def run(self, *command: str | Path, cwd: Path = jobs.REPOSITORY, env: Mapping[str, str] | None = None) -> str:
        """What one of Slurm's commands prints.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            [*map(str, command)],
            env={**self.env, **(env or {})},
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, log: Path, *command: str | Path, env: Mapping[str, str] | None = None) -> Submitted:
        """``sbatch COMMAND``, from the checkout as users do it."""
        number = self.run("sbatch", "--parsable", f"--output={log}", *command, env=env)
        return Submitted(self, number, log)


class Submitted:
    """A job of the cluster."""

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster, self.number, self.log = cluster, number, log

    def record(self) -> dict[str, str]:
        """``scontrol show job``."""
        words = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def told(self) -> str:
        """All that the job printed, and what Slurm knows of it."""
        printed = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"{self.record()}\n{printed}"

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 240) -> None:
        """Wait for something that the job does."""
        wait_for(condition, timeout_s, self.told)

    def end(self, timeout_s: float = 400) -> dict[str, str]:
        """Wait until it has ended for good; returns its record."""
        self.wait_for(lambda: self.record()["JobState"] in ENDED, timeout_s)
        return self.record()


SCRIPT = "launch/slurm.sbatch"
ONE_NODE = ("--nodes=1", "--cpus-per-task=2", SCRIPT)
TWO_NODES = ("--nodes=2", "--cpus-per-task=2", SCRIPT)


def training(run_dir: Path, *overrides: str) -> list[str]:
    """A config and overrides: enough steps to interrupt them."""
    steps = ("data.imagenet.num_epochs=16", "checkpoint.every_steps=4")
    return ["debug", f"run_dir={run_dir}", *steps, *overrides]
