"""Weak scaling: N single-threaded processes with a fixed number of images each. Jobs are interleaved in one run.

    python benchmarks/scaling.py --images DIR [--processes 1 2] [--rounds 3] [--json FILE] [CONFIG] [key=value ...]

Every job is ``trajdist train`` on the CPU (CONFIG: default, with random weights), decoding in the training process
itself, so that N processes keep N cores busy. Efficiency is images/s of N processes divided by N times those of one
(of the first count of ``--processes``). The time spent waiting for data is as reported by the run; the time of an
all-reduce of the model's gradients is measured separately, because in training it overlaps with the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import ratio

ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(num_processes: int, *command: str) -> None:
    """Run Python with this command line in several processes; a single one needs no launcher."""
    launcher: list[str] = []
    if num_processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", str(port)]
    subprocess.run([sys.executable, *launcher, *command], check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def train(arguments: argparse.Namespace, num_processes: int) -> dict[str, Any]:
    """Run one training; returns its Phase 1 summary."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run_dir": f"{folder}/run",
            "data.imagenet.path": arguments.images,
            "data.imagenet.num_samples": str(num_processes * arguments.images_per_process),
            "data.num_workers": "0",
            "trajectory.statistics_images": "32",
            "calibration.holdout_fraction": "0",
        }
        overrides = [f"{key}={value}" for key, value in settings.items()] + arguments.overrides
        launch(num_processes, "-m", "trajdist", "train", arguments.config, *overrides)
        summary: dict[str, Any] = json.loads(Path(folder, "run", "summary.json").read_text())["phase1"]
        return summary


def all_reduce_s(num_processes: int, num_bytes: int) -> float:
    """Median seconds of an all-reduce of ``num_bytes``."""
    if num_processes == 1:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "seconds")
        launch(num_processes, __file__, "--all-reduce", str(num_bytes), str(out))
        return float(out.read_text())


def time_all_reduce(num_bytes: int, out: Path) -> None:
    """Run by each process that :func:`all_reduce_s` starts; rank 0 writes the seconds to ``out``."""
    import torch

    torch.distributed.init_process_group("gloo")
    gradients = torch.zeros(num_bytes // 4)
    found = []
    for _ in range(20):
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        found.append(time.perf_counter() - started)
    if torch.distributed.get_rank() == 0:
        out.write_text(str(statistics.median(found)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    summaries: dict[int, list[dict[str, Any]]] = {count: [] for count in arguments.processes}
    for _ in range(arguments.rounds):
        for count in arguments.processes:
            summaries[count].append(train(arguments, count))
    result: dict[str, Any] = {}
    alone = [summary["images_per_s"] for summary in summaries[arguments.processes[0]]]
    for count, found in summaries.items():
        linear = [count / arguments.processes[0] * one for one in alone]
        rates = [summary["images_per_s"] for summary in found]
        step = [summary["seconds"] / summary["steps"] for summary in found]
        gradient_bytes = 4 * found[0]["trained_parameters"]
        result[str(count)] = {
            "images_per_s": statistics.median(rates),
            "efficiency": ratio(rates, linear),
            "step_s": statistics.median(step),
            "data_s": statistics.median(summary["time"]["data"] / summary["steps"] for summary in found),
            "all_reduce_s": all_reduce_s(count, gradient_bytes),
            "gradient_bytes": gradient_bytes,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of images")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images-per-process", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--all-reduce", nargs=2, metavar=("BYTES", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("config", nargs="?", default="default")
    parser.add_argument("overrides", nargs="*", default=["backbone.weights=none"])
    arguments = parser.parse_args()
    if arguments.all_reduce:
        time_all_reduce(int(arguments.all_reduce[0]), Path(arguments.all_reduce[1]))
        return
    if not arguments.images:
        parser.error("--images is needed")
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
