"""How close does scoring come to the cost of the backbone's forward pass? Interleaved in one process, same images.

    python benchmarks/scoring.py --run RUN_DIR --images DIR [--rounds 5] [--json FILE]

In each round: the forward pass of the plain network (channels last, as its library builds it, images decoded in
advance), the same with BatchNorm folded, and ``trajdist score`` with no pictures and with all of them, including
decoding. Prints images/s (medians over the rounds), ratios with their range, and the upper bound on the ratio that
follows from the numbers of floating-point operations. Backbones from timm are not supported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from measuring import ratio, seconds
from reference import plain_network
from torch.utils.flop_counter import FlopCounterMode

from trajdist.data.decode import to_square
from trajdist.data.sources import open_source
from trajdist.runtime.processes import device_type
from trajdist.saved import bundle
from trajdist.saved.rundir import RunDir
from trajdist.scoring.job import Options, Scoring, open_scoring
from trajdist.scoring.score import score

BATCH = 32


def plain_network_of(run_dir: str) -> torch.nn.Module:
    """The run's network as its library builds it, without trajdist's modifications."""
    document = bundle.read(RunDir(run_dir).trajectory, bundle.TrajectoryDocument)
    network = plain_network(document.backbone, document.weights, document.seed, document.image_size)
    return network.to(memory_format=torch.channels_last)


def folded_network(job: Scoring) -> torch.nn.Module:
    """The same network as trajdist runs it, including its head."""
    return job.scorer.extractor.backbone.network


def forward_all(network: torch.nn.Module, images_BCSS: torch.Tensor) -> None:
    with torch.inference_mode():
        for batch in images_BCSS.split(BATCH):
            network(batch.float())


def score_all(arguments: argparse.Namespace, overlays: str) -> float:
    """Seconds of a scoring job from its first batch to its last, without loading the run."""
    with tempfile.TemporaryDirectory() as out, closing(opened(arguments, out, overlays)) as job:
        return seconds(lambda: score(job))


def opened(arguments: argparse.Namespace, out: str, overlays: str) -> Scoring:
    source = open_source(arguments.images, "IMAGES")
    return open_scoring(arguments.run, source, arguments.images, out, Options(batch_size=BATCH, overlays=overlays))


def flops_per_image(job: Scoring, image_1CSS: torch.Tensor) -> tuple[int, int]:
    """Floating-point operations of the backbone's forward pass, and of everything after it."""
    with FlopCounterMode(display=False) as network, torch.no_grad():
        folded_network(job)(image_1CSS.float())
    with FlopCounterMode(display=False) as all_of_it, torch.no_grad():
        job.scorer.score_batch(image_1CSS)
    return network.get_total_flops(), all_of_it.get_total_flops() - network.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a finished run")
    parser.add_argument("--images", required=True, help="a folder of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)

    with tempfile.TemporaryDirectory() as out:
        job = opened(arguments, out, "none")
        job.close()  # Its run and its images are used below.
    count = len(job.source)
    squares = [to_square(job.source.load(i, job.scorer.size), job.scorer.size, job.scorer.fit) for i in range(count)]
    device = torch.device(device_type())
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(device)
    plain, folded = plain_network_of(arguments.run).to(device), folded_network(job)
    backbone_flops, other_flops = flops_per_image(job, images[:1])
    works: dict[str, Callable[[], float]] = {
        "forward alone": lambda: seconds(lambda: forward_all(plain, images)),
        "forward alone, folded": lambda: seconds(lambda: forward_all(folded, images)),
        "score": lambda: score_all(arguments, "none"),
        "score, all pictures": lambda: score_all(arguments, "all"),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    for name, work in itertools.chain.from_iterable([works.items()] * (arguments.rounds + 1)):
        rates[name].append(count / work())
    # The first round is warm-up.
    rates = {name: values[1:] for name, values in rates.items()}
    result = {
        "images": count,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "images_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratios": {
            f"{one} / {other}": ratio(rates[one], rates[other]) for one in works for other in works if one > other
        },
        "gflop_per_image": {"backbone": backbone_flops / 1e9, "projection, model, calibration": other_flops / 1e9},
        "arithmetic_bound": backbone_flops / (backbone_flops + other_flops),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
