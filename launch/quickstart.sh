#!/usr/bin/env bash
# Makes .venv, installs, and runs the whole job on an embedded data set: bash launch/quickstart.sh [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment quickstart
echo "+ trajdist run quickstart $*"
.venv/bin/trajdist run quickstart "$@"
