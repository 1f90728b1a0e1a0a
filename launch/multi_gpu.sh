#!/usr/bin/env bash
# Run on every GPU of this machine: bash launch/multi_gpu.sh CONFIG.yaml [key=value ...]
# NUM_PROCESSES overrides the number of processes; with ACCELERATE_USE_CPU=true they run on the CPU. Relative paths start
# from the checkout.
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then sed -n '2,4s/^# //p' "$0"; exit; fi
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment quickstart
if [ -z "${NUM_PROCESSES:-}" ]; then
  NUM_PROCESSES=$("$venv"/bin/python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
precision=${ACCELERATE_MIXED_PRECISION:-bf16}
# CPUs without bf16 units are faster in float32.
if [ "${ACCELERATE_USE_CPU:-}" = true ]; then precision=no; fi
options=(--config_file accelerate_config.yaml --num_processes "$NUM_PROCESSES" --mixed_precision "$precision")
command=("$venv"/bin/accelerate launch "${options[@]}" -m trajdist run "$@")
# The launcher refuses --multi_gpu with one process, which needs no launcher anyway.
if [ "$NUM_PROCESSES" -eq 1 ]; then command=("$venv"/bin/python -m trajdist run "$@"); fi
echo "+ ${command[*]}"
# Slurm's early warning (--signal=USR1@120) reaches the launcher, which forwards only the signals named here.
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${command[@]}"
