"""The command line: argparse in, rich out. torch is imported when a command needs it, after the config is checked."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from trajdist import __version__, launcher
from trajdist.argument_types import RUN_HELP, add_config, place, positive, quality, rate, size, speed
from trajdist.errors import StopRequested, UserError
from trajdist.files import user_path
from trajdist.screen import guarded_stdout, lines_on_screen, on_screen

if TYPE_CHECKING:
    from trajdist.config import Config
    from trajdist.data.base import ImageSource
    from trajdist.scoring.job import Scoring

EPILOG = """\
Several processes: accelerate launch --config_file accelerate_config.yaml -m trajdist run CONFIG [key=value ...]
Exit codes: 0 done; 1 training failed, or a problem that audit found; 2 wrong usage or config; 3 wrong data; 4 wrong or
damaged artifact; 75 stopped on request with a checkpoint saved (0 under a launcher: see status.json); 130 Ctrl-C;
141 the reader of the output has gone."""

Command = Callable[[argparse.Namespace], int]
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parse(argv)
    command: Command = arguments.command
    try:
        with guarded_stdout():
            return _end(command(arguments))
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            _complain(str(error))
        return _end(error.exit_code)
    except StopRequested as stop:
        # A launcher takes any code but 0 for a crash and would restart the job.
        return _end(0 if launcher.is_launched() else stop.exit_code)
    except SystemExit as end:
        # Another process has reported the error, or nobody reads stdout any more.
        return _end(end.code if isinstance(end.code, int) else 1)
    except KeyboardInterrupt:
        return _end(130)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Also accept key=value arguments that follow an option, which argparse itself rejects."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_keys = hasattr(arguments, "overrides")
    late = [word for word in rest if "=" in word and not word.startswith("-") and takes_keys]
    if wrong := [word for word in rest if word not in late]:
        is_key = takes_keys and any(word.startswith("--") and ("=" in word or "." in word) for word in wrong)
        fix = ": write keys of the config as key=value, without the dashes" if is_key else ""
        parser.error(f"unrecognized arguments: {' '.join(wrong)}{fix}")
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trajdist",
        description="Learn how clean images move through a frozen backbone; find the places that do not belong.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trajdist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_training(commands, "run", "Phase 1, then Phase 2; resumes by itself", [1, 2])
    _add_training(commands, "train", "Phase 1 only", [1])
    _add_training(commands, "adapt", "Phase 2 only, on an existing Phase 1 (phase1=DIR)", [2])
    _add_plan(commands)
    score = _add_scoring(commands, "score", "unlabelled images -> scores.jsonl, heat maps", _score)
    score.add_argument("images", metavar="IMAGES", help="a folder, one image, tar shards, hf:NAME:SPLIT, skimage:NAME")
    evaluate = _add_scoring(commands, "evaluate", "labelled images in MVTec layout -> metrics.json as well", _evaluate)
    evaluate.add_argument("images", metavar="DATASET", help="a folder with test/ and, for pixels, ground_truth/")
    merge = _add(commands, "merge", "adds an adapter to its base's weights, giving a new Phase 1", _merge)
    merge.add_argument("run_dir", metavar="RUN_DIR", help=RUN_HELP)
    merge.add_argument("--adapter", metavar="DIR", help="(RUN_DIR/phase2/adapter)")
    merge.add_argument("--out", metavar="DIR", type=place, required=True, help="a folder that does not exist yet")
    _add_export(commands)
    _add_pack(commands)
    audit = _add(commands, "audit", "proves that each image was seen once per epoch", _audit)
    audit.add_argument("run_dir", metavar="RUN_DIR", help=RUN_HELP)
    inspect = _add(commands, "inspect", "what is in a run, an adapter, a checkpoint or a safetensors file", _inspect)
    inspect.add_argument("path", metavar="PATH", help="a folder or a file of a run")
    config = _add(commands, "config", "the resolved config", _config)
    add_config(config, nargs="?")
    config.add_argument("--schema", action="store_true", help="print JSON Schema instead, for editors")
    return parser


def _add(commands: Commands, name: str, text: str, command: Command) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command)
    return parser


def _add_training(commands: Commands, name: str, text: str, phases: list[int]) -> None:
    parser = _add(commands, name, text, _train)
    add_config(parser)
    parser.add_argument("--fresh", action="store_true", help="start over; an old run directory is moved aside")
    parser.add_argument("--profile", action="store_true", help="also trace a few steps, to RUN_DIR/profile")
    parser.set_defaults(phases=phases)


def _add_plan(commands: Commands) -> None:
    plan = _add(commands, "plan", "dry run: memory per process, steps, time, bytes; trains nothing", _plan)
    add_config(plan)
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument("--memory", type=size, metavar="SIZE", help="such as 80GiB: find the largest batch that fits")
    plan.add_argument(
        "--processes", type=positive, metavar="N", help="of the whole job (default: the launcher's, or 1)"
    )
    plan.add_argument("--device", choices=("cpu", "cuda"), help="to plan for (default: the one a run would use here)")
    plan.add_argument(
        "--images-per-second", type=speed, metavar="X", help="speed of one process, instead of measuring it"
    )
    plan.add_argument("--no-probe", action="store_true", help="do not measure the speed")
    plan.set_defaults(phases=[1, 2])


def _add_scoring(commands: Commands, name: str, text: str, command: Command) -> argparse.ArgumentParser:
    parser = _add(commands, name, text, command)
    parser.add_argument("run_dir", metavar="RUN_DIR", help=RUN_HELP)
    parser.add_argument("--out", metavar="DIR", type=place, required=True, help="where everything is written")
    parser.add_argument("--phase", type=int, choices=(1, 2), help="1 for the unadapted model (default: the latest)")
    parser.add_argument(
        "--adapter", metavar="DIR", action="append", default=[], help="instead of the run's own; several are compared"
    )
    parser.add_argument(
        "--false-alarm-rate",
        type=rate,
        metavar="RATE",
        help="share of clean images called anomalous (default: 0.01 if possible)",
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per process (32)")
    parser.add_argument("--explain", action="store_true", help="also show the blocks' errors at the hottest place")
    parser.add_argument("--overlays", choices=("all", "anomalous", "none"), default="all", help="pictures to draw")
    return parser


def _add_export(commands: Commands) -> None:
    export = _add(commands, "export", "one file that needs no trajdist: images in, maps and scores out", _export)
    export.add_argument("run_dir", metavar="RUN_DIR", help=RUN_HELP)
    export.add_argument("--format", choices=("onnx", "torch"), required=True, help="torch is a program of torch.export")
    export.add_argument("--out", metavar="FILE", type=place, help="(RUN_DIR/export.onnx or .pt2)")
    export.add_argument("--phase", type=int, choices=(1, 2), help="1 for the unadapted model (default: the latest)")
    export.add_argument("--adapter", metavar="DIR", help="instead of the run's own")


def _add_pack(commands: Commands) -> None:
    pack = _add(commands, "pack", "a folder of images -> verified tar shards (WebDataset); resumes by itself", _pack)
    pack.add_argument("source", metavar="SOURCE", help="a folder of images, or shards to repack")
    pack.add_argument("out", metavar="OUT", type=place, help="a folder for the shards")
    pack.add_argument("--shard-size", type=size, default=2**28, metavar="SIZE", help="maximum size (256MiB)")
    pack.add_argument(
        "--short-side", type=positive, metavar="PIXELS", help="scale larger images down (default: keep files)"
    )
    pack.add_argument(
        "--quality", type=quality, default=95, metavar="1..100", help="JPEG quality of scaled images (95)"
    )
    pack.add_argument("--workers", type=positive, metavar="N", help="worker processes (one per processor)")


def _train(arguments: argparse.Namespace) -> int:
    config, sources, phases = _open(arguments)
    # From here on torch is needed, which takes seconds to import.
    from trajdist.training.phases import run

    run(config, sources, phases, arguments.fresh, arguments.profile)
    return 0


def _open(arguments: argparse.Namespace) -> tuple[Config, dict[str, ImageSource], list[int]]:
    """The config, its image sets, and the phases to run."""
    from trajdist.config_files import load_config, refuse_moved
    from trajdist.data.sources import open_sets
    from trajdist.data.storage import Access

    config = load_config(arguments.config, arguments.overrides)
    refuse_moved(arguments.config, arguments.overrides, config.run_dir)
    # With another run's Phase 1, the job to plan is that of ``adapt``.
    on_another = arguments.command is _plan and config.phase1 is not None
    phases = [2] if on_another else list(arguments.phases)
    if phases == [1, 2] and not config.adapts:
        phases = [1]
    data = config.data
    several = {f"domains.{name}": domain.path for name, domain in data.domains.items()}
    wanted = {1: {"imagenet": data.imagenet.path}, 2: several or {"domain": data.domain.path}}
    access = Access.of(data)
    sources = open_sets({name: path for phase in phases for name, path in wanted[phase].items()}, access)
    return config, sources | _labelled(config), phases


def _labelled(config: Config) -> dict[str, ImageSource]:
    """The labelled images of validation.path, if it is set."""
    from trajdist.data.labelled import LabelledFolder
    from trajdist.errors import DataError

    path = config.validation.path
    if path is None:
        return {}
    labelled = LabelledFolder(path, "validation.path", config.data.read_retries)
    if len(labelled.kinds) == 1:
        raise DataError(f"validation.path={path!r} has only good images: add some with defects, or leave it out.")
    return {"validation": labelled}


def _plan(arguments: argparse.Namespace) -> int:
    import json

    config, sources, phases = _open(arguments)
    from trajdist.planning.plan import Options, make_plan, plan_table
    from trajdist.runtime.progress import make_console

    options = Options(
        memory_bytes=arguments.memory,
        processes=arguments.processes,
        device=arguments.device,
        images_per_s=arguments.images_per_second,
        measure=not arguments.no_probe,
    )
    plans = make_plan(config, sources, phases, options)
    if launcher.rank():
        return 0
    if arguments.json:
        print(json.dumps(plans, indent=2))
    else:
        console = make_console(True)
        console.print(plan_table(plans))
        for name, plan in plans.items():
            console.print(f"{name}: {plan['advice']}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from trajdist.data.sources import open_source, refuse_masks
    from trajdist.data.storage import Access

    source = open_source(arguments.images, "IMAGES", Access(retries=3))
    refuse_masks(source, f"IMAGES={arguments.images!r}", "scored")
    with _scoring(arguments, source) as job:
        from trajdist.scoring.report import report
        from trajdist.scoring.score import score, score_table

        score(job)
        job.processes.main_does(lambda: report(job))
        if job.processes.is_main:
            job.console.print(score_table(job))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from trajdist.data.labelled import LabelledFolder

    dataset = LabelledFolder(arguments.images, "DATASET", read_retries=3)
    with _scoring(arguments, dataset) as job:
        from trajdist.scoring.evaluation import evaluate, metrics_table

        metrics = evaluate(job, dataset)
        if job.processes.is_main:
            job.console.print(metrics_table(metrics))
    return 0


@contextmanager
def _scoring(arguments: argparse.Namespace, source: ImageSource) -> Iterator[Scoring]:
    """Open a scoring; after the block, print where the report is and which images could not be read."""
    from trajdist.runtime.memory import naming_memory
    from trajdist.scoring.job import Options, open_scoring
    from trajdist.scoring.score import tell_unreadable

    options = Options(
        adapters=tuple(arguments.adapter),
        phase=arguments.phase,
        false_alarm_rate=arguments.false_alarm_rate,
        batch_size=arguments.batch_size,
        explain=arguments.explain,
        overlays=arguments.overlays,
    )
    job = open_scoring(arguments.run_dir, source, arguments.images, arguments.out, options)
    with naming_memory(job.processes, lambda device: f"use a --batch-size below {arguments.batch_size}"):
        yield job
    if job.processes.is_main:
        job.console.print(f"the report is {job.out / 'report.html'}")
    job.processes.main_does(lambda: tell_unreadable(job))
    job.close()


def _merge(arguments: argparse.Namespace) -> int:
    from trajdist.saved.rundir import RunDir
    from trajdist.tools.merge import merge

    out = user_path(arguments.out)
    difference = merge(arguments.run_dir, arguments.adapter, out)
    adapter = arguments.adapter or RunDir(arguments.run_dir).adapter
    print(on_screen(f"{out / 'phase1'} scores as {adapter} does, within {difference:.1g}"))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from trajdist.scoring.scorer import load
    from trajdist.tools.export import FILES, export

    scorer = load(arguments.run_dir, arguments.adapter, arguments.phase, device="cpu")
    out = user_path(arguments.out or Path(arguments.run_dir, FILES[arguments.format]))
    made = export(scorer, arguments.format, out)
    shape = f"uint8 [B, 3, {scorer.size}, {scorer.size}]"
    size = f"{made.path.stat().st_size / 2**20:.1f} MiB"
    print(on_screen(f"{made.path} ({size}): {shape} -> maps, scores, p_values"))
    print(f"against the run itself: scores within {made.score_difference:.1g}, maps within {made.map_difference:.1g}")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from trajdist.data.base import EncodedSource
    from trajdist.data.loader import processors
    from trajdist.data.sources import open_source, refuse_masks
    from trajdist.data.storage import Access
    from trajdist.errors import DataError
    from trajdist.runtime.progress import make_console
    from trajdist.tools.pack import pack
    from trajdist.tools.preparation import Options

    source = open_source(arguments.source, "SOURCE", Access(retries=3))
    refuse_masks(source, f"SOURCE={arguments.source!r}", "packed")
    if not isinstance(source, EncodedSource):
        raise DataError(f"SOURCE={arguments.source!r} has no image files to pack: name a folder of images.")
    options = Options(arguments.shard_size, arguments.short_side, arguments.quality)
    workers = arguments.workers or processors()
    pack(source, arguments.source, user_path(arguments.out), options, workers, make_console(True))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from trajdist.tools.audit import audit, report

    found = audit(arguments.run_dir)
    for line in report(found):
        print(on_screen(line))
    return 1 if found.problems else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from trajdist.runtime.progress import make_console
    from trajdist.tools.inspection import inspect

    console = make_console(True)
    for item in inspect(user_path(arguments.path)):
        console.print(item)
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from trajdist.config_files import dump_yaml, load_config
    from trajdist.config_schema import json_schema

    overrides = list(arguments.overrides)
    source = arguments.config
    if source is not None and "=" in source:
        source, overrides = None, [source, *overrides]
    print(json_schema() if arguments.schema else dump_yaml(load_config(source, overrides)), end="")
    return 0


def _end(code: int) -> int:
    """The exit code. A launched process exits here at once: its work is on disk, or was refused.

    During interpreter shutdown, a thread of the communication libraries occasionally aborts the process, and the
    launcher would take the finished job for a crash.
    """
    if launcher.is_launched():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    return code


def _complain(sentence: str) -> None:
    """Print an error to stderr. Several processes may report it: all but the main one add their rank."""
    rank = launcher.rank()
    print(f"trajdist: {f'[process {rank}] ' if rank else ''}{lines_on_screen(sentence)}", file=sys.stderr)
