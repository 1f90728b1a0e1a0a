"""Processes that begin with their imports done: each is forked from one that has imported torch, PEFT and trajdist.

Imports are most of what a short job costs. ``Popen`` here is ``subprocess.Popen``, except that ``python -m MODULE ...``
is forked: a child of the process that asked for it, with the arguments, environment, folder and files it would have;
in the network namespace of ``nsenter --net=FILE`` before it. The workers of ``accelerate launch`` are forked as well.
Linux only, and one thread at a time.

All that are forked share the seed of hashes, and what libraries read from the environment as they are loaded has no
effect (``OMP_NUM_THREADS`` is 1). Tests that are about such things start their jobs with ``from_nothing=True``.

As a program, it is the process that the others are forked from: ``python -m nursery DESCRIPTOR``.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
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
    "accelerate",
    "peft",
    "torch.distributed.run",
    "torchvision.models",
    "trajdist.cli",
    "trajdist.scoring.evaluation",
    "trajdist.training.phases",
)
LAUNCHER = "accelerate.commands.launch"
FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
LARGEST_REQUEST, LARGEST_ANSWER = 2**17, 32
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNET = 0x40000000

# The connection to the nursery of this process, once it has one.
_nursery: socket.socket | None = None


@dataclass(frozen=True)
class Request:
    """A process that is wanted."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool
    network: str


class Popen(subprocess.Popen):
    """``subprocess.Popen``; ``[nsenter --net=FILE] python -m MODULE ...`` is forked."""

    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        startupinfo: Any,
        creationflags: Any,
        shell: Any,
        p2cread: int,
        p2cwrite: int,
        c2pread: int,
        c2pwrite: int,
        errread: int,
        errwrite: int,
        restore_signals: Any,
        gid: Any,
        gids: Any,
        uid: Any,
        umask: Any,
        start_new_session: bool,
        *more: Any,
    ) -> None:
        words = [word for word in map(os.fspath, args) if word != "-u"]
        network = words[1].removeprefix("--net=") if words[0] == "nsenter" else ""
        python, *words = words[2:] if network else words
        assert python == sys.executable, "only Python is forked"
        assert words[0] == "-m", "only modules are forked"
        assert preexec_fn is None, "what is forked takes no function"
        assert not pass_fds, "what is forked takes no more files"
        environment = dict(os.environ if env is None else env)
        folder = os.fspath(cwd or os.getcwd())
        request = Request(words[1], words[2:], environment, folder, bool(start_new_session), network)
        files = [theirs if theirs != -1 else own for theirs, own in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2))]
        self.pid = _ask(request, files)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def available() -> bool:
    return sys.platform.startswith("linux")


def _ask(request: Request, files: list[int]) -> int:
    """The pid of the new process, which is a child of this one and has begun."""
    global _nursery
    if _nursery is None:
        _nursery = _open_nursery()
    with _adopting():
        socket.send_fds(_nursery, [json.dumps(asdict(request)).encode()], files)
        return int(_nursery.recv(LARGEST_ANSWER))


def _open_nursery() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "OMP_NUM_THREADS": "1"}
    # It ends when the connection does; a Popen object would complain that nobody waited for it.
    os.posix_spawn(sys.executable, [sys.executable, "-m", "nursery", str(theirs.fileno())], environment)
    theirs.close()
    atexit.register(ours.close)
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
    """Fork for every request. Returns in the new process, which is an orphan and so the child of whoever asked."""
    while True:
        message, files, _, _ = socket.recv_fds(asked, LARGEST_REQUEST, 3)
        if not message:
            os._exit(0)
        request = Request(**json.loads(message))
        told, tell = os.pipe()
        if not _fork_orphan():
            os.close(told)
            asked.close()
            _dress(request, files)
            os.write(tell, str(os.getpid()).encode())
            os.close(tell)
            return request
        os.close(tell)
        asked.send(os.read(told, LARGEST_ANSWER))
        for descriptor in (told, *files):
            os.close(descriptor)


def _fork_orphan() -> bool:
    """Fork; False in the new process, once the process between this one and it has gone."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return True
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(0.001)
    return False


def _dress(request: Request, files: list[int]) -> None:
    """Give this process what it would have had from ``execve``."""
    if request.new_session:
        os.setsid()
    if request.network:
        with open(request.network) as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0, request.network
    for wanted, descriptor in enumerate(files):
        os.dup2(descriptor, wanted)
        os.close(descriptor)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    given = filter(None, request.environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [request.folder, *given, *(folder for folder in sys.path[1:] if folder not in FOLDERS)]
    sys.argv = [request.module, *request.arguments]
    sys.modules["numpy"].random.seed()


def _fork_workers_too() -> None:
    """Give this launcher a nursery, forked from it before it has threads."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    global _nursery
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        ours.close()
        os.setpgid(0, 0)  # Signals for the launcher's group are not meant for it.
        run(serve(theirs))
    theirs.close()
    _nursery = ours
    subprocess_handler.Popen = Popen


def run(request: Request) -> None:
    """The program itself; ends this process."""
    if request.module == LAUNCHER:
        _fork_workers_too()
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # A collection in each of the processes would go through all that was imported, and copy its pages.
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
