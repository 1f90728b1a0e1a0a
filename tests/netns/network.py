"""Two machines on this one: network namespaces with an address each, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import jobs
import nursery

SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CARD = "cable"


def missing() -> str:
    """Why there can be no network here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in ("ip", "nsenter", "unshare", "setpriv") if not shutil.which(name, path=SEARCH)]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install iproute2"
    make = ["unshare", "--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "other"]
    probe = subprocess.run(make, env={"PATH": SEARCH}, capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"needs network namespaces: {probe.stderr.strip()}"


class Network:
    """The namespaces, and the cable between them, which has the same name at both ends."""

    def __init__(self) -> None:
        # A namespace lives as long as a process in it; these die with pytest.
        hold = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        self._holders = [subprocess.Popen(hold) for _ in ADDRESSES]
        for holder in self._holders:
            self._wait_until_apart(holder.pid)
        self.ip(0, "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", str(self._holders[1].pid))
        for machine, address in enumerate(ADDRESSES):
            self.ip(machine, "address", "add", f"{address}/24", "dev", CARD)
            for card in ("lo", CARD):
                self.ip(machine, "link", "set", card, "up")

    def _wait_until_apart(self, pid: int) -> None:
        own = os.readlink("/proc/self/ns/net")
        end = time.monotonic() + 10
        while os.readlink(f"/proc/{pid}/ns/net") == own:
            assert time.monotonic() < end, "no network namespace was made"
            time.sleep(0.01)

    def inside(self, machine: int, *command: str) -> list[str]:
        """The command that runs a command on one of the machines."""
        return ["nsenter", f"--net=/proc/{self._holders[machine].pid}/ns/net", *command]

    def ip(self, machine: int, *arguments: str) -> None:
        command = self.inside(machine, "ip", *arguments)
        done = subprocess.run(command, env={"PATH": SEARCH}, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def cut(self) -> None:
        """Pull the cable: packets vanish, and no connection is told."""
        self.ip(1, "link", "set", CARD, "down")

    def mend(self) -> None:
        self.ip(1, "link", "set", CARD, "up")

    def remove(self) -> None:
        """The cable goes with its ends, and they with the processes that hold them."""
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def start(self, machine: int, port: int, arguments: Sequence[str]) -> jobs.Job:
        """The launcher of one machine, with one process."""
        command = self.inside(machine, *launcher(machine, port), *arguments)
        # The machine's name stands for an address that is none of the cable's.
        environment = jobs.environment({"GLOO_SOCKET_IFNAME": CARD, "TP_SOCKET_IFNAME": CARD})
        return jobs.spawn(command, environment, popen=nursery.Popen)


def launcher(machine: int, port: int) -> list[str]:
    """``accelerate launch`` of one of two machines."""
    # Not c10d, where a host must find its own address by its name.
    options = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(machine)]
    options += ["--main_process_ip", ADDRESSES[0], "--main_process_port", str(port), "--rdzv_backend", "static"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "trajdist"]
