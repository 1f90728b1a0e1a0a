"""Processes that begin with their imports done: each is forked from one that has imported torch, PEFT and trajdist.

Imports are most of what a short job costs. ``Popen`` here is ``subprocess.Popen``, but that ``python -m MODULE ...`` is
forked: a child of whoever asked for it, in a session of its own if that was asked for, with the arguments, environment,
folder and files it would have had. What a program reads once as it begins (``LD_PRELOAD``, ``MALLOC_...``,
``PYTHONHASHSEED``) has no effect. The workers of ``accelerate launch`` are forked as well. Linux only.

As a program, it is the process that the others are forked from: ``python -m nursery DESCRIPTOR``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

IMPORTS = (
    "accelerate.commands.launch",
    "peft",
    "torch.distributed.run",
    "torchvision.models",
    "trajdist.cli",
    "trajdist.scoring.evaluation",
    "trajdist.training.phases",
)
LAUNCHER = "accelerate.commands.launch"
LARGEST_REQUEST = 2**17
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Request:
    """A process that is wanted."""

    parent: int
    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool


class Popen(subprocess.Popen):
    """``subprocess.Popen``; ``python -m MODULE ...`` is forked."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        command = list(map(os.fspath, args))
        options = command[1 : command.index("-m")] if "-m" in command else None
        if not sys.platform.startswith("linux") or command[0] != sys.executable or options not in ([], ["-u"]):
            super()._execute_child(args, *rest)
            return
        cwd, env, new_session = rest[4], rest[5], rest[20]
        stdin, _, _, stdout, _, stderr = pipes = rest[9:15]
        module, *arguments = command[len(options) + 2 :]
        folder = os.fspath(cwd or os.getcwd())
        request = Request(os.getpid(), module, arguments, dict(env or os.environ), folder, bool(new_session))
        files = [theirs if theirs != -1 else ours for theirs, ours in ((stdin, 0), (stdout, 1), (stderr, 2))]
        self.pid = _ask(request, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _ask(request: Request, files: list[int]) -> int:
    """The pid of the new process."""
    server = _server()
    with _adopting():
        socket.send_fds(server, [json.dumps(asdict(request)).encode()], files)
        return int(server.recv(32))


@functools.cache
def _server() -> socket.socket:
    """The connection to the nursery of this process, which is started now."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "nursery", str(theirs.fileno())]
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    theirs.set_inheritable(True)
    # It ends when the connection does; a Popen object would complain that nobody waited for it.
    os.posix_spawn(sys.executable, command, environment)
    theirs.close()
    return ours


@contextmanager
def _adopting() -> Iterator[None]:
    """Meanwhile, orphans among the descendants become children of this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def serve(asked: socket.socket) -> Request:
    """Fork for every request. Returns in the new process, as a child of whoever asked."""
    while True:
        message, files, _, _ = socket.recv_fds(asked, LARGEST_REQUEST, 3)
        if not message:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if between:
            os.close(tell)
            os.waitpid(between, 0)
            # The new process is an orphan by now, and adopted.
            asked.send(os.read(told, 32))
            for descriptor in (told, *files):
                os.close(descriptor)
            continue
        born = os.fork()
        if born:
            os.write(tell, str(born).encode())
            os._exit(0)
        asked.close()
        os.close(told)
        os.close(tell)
        request = Request(**json.loads(message))
        while os.getppid() != request.parent:
            time.sleep(0.001)
        _dress(request, files)
        return request


def _dress(request: Request, files: list[int]) -> None:
    """Give this process what it would have had from ``execve``."""
    if request.new_session:
        os.setsid()
    for descriptor, wanted in zip(files, range(3), strict=True):
        os.dup2(descriptor, wanted)
        os.close(descriptor)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[:0] = [request.folder, *filter(None, request.environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [request.module, *request.arguments]


def _with_a_nursery_of_its_own() -> None:
    """The workers of this launcher are forked too. Called before it has any thread."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        ours.close()
        # Signals for the launcher's group are not meant for it.
        os.setpgid(0, 0)
        run(serve(theirs))
    theirs.close()
    global _server
    _server = lambda: ours  # noqa: E731
    subprocess_handler.Popen = Popen


def run(request: Request) -> None:
    """The program itself."""
    if request.module == LAUNCHER:
        _with_a_nursery_of_its_own()
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
