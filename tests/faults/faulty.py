"""``python -m faulty ARGUMENTS``: the command line, with an accident at a chosen moment.

``FAULT=module:function:call:what[:rank]``, several joined by commas: at the given call of the function, the process of
that rank is sent the signal ``what``, or stands still where ``what`` is ``hang``; where it is ``stuck``, in C code that
no signal interrupts, as NCCL does when it waits for a process that is gone.
"""

from __future__ import annotations

import ctypes
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
    if what == "stuck":
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    os.kill(os.getpid(), signal.Signals[what])


if __name__ == "__main__":
    for fault in filter(None, os.environ.get("FAULT", "").split(",")):
        arm(fault)
    from trajdist.cli import main

    sys.exit(main())
