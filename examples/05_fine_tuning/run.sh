#!/usr/bin/env bash
# Trains a small hybrid model on Python's own documentation, fine-tunes it on questions and answers
# about Python's library, and asks it one. docs/sft.md has what it shows.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/05_fine_tuning
data=data/fine_tuning
runs=runs/fine_tuning
with=(--tokenizer-type huggingface --tokenizer-model "$data/tokenizer")

python $here/make_conversations.py
megatron-hybrid data tokenize --input $data/docs.jsonl --output $data/docs "${with[@]}"
for source in what takes; do
    megatron-hybrid data tokenize --chat --input $data/$source.jsonl --output $data/$source "${with[@]}"
done
megatron-hybrid data show $data/what --chat 0 --tokenizer-model $data/tokenizer

megatron-hybrid pretrain $here/base.yaml
megatron-hybrid pretrain --load $runs/base/checkpoints run_dir=$runs/sft checkpoint.finetune=true \
    training.objective=sft \
    "data.sources={what: {path: $data/what}, takes: {path: $data/takes}}" \
    'data.phases=[{name: both, weights: {what: 2, takes: 1}},
        {name: what, start_fraction: 0.8, weights: {what: 1}}]' \
    training.train_iters=100 training.eval_interval=25 training.eval_iters=2 \
    checkpoint.save_interval=100 \
    optimizer.lr=2e-3 optimizer.min_lr=2e-5 optimizer.lr_warmup_samples=160

question="<|im_start|>system
You know Python's library.<|im_end|>
<|im_start|>user
What does is_dir do?<|im_end|>
<|im_start|>assistant
"
megatron-hybrid generate $runs/sft --parse-special-tokens --prompt "$question"
