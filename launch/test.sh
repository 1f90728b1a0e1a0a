#!/usr/bin/env bash
# Creates .venv, installs with the test extras, and runs the tests: bash launch/test.sh [pytest options]
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2s/^# //p' "$0"; exit; fi
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment dev
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$venv"/bin/ruff check .
"$venv"/bin/ruff format --check .
"$venv"/bin/mypy trajdist
echo "+ pytest $*"
# Many tests wait for jobs that they start: two at a time keep two cores busy. The tests of a file stay together, so that
# they share one Slurm, one object store and one finished run. In their order the longest files (Slurm's) come early.
"$venv"/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder "$@"
