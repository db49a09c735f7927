#!/usr/bin/env bash
# megatron-core weighs the tokens of multi-token prediction by what a micro batch of a rank has left, so
# that the same tokens in other micro batches, or cut by context parallelism, train another function.
#
# With calculate_per_token_loss a step's gradient is the sum over tokens, divided by how many there are in
# the global batch: however samples fall on ranks and micro batches, it is the same. Labels of the k-th
# module are rolled by k places, which leaves k tokens of each document without one, and process_mtp_loss
# makes up for them with (tokens before rolling) / (tokens after it), both counted on the rank and in the
# micro batch at hand. Two documents of 6 and 2 tokens weigh 8/6 each token in one row, and 6/5 and 2/1 in
# rows of their own. (DeepSeek-V3 divides by the tokens before rolling, so that every token weighs 1.)
#
# torch 2.13.0, megatron-core 0.19.2, Python 3.12. Seen:
#   weights of the tokens in one row: 1.333 1.333
#   weights of the tokens in two rows: 1.200 2.000
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir torch==2.13.0 megatron-core==0.19.2

cat >"$folder/try.py" <<'PYTHON'
import sys
from types import SimpleNamespace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import process_mtp_loss

config = SimpleNamespace(
    mtp_num_layers=1, mtp_detach_heads=False, mtp_loss_scaling_factor=1.0,
    calculate_per_token_loss=True,
)


def weights(*lengths):
    """What the gradient has of the first token of each document, all of them in one row."""
    tokens = sum(lengths)
    hidden = torch.zeros(2 * tokens, 1, 1, requires_grad=True)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    out = process_mtp_loss(
        hidden, torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens),
        lambda states, **_: (states, None), None, None, False,
        lambda labels, logits: logits[..., 0].t(), config,
        packed_seq_params=PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends),
    )
    out.sum().backward()
    of_module = hidden.grad[tokens:, 0, 0]
    return [round(float(of_module[first]), 3) for first in ends[:-1]]


together, apart = weights(6, 2), weights(6) + weights(2)
print("weights of the tokens in one row:", *(f"{each:.3f}" for each in together))
print("weights of the tokens in two rows:", *(f"{each:.3f}" for each in apart))
sys.exit((together, apart) != ([1.333, 1.333], [1.2, 2.0]))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py"
