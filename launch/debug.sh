#!/usr/bin/env bash
# One process on one GPU or the CPU, no workers, deterministic algorithms, anomaly detection, tiny data; pdb works.
#   bash launch/debug.sh [CONFIG.yaml] [key=value ...]      (default config: debug; relative paths start from the checkout)
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,3s/^# //p' "$0"; exit; fi
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
config=debug
case ${1:-} in *=* | -* | '') ;; *) config=$1; shift ;; esac
make_environment quickstart
settings=(data.num_workers=0 runtime.deterministic=true runtime.detect_anomaly=true)
command=("$venv"/bin/python -X faulthandler -m trajdist run "$config" "${settings[@]}" "$@")
echo "+ ${command[*]}"
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} CUDA_LAUNCH_BLOCKING=1 exec "${command[@]}"
