#!/usr/bin/env bash
# Trains a small hybrid model on this computer's own Python library, over two ranks, and plots it.
# Running it again resumes where the last run ended, or says that all is done.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/01_quickstart
run=runs/quickstart

python $here/prepare.py
megatron-hybrid pretrain $here/quickstart.yaml --nproc 2
plot=$(python tools/plot_run.py $run)

bin=$(dirname "$(command -v megatron-hybrid)")
bin=${bin#"$PWD/"}

cat <<RESULT

plot         $plot
data         $run/data_plan.png
metrics      $run/metrics.jsonl  ($bin/tensorboard --logdir $run/tensorboard)
checkpoints  $run/checkpoints
write text   $bin/megatron-hybrid generate $run --prompt 'def main('
RESULT
