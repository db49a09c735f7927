#!/usr/bin/env bash
# The backward of Mamba in transformers without CUDA writes memory that grows with the square of the
# sequence's length.
#
# The scan that runs where there are no kernels goes from token to token, and is thought to take time
# and memory traffic that grow with the length. Forward it does. But it takes each token's decay and
# input out of tensors of all tokens by indexing, and the gradient of an index is a tensor of the whole
# shape, zero but for that token, which is added to the others: each token writes all tokens. At 2048
# tokens the backward takes some hundred times as long as the forward, so that a CPU is taken for
# slower than it is, and a test of a longer text for hanging.
#
# transformers 5.24.0, torch 2.13.0, Python 3.12; one layer, 64 channels, 16 states. Seen, MiB that a
# forward, and a forward with its backward, allocate in all, and the growth of the last from 256 to 512:
#   tokens   forward   both
#      128       3.7    138.7
#      256       7.3    535.3
#      512      14.7   2102.5
#   twice the tokens: 2.0 times forward, 3.9 times both
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir transformers==5.24.0 torch==2.13.0

cat >"$folder/try.py" <<'PYTHON'
import sys

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MambaConfig, MambaForCausalLM

config = MambaConfig(
    hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=16, use_cache=False
)
model = MambaForCausalLM(config)


def allocated_mib(tokens, backward):
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(ids).logits.sum()
        if backward:
            loss.backward()
    sizes = (event.self_cpu_memory_usage for event in profiled.key_averages())
    return sum(size for size in sizes if size > 0) / 2**20


print("tokens   forward   both")
seen = {}
allocated_mib(16, True)  # gradients of the parameters exist from here on
for tokens in (128, 256, 512):
    seen[tokens] = allocated_mib(tokens, False), allocated_mib(tokens, True)
    print(f"{tokens:6} {seen[tokens][0]:9.1f} {seen[tokens][1]:8.1f}")
forward, both = (seen[512][part] / seen[256][part] for part in (0, 1))
print(f"twice the tokens: {forward:.1f} times forward, {both:.1f} times both")
sys.exit(not (1.9 < forward < 2.1 and both > 3.7))
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2>/dev/null
