#!/usr/bin/env bash
# Who compiles nothing loads torch's compiler all the same: importing megatron-core loads TorchInductor,
# and to construct an optimizer of torch loads TorchDynamo.
#
# A decorator @torch.compile is thought to be lazy, as compilation happens at the first call, and an
# optimizer in eager mode to have nothing to do with a compiler. But torch.compile looks its backend up
# when it decorates, and "inductor", the default, is imported for that: megatron-core has one such
# decorator in the MoE router, which every import of the engine reaches. And what is marked to be left
# alone by the compiler (Optimizer.add_param_group, which the constructor calls; state_dict,
# load_state_dict, zero_grad) imports the compiler at its first call, to ask it for that.
# Either is about a second of CPU time in each process, so in each rank of a job.
#
# torch 2.13.0, megatron-core 0.19.2, Python 3.12. Seen:
#   torch.optim.SGD: torch._dynamo before and after: False True
#   import megatron.core: torch._inductor.compile_fx before and after: False True
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir torch==2.13.0 megatron-core==0.19.2

loaded() { # which statements, one a line, load which module; each list in a process of its own
    "$folder/venv/bin/python" -W ignore - "$@" <<'PROGRAM'
import logging, sys
logging.disable(logging.WARNING)
name, *statements = sys.argv[1:]
seen = []
for statement in statements:
    exec(statement)
    seen.append(name in sys.modules)
print(*seen)
PROGRAM
}

failed=0
expect() {
    echo "$1: $2"
    [ "$2" = "$3" ] || { echo "  changed: was $3"; failed=1; }
}
expect "torch.optim.SGD: torch._dynamo before and after" \
    "$(loaded torch._dynamo 'import torch' 'torch.optim.SGD([torch.zeros(1, requires_grad=True)])')" \
    "False True"
expect "import megatron.core: torch._inductor.compile_fx before and after" \
    "$(loaded torch._inductor.compile_fx 'import torch' 'import megatron.core')" "False True"
exit $failed
