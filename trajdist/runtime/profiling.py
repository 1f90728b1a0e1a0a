"""``--profile``: a trace of a few steady steps, for Perfetto or chrome://tracing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# Steps to skip (they start workers, compile and allocate), to warm up the profiler, and to trace.
SKIPPED, WARM_UP, TRACED = 2, 1, 3
COSTLIEST = 5

Say = Callable[[str], None]


def nothing() -> None:
    """Called after a step if there is no profiler."""


@contextmanager
def profiling(path: Path, say: Say) -> Iterator[Callable[[], None]]:
    """Trace steps while the block runs and write the trace to ``path``; call what it yields after every step."""
    # Otherwise Kineto prints every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    needed = SKIPPED + WARM_UP + TRACED

    def finish(trace: profile) -> None:
        # This is also called when a phase ends early.
        if trace.step_num >= needed:
            _write(trace, path, say)

    plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=TRACED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish, acc_events=True) as trace:
        yield trace.step
    if trace.step_num < needed:
        say(f"no profile: it needs {needed} steps, but there were {trace.step_num}")


def _write(trace: profile, path: Path, say: Say) -> None:
    """Write the trace and list the costliest operations. Failing to write it does not end the training."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        say(f"the profile {str(path)!r} could not be written ({error})")
        return
    say(f"profile of {TRACED} steps: {path} (open it at ui.perfetto.dev); most of the time is in")
    for line in costliest(trace):
        say(f"  {line}")


def costliest(trace: profile) -> list[str]:
    """The operations with the most self time, on the device if there was one: ``38% aten::conv2d (159 calls)``."""
    operations = trace.key_averages()
    kind = "self_device_time_total" if any(one.self_device_time_total for one in operations) else "self_cpu_time_total"
    # The ProfilerStep marks include idle time.
    named = [one for one in operations if not one.key.startswith("ProfilerStep")]
    total = sum(getattr(one, kind) for one in named) or 1.0
    named.sort(key=lambda one: getattr(one, kind), reverse=True)
    return [f"{getattr(one, kind) / total:4.0%} {one.key} ({one.count} calls)" for one in named[:COSTLIEST]]
