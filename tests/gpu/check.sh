#!/usr/bin/env bash
# What one GPU can say of this checkout, in at most nine minutes and without a network: is it right
# (kernels, layers, float8, resume), how fast, how large, and how far off the planner is.
#
#   tests/gpu/check.sh [--wheels FOLDER] [--out FOLDER] [--minutes M] [--steps NAME...] [--toy]
#
# docs/gpu.md says how FOLDER is filled, and what comes out. PYTHON=/path/to/python3 names another.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -P -m tests.gpu.check "$@"
