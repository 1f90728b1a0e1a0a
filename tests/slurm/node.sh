#!/usr/bin/env bash
# The first process of a virtual node, in namespaces of its own: host name, hosts file, slurmd. Killing it is a power cut.
#   node.sh BASE NAME
set -eu
hostname "$2"
mount --bind "$1/etc/hosts" /etc/hosts
slurmd -D -N "$2" &
slurmd=$!
trap 'kill -TERM "$slurmd"' TERM
# As process 1 it also reaps the orphans.
while kill -0 "$slurmd" 2> /dev/null; do wait "$slurmd" || true; done
