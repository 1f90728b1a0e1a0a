"""``python -m faulty ARGUMENTS``: the command line, with an accident at a chosen moment.

``FAULT=module:function:call:what[:rank]``: at the given call of the function, the process of that rank is sent the
signal ``what``, or stands still where ``what`` is ``hang``.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import signal
import sys
import time


def arm(fault: str) -> None:
    module_name, function_name, call, what, *rank = fault.split(":")
    if os.environ.get("RANK", "0") != (rank[0] if rank else "0"):
        return
    module = importlib.import_module(module_name)
    function = getattr(module, function_name)
    calls = itertools.count(1)

    @functools.wraps(function)
    def with_accident(*args, **kwargs):
        if next(calls) == int(call):
            happen(what)
        return function(*args, **kwargs)

    setattr(module, function_name, with_accident)


def happen(what: str) -> None:
    if what == "hang":
        while True:
            time.sleep(1)
    os.kill(os.getpid(), signal.Signals[what])


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        arm(os.environ["FAULT"])
    from trajdist.cli import main

    sys.exit(main())
