#!/usr/bin/env bash
# Creates .venv in this checkout and installs trajdist with the extras named in $1. Sourced by the other scripts.
# A second call is quick: nothing is installed while setup.cfg, pyproject.toml and the extras are unchanged.
# TRAJDIST_VENV=DIR uses an existing environment and installs nothing.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC2034  # For the scripts that source this file.
venv=${TRAJDIST_VENV:-.venv}
# Container images often set this. Every process would compile all of torch anew, for 10 to 20 s.
[ -n "${TRAJDIST_VENV:-}" ] || unset PYTHONDONTWRITEBYTECODE

make_environment() {
  local extras=$1 stamp
  [ -z "${TRAJDIST_VENV:-}" ] || return 0
  stamp=".venv/.installed-$extras-$(cksum setup.cfg pyproject.toml | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "trajdist needs Python 3.10 or newer; $python is $("$python" --version). Set PYTHON=/path/to/python3." >&2
    exit 2
  fi
  if [ ! -x .venv/bin/pip ]; then
    echo "+ $python -m venv .venv"
    "$python" -m venv .venv
  fi
  echo "+ .venv/bin/pip install -e '.[$extras]'"
  # Python compiles what is imported; pip would compile all of torch, which takes a minute.
  .venv/bin/pip install --quiet --disable-pip-version-check --no-compile -e ".[$extras]"
  rm -f .venv/.installed-"$extras"-*
  touch "$stamp"
}
