"""Jobs as a user starts them: the command line in processes of its own, with a limit on how long it may hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import nursery
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
# What a launcher or a shell may have set; a job under test starts without.
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "SLURM_")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    """How a job ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Job:
    """A running job. ``end`` waits for it; a job that hangs is killed with all of its descendants."""

    process: subprocess.Popen[bytes]
    _stdout: IO[bytes] = field(repr=False)
    _stderr: IO[bytes] = field(repr=False)

    def descendants(self) -> list[psutil.Process]:
        """The launcher, the training processes and their workers. Each training process leads a session of its own."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: signal.Signals) -> None:
        """Signal the process that was started (the launcher, where there is one)."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL for all processes of the job, by pid."""
        for process in self.descendants():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def end(self, timeout_s: float = 120) -> Finished:
        """Wait for the end.

        Raises:
            AssertionError: the job hung; its output is in the message.
        """
        try:
            self.process.wait(timeout_s)
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
        finally:
            self.kill()
        outputs = []
        for stream in (self._stdout, self._stderr):
            stream.seek(0)
            outputs.append(stream.read().decode(errors="replace"))
            stream.close()
        assert not hung, f"the job hung for {timeout_s} s:\n{outputs[0]}\n{outputs[1]}"
        return Finished(self.process.returncode, *outputs)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """CPU only, one thread, no network; nothing of a surrounding launcher."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_PREFIXES) and name not in LAUNCHER_NAMES
    }
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    return {**kept, **own, **(extra or {})}


def spawn(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
    popen: type[subprocess.Popen[bytes]] = subprocess.Popen,
) -> Job:
    """Start a command in a session of its own, in the repository unless ``cwd`` says otherwise."""
    # Files, not pipes: nothing blocks on output that nobody reads.
    stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # Job.end closes them.
    process = popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=env,
        cwd=cwd or REPOSITORY,
        start_new_session=True,
    )
    return Job(process, stdout, stderr)


def start(
    args: Sequence[str | Path],
    num_processes: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    module: str = "trajdist",
    launcher_options: Sequence[str] = (),
    from_nothing: bool = False,
) -> Job:
    """Start ``python -m trajdist args``, under ``accelerate launch`` where there are several processes.

    Processes are forked with their imports done (``nursery.py``), unless they are to start from nothing.
    """
    launcher: list[str] = []
    if num_processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", str(free_port()), *launcher_options]
    command = [sys.executable, *launcher, "-m", module, *map(str, args)]
    forks = nursery.available() and not from_nothing
    return spawn(command, environment(env), cwd, nursery.Popen if forks else subprocess.Popen)


def stop_after_lines(job: Job, run_dir: Path, count: int, timeout_s: float = 120) -> None:
    """Stop a training by its STOP file when metrics.jsonl has ``count`` more lines; it must not have been done."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + timeout_s

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    begin = lines()
    while lines() < begin + count:
        assert time.monotonic() < deadline, "the job takes no steps"
        time.sleep(0.01)
    (run_dir / "STOP").touch()
    ended = job.end()
    assert ended.returncode in (0, 75), ended.stderr
    assert json.loads((run_dir / "status.json").read_text())["status"] == "stopped"


def launch(
    args: Sequence[str | Path],
    num_processes: int = 1,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    module: str = "trajdist",
    launcher_options: Sequence[str] = (),
    from_nothing: bool = False,
) -> Finished:
    """Run a job to its end; see :func:`start` and :meth:`Job.end`."""
    return start(args, num_processes, env, cwd, module, launcher_options, from_nothing).end(timeout_s)
