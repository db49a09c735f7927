#!/usr/bin/env bash
# Importing megatron-core imports Weights & Biases where that happens to be installed, though nothing is
# logged there: each rank of a job pays for it at its start.
#
# A library that can log to a service is thought to import its client when it is asked to log. But
# megatron.core's own __init__ imports its timers, and these import wandb at their top for a method that
# writes times there. wandb makes temporary folders as it is imported, one for media and one for
# artifacts, which a process that is killed leaves behind.
#
# torch 2.13.0, megatron-core 0.19.2, wandb 0.31.0, Python 3.12. Seen:
#   import megatron.core: wandb before and after: False True
#   folders of wandb in the temp folder before and after: 0 2
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir torch==2.13.0 megatron-core==0.19.2 wandb==0.31.0
mkdir "$folder/temp"

seen=$(TMPDIR="$folder/temp" "$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import logging, os, sys, tempfile
logging.disable(logging.WARNING)
import torch
def look():
    names = os.listdir(tempfile.gettempdir())
    return "wandb" in sys.modules, sum("wandb" in name for name in names)
before = look()
import megatron.core
after = look()
print(before[0], after[0], before[1], after[1])
PROGRAM
)
read -r loaded_before loaded_after folders_before folders_after <<<"$seen"
failed=0
expect() {
    echo "$1: $2"
    [ "$2" = "$3" ] || { echo "  changed: was $3"; failed=1; }
}
expect "import megatron.core: wandb before and after" "$loaded_before $loaded_after" "False True"
expect "folders of wandb in the temp folder before and after" "$folders_before $folders_after" "0 2"
exit $failed
