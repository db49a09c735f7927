#!/usr/bin/env bash
# Trains a small dense model, then goes on from its checkpoint in two ways on the same tokens: as it
# is, and upcycled into 16 fine-grained experts of which a token visits 4, as many channels as
# before. About a quarter of an hour on two cores. README.md has the pictures, and what they show.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/04_upcycling
runs=runs/upcycling
# The learning rate warms up once more, to a lower peak, on both sides.
again=(training.exit_interval=null optimizer.lr=2e-3 optimizer.min_lr=2e-5
    optimizer.lr_decay_samples=null)

python examples/01_quickstart/prepare.py
megatron-hybrid pretrain $here/dense.yaml --nproc 2
megatron-hybrid pretrain --load $runs/base/checkpoints --nproc 2 \
    run_dir=$runs/dense optimizer.restart_schedule=true "${again[@]}"
[ -e $runs/moe/checkpoints ] || megatron-hybrid upcycle --load $runs/base --save $runs/moe/checkpoints \
    --experts 4 --granularity 4 --topk 4 "${again[@]}"
megatron-hybrid pretrain --load $runs/moe/checkpoints --nproc 2
python tools/plot_run.py $runs/dense $runs/moe -o $runs/dense_and_upcycled.png
python tools/plot_run.py $runs/moe --experts
