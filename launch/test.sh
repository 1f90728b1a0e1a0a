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
"$venv"/bin/mypy trajdist benchmarks
# Many tests wait for jobs that they start: two at a time keep two cores busy. The tests of a file stay together, so that
# they share one object store and one finished run.
two=(-n 2 --dist loadfile --no-loadscope-reorder)
# The files of the tests go to memory where there is plenty: to save safely, each run waits for the disk dozens of times.
free_kib() {
  df --output=avail -k /dev/shm | tail -n 1
  sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo
}
least=$(free_kib 2> /dev/null | sort -n | head -n 1 || true)
if [ -d /dev/shm ] && [ "${least:-0}" -gt $((12 * 1024 * 1024)) ]; then
  export PYTEST_DEBUG_TEMPROOT=/dev/shm
fi
if [ $# -gt 0 ]; then
  echo "+ pytest $*"
  exec "$venv"/bin/python -m pytest -m "not slow" "${two[@]}" "$@"
fi
# Those of Slurm and of the network wait for most of their time, so they run beside the others; they are in two folders.
echo "+ pytest"
waiting=$(mktemp)
"$venv"/bin/python -m pytest -m "not slow" tests/slurm tests/netns > "$waiting" 2>&1 &
beside=$!
trap 'if [ -n "$beside" ]; then kill "$beside" 2> /dev/null || true; fi; rm -f "$waiting"' EXIT
# Those in the background do not hear Ctrl-C.
trap 'exit 130' INT
code=0
"$venv"/bin/python -m pytest -m "not (slurm or netns or slow)" "${two[@]}" || code=$?
wait "$beside" || code=$?
beside=
cat "$waiting"
exit "$code"
