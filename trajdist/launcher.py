"""What torchrun, ``accelerate launch`` and Slurm tell a process in its environment, before it connects to others."""

from __future__ import annotations

import os

# How accelerate launch asks for other ways to share the work than copies of the model.
_SPLIT_MODELS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def rank() -> int:
    """The process's rank in the job; 0 without a launcher."""
    return _number("RANK", 0)


def world() -> int:
    """Number of processes in the job; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def local_world(default: int = 1) -> int:
    """Number of the job's processes on this machine; ``default`` if the launcher does not say."""
    return _number("LOCAL_WORLD_SIZE", default)


def mixed_precision() -> str | None:
    """The setting of ``accelerate launch``, or None. It takes precedence over what the machine would choose."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or None


def unsupported() -> str:
    """A sentence about what Accelerate's environment asks for that trajdist does not do; usually empty.

    The config of ``accelerate launch`` often belongs to other work, and Accelerate would follow it: models split over
    the processes cannot be saved as one, and a model compiled in one run and not in the next differs in its last bits.
    """
    for variable, way in _SPLIT_MODELS.items():
        if os.environ.get(variable, "").lower() == "true":
            return (
                f"accelerate launch is set to use {way} ({variable}=true), which is for large models; here every "
                f"process has the whole model: take {way} out of its config, or pass it --multi_gpu instead."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        return (
            f"accelerate launch is set to compile the model (ACCELERATE_DYNAMO_BACKEND={backend!r}): pass it "
            "--dynamo_backend no, and set backbone.compile=true to compile."
        )
    device = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device not in (None, "", "cpu") and world() > 1:
        return (
            f"ACCELERATE_TORCH_DEVICE={device!r} is for one process, here are {world()}: leave it out, and "
            "Accelerate gives each a device of its own."
        )
    return ""


def rank_and_world() -> tuple[int, int]:
    """Rank and world size from the launcher's variables; ``(0, 1)`` unless all of them are set."""
    values = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    return (int(values[0] or 0), int(values[1] or 1)) if all(values) else (0, 1)


def slurm_problem(world: int) -> str:
    """What is wrong if Slurm started several launchers but not all of them joined this run; usually empty.

    Only the job step counts: an srun of a single task inside a larger allocation is fine.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if "SLURM_NODEID" not in os.environ or tasks == 1:
        return ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        joined = int(os.environ.get("GROUP_WORLD_SIZE") or 1)
    elif "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # Set by accelerate launch, even for a single process.
        joined = world
    else:
        return ""
    if joined >= tasks:
        return ""
    return (
        f"Slurm started {tasks} launchers (SLURM_STEP_NUM_TASKS), but only {joined} joined this run of {world} "
        f"process{'es' if world > 1 else ''}: use --multi_gpu --num_machines {tasks}, as launch/slurm.sbatch does "
        "(--cpu starts a separate run on each machine), or start separate runs with one srun each."
    )


def is_elastic() -> bool:
    """Whether the parent process is torchrun's elastic agent, which ``accelerate launch`` uses as well."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_launched() -> bool:
    """Whether a launcher started the process; launchers treat a non-zero exit code as a crash."""
    return is_elastic() or "LOCAL_WORLD_SIZE" in os.environ


def has_restarted() -> bool:
    """Whether a launcher or Slurm has restarted the same command, as after a failure."""
    return any(_number(name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def job() -> str:
    """A name for what started the process, the same after a restart by it (see :func:`has_restarted`).

    The converse does not hold: torch's launchers give all their jobs one name unless told otherwise.
    """
    slurm, launch = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    return f"Slurm job {slurm}" if slurm else f"launch {launch}"


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
