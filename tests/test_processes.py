"""The group of processes: what one of them finds ends all, and nothing waits for a process that failed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from trajdist.data.loader import processors, resolve_workers
from trajdist.errors import ConfigError, TrainingError
from trajdist.runtime.processes import Processes, device_type, precision, start_accelerator, supported_precision
from trajdist.runtime.stopping import StopFlag
from trajdist.runtime.watchdog import Watchdog
from trajdist.screen import ReaderGone


class OneOfTwo(Processes):
    """A process that hears from the other through a queue: what the main process said, or what the other answered."""

    def __init__(self, is_main: bool, said: Queue, answered: Queue | None = None) -> None:
        self.is_main, self.world, self.device = is_main, 2, torch.device("cpu")
        self._said, self._answered = said, answered

    def broadcast(self, item):
        if self.is_main:
            self._said.put(item)
            return item
        return self._said.get(timeout=30)

    def gather(self, items):
        own, others = (self._said, self._answered) if self.is_main else (self._answered, self._said)
        own.put(items)
        return [*items, *others.get(timeout=30)]


def come_after(processes: Processes, order: list[str], failing: str, failure: BaseException | None) -> None:
    name = "main" if processes.is_main else "other"

    def make() -> str:
        if failure and failing == name:
            raise failure
        order.append(name)
        return name

    assert processes.main_first(make) == name


def come_in_order(order: list[str], failing: str, failure: BaseException | None) -> list[BaseException | None]:
    """How the main process ended, and the other."""
    queues = Queue(), Queue()
    with ThreadPoolExecutor(2) as threads:
        other, main = (
            threads.submit(come_after, OneOfTwo(is_main, *queues), order, failing, failure) for is_main in (False, True)
        )
    return [main.exception(), other.exception()]


FAILURES = [(None, 0), (ConfigError("no weights"), 2), (OSError("gone"), 1), (ReaderGone(), 1)]


@pytest.mark.parametrize(("failure", "code"), FAILURES)
def test_the_others_follow_the_main_process_or_end_with_it(failure, code):
    order: list[str] = []
    main, other = come_in_order(order, "main", failure)
    assert main is failure
    assert order == ([] if failure else ["main", "other"])
    assert (other.code if failure else other) == (code or None)


@pytest.mark.parametrize(("failure", "code"), FAILURES[1:])
def test_the_main_process_ends_with_one_that_cannot_follow(failure, code):
    order: list[str] = []
    main, other = come_in_order(order, "other", failure)
    assert other is failure
    assert order == ["main"]
    assert main.code == code


def test_a_sum_of_one_process_stays_on_the_host():
    """MPS has no float64; ``meta`` stands in for it, and would lose the numbers."""
    alone = OneOfTwo(True, Queue())
    alone.world, alone.device = 1, torch.device("meta")
    assert alone.sum_from_host(torch.ones(3, dtype=torch.float64)).tolist() == [1.0] * 3


def test_emulated_bfloat16_is_not_chosen(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert precision("auto", "cuda") == "no"
    assert precision("bf16", "cuda") == "bf16"
    assert precision("auto", "cpu") == "no"


def test_fp16_is_not_for_cpus(monkeypatch):
    """Accelerate would compute in float32 there; what a launcher is set up with gives way."""
    with pytest.raises(ConfigError, match="mixed_precision='fp16' is for GPUs, CPUs would compute in float32"):
        start_accelerator("fp16", timeout_s=60, deterministic=False)
    assert supported_precision("fp16", "cuda") == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert (supported_precision("auto", "cpu"), supported_precision("auto", "cuda")) == ("no", "fp16")


@pytest.mark.parametrize(
    ("variable", "value", "mend"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP .* take FSDP out of its config"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed .* or pass it --multi_gpu"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "True", "take a parallelism config out"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "'INDUCTOR'.* --dynamo_backend no"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision='fp8': set it, or .*, to no, bf16 or fp16"),
    ],
)
def test_what_the_launcher_is_set_to_for_other_work_is_refused(variable, value, mend, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"accelerate launch is set to .*{mend}"):
        start_accelerator("auto", timeout_s=60, deterministic=False)


def test_the_device_that_accelerate_is_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
    assert device_type() == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="ACCELERATE_TORCH_DEVICE='cuda:1' is for one process, here are 4"):
        start_accelerator("auto", timeout_s=60, deterministic=False)


def test_a_gpu_is_not_looked_for_by_its_number(monkeypatch, fresh_accelerate):
    """DistributedDataParallel would look for GPU LOCAL_RANK, also where each process sees only one."""
    monkeypatch.delenv("ACCELERATE_BYPASS_DEVICE_MAP", raising=False)
    start_accelerator("no", timeout_s=60, deterministic=False)
    assert os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] == "true"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_readers_are_counted_before_accelerate_binds_processes_to_processors(monkeypatch, fresh_accelerate):
    """Eight processes on 64 processors, each bound to the 32 near its GPU: the share would be one of a half."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    processors.cache_clear()
    start_accelerator("no", timeout_s=60, deterministic=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    try:
        assert resolve_workers("auto", 8, "cuda") == 7
    finally:
        processors.cache_clear()


NCCL_SAYS = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN "
    "for details), NCCL version 2.30.7\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
)


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ("Duplicate GPU detected\n", "process 1 made no progress (Duplicate GPU detected): run the same command again"),
        ("", "process 1 made no progress (NCCL error in: /pytorch/"),
        # Whoever watches memory has the sentence for this.
        ("Cuda failure 'out of memory'", None),
    ],
)
def test_nccl_also_fails_for_reasons_of_its_own(last, sentence, monkeypatch):
    watchdog = Watchdog(SimpleNamespace(world=1), StopFlag(Path("STOP"), watches_file=False), timeout_s=60)
    monkeypatch.setattr(watchdog, "_who_is_missing", lambda: ("process 1 made no progress", False))
    said = watchdog._explain(torch.distributed.DistBackendError(NCCL_SAYS + last))
    assert said == sentence or said.startswith(sentence)


def ask(processes: Processes, failure: BaseException | None) -> int:
    def question() -> int:
        assert processes.is_main, "the others may be told what was there before"
        if failure:
            raise failure
        return 7

    return processes.main_knows(question)


@pytest.mark.parametrize(("failure", "code"), FAILURES)
def test_what_the_main_process_knows_all_know(failure, code):
    said = Queue()
    with ThreadPoolExecutor(2) as threads:
        main, other = (threads.submit(ask, OneOfTwo(is_main, said), failure) for is_main in (True, False))
    if failure is None:
        assert (main.result(), other.result()) == (7, 7)
    else:
        assert main.exception() is failure
        assert isinstance(other.exception(), SystemExit)
        assert other.exception().code == code


def test_an_interrupted_process_tells_nobody():
    """It is to end at once, and the others may not answer."""
    said = Queue()
    with pytest.raises(KeyboardInterrupt):
        ask(OneOfTwo(True, said), KeyboardInterrupt())
    assert said.empty()


def test_an_error_is_told_although_the_others_are_gone():
    alone = OneOfTwo(True, Queue())

    def broadcast(item):
        raise RuntimeError("connection reset by peer")

    alone.broadcast = broadcast
    with pytest.raises(ConfigError, match="no weights"):
        ask(alone, ConfigError("no weights"))
    with pytest.raises(RuntimeError, match="connection reset"):
        ask(alone, None)


@pytest.mark.parametrize(("failure", "code"), FAILURES)
def test_what_ends_one_process_ends_all(failure, code):
    def work() -> None:
        if failure:
            raise failure

    def end_of(process: Processes, work, others_code: int) -> BaseException | None:
        process.gather = lambda codes: [*codes, others_code]
        try:
            process.all_do(work)
        except BaseException as error:
            return error

    assert end_of(OneOfTwo(True, Queue()), work, 0) is failure
    end = end_of(OneOfTwo(False, Queue()), lambda: None, code)
    assert (end.code if failure else 0) == code


def test_the_end_of_a_worker_is_no_request_to_end(tmp_path):
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with StopFlag(tmp_path / "STOP", watches_file=False).listening() as stop:
            subprocess.run(["true"], check=True)
            assert not stop.heard()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.heard()
            assert stop.heard(), "once is enough"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_process_ends_at_once_though_nobody_reads_why(tmp_path):
    code = "from pathlib import Path; from trajdist.runtime.watchdog import end_at_once; "
    code += f"end_at_once(0, 'lost', Path({str(tmp_path / 'last')!r}).touch)"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-c", code], stderr=writing, timeout=120, check=False)
    finally:
        os.close(writing)
    assert done.returncode == TrainingError.exit_code
    assert (tmp_path / "last").exists()


def test_a_loader_is_not_kept(fresh_accelerate):
    """Each pass over images has one: of a long run there would be hundreds."""
    accelerator = start_accelerator("no", 60.0, deterministic=False)
    loader = Processes(accelerator).shard(DataLoader(range(4), batch_size=2))
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
