#!/usr/bin/env bash
# Creates .venv, installs, trains on an embedded data set, and looks for defects: bash launch/quickstart.sh [key=value ...]
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2s/^# //p' "$0"; exit; fi
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment quickstart
run_dir=runs/quickstart
for override in "$@"; do
  case $override in run_dir=*) run_dir=${override#run_dir=} ;; esac
done
echo "+ trajdist run quickstart $*"
"$venv"/bin/trajdist run quickstart "$@"
echo "+ held-out crops, as they are and with defects drawn in"
"$venv"/bin/python -m trajdist.data.defects skimage:gravel/heldout "$run_dir/heldout"
echo "+ trajdist evaluate $run_dir $run_dir/heldout --out $run_dir/evaluation --explain"
"$venv"/bin/trajdist evaluate "$run_dir" "$run_dir/heldout" --out "$run_dir/evaluation" --explain
