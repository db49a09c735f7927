#!/usr/bin/env bash
# The whole test suite: `tools/test.sh PYTHON`. Jobs on a Slurm of their own mostly wait and start up;
# they run beside the rest, at a lower priority, and what they print comes last.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${1:-python}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
nice -n 5 "$python" -m pytest tests/slurm >"$log" 2>&1 </dev/null &
slurm=$!

status=0
"$python" -m pytest --ignore=tests/slurm || status=1
wait $slurm || status=1
cat "$log"
exit $status
