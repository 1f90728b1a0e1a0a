"""``python -m peculiar ARGUMENTS``: the command line, with one process of a job that is not like the others.

``PECULIAR=rank:what[:value]``: ``config`` adds the override ``value``; ``folder`` makes ``value`` the working folder;
``version`` and ``device`` claim another one; ``late`` never comes to the pre-flight, ``stuck`` not to its sum, which
``wrong`` gets wrong; ``killed`` dies once, by SIGKILL, when the run directory ``value`` has its first checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def stand_still(*args, **kwargs):
    while True:
        time.sleep(1)


def be(what: str, value: str) -> None:
    from trajdist.runtime import preflight
    from trajdist.training import session

    if what == "config":
        sys.argv.append(value)
    elif what == "folder":
        os.chdir(value)
    elif what == "version":
        preflight.__version__ = value
    elif what == "device":
        preflight.device_type = lambda: value
    elif what == "late":
        session.check_processes_agree = stand_still
    elif what == "stuck":
        preflight._sum = stand_still
    elif what == "wrong":
        add_up = preflight._sum
        preflight._sum = lambda processes: add_up(processes) + 1
    elif what == "killed" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_after_a_checkpoint(Path(value))


def die_after_a_checkpoint(run_dir: Path) -> None:
    from trajdist.training import loop

    update, steps = loop.update, []

    def update_or_die(*args):
        steps.append(1)
        # Checkpoints are written every two steps, while the training goes on.
        while len(steps) == 4 and not list((run_dir / "checkpoints").glob("step-*")):
            time.sleep(0.02)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    loop.update = update_or_die


if __name__ == "__main__":
    from trajdist.runtime import preflight

    preflight.SUM_S = float(os.environ.get("SUM_S", preflight.SUM_S))
    rank, what, *value = (os.environ.get("PECULIAR") or "none:none").split(":", 2)
    if os.environ.get("RANK", "0") == rank:
        be(what, *value or [""])
    from trajdist.cli import main

    sys.exit(main())
