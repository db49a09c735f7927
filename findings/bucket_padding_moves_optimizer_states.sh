#!/usr/bin/env bash
# Where gradients are reduced in several buckets, megatron-core's fully reshardable checkpoints hold
# optimizer states of other parameters than their keys say, and zeros.
#
# The distributed optimizer lays parameters out in buckets that are filled up to a multiple of 128
# numbers, and how many buckets there are (by size, or one for an embedding that stages share) is
# thought to be nobody's business but the reduction's. For a checkpoint it takes from each bucket what it
# holds without what fills it up, one after the other, and then cuts each parameter's part out at its
# place in the layout *with* what fills it up: behind the first bucket that is filled up, all parts are
# shifted. What a run goes on from then are main weights and moments of its neighbours. The engine says
# so in one line of its log, about the last of them only ("can lead to data corruption"), and nothing
# says so at the load. In one bucket, all is right.
#
# torch 2.13.0, megatron-core 0.19.2, Python 3.12; on a CPU, for which the script answers what the engine
# asks of a GPU. Three parameters of 100 numbers, whose numbers, and those of their states, are all 1, 2
# and 3. Seen, what the checkpoint would hold of each:
#   buckets of 100: layers.0 0 1 | layers.1 1 2 | layers.2 3
#   one bucket:     layers.0 1 | layers.1 2 | layers.2 3
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir torch==2.13.0 megatron-core==0.19.2 psutil

cat >"$folder/try.py" <<'PYTHON'
import sys

import torch
from torch.overrides import TorchFunctionMode

# What the engine asks of a GPU, answered by a CPU.
CPU = torch.device("cpu")
torch.cuda.current_device = lambda: CPU
torch.Tensor.cuda = lambda self, *args, **named: self
type_of = torch.Tensor.type


def cuda_type(self, *args):
    found = type_of(self, *args)
    return found if args or "cuda" in found else found.replace("torch.", "torch.cuda.")


torch.Tensor.type = cuda_type


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        return function(*args, **kwargs)


OnCpu().__enter__()
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}/ranks", rank=0, world_size=1
)

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

parallel_state.initialize_model_parallel()
config = TransformerConfig(num_layers=1, hidden_size=10, num_attention_heads=1)


class Model(MegatronModule):
    def __init__(self):
        super().__init__(config)
        self.layers = torch.nn.ParameterList(
            torch.nn.Parameter(torch.full((10, 10), float(number))) for number in (1, 2, 3)
        )

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {
            f"layers.{i}": ShardedTensor.from_rank_offsets(f"layers.{i}", each)
            for i, each in enumerate(self.layers)
        }


def saved(bucket_size):
    """Which numbers a checkpoint would hold, by key of an optimizer's state."""
    reduction = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket_size
    )
    model = DistributedDataParallel(config, reduction, Model())
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True), [model]
    )
    for group in optimizer.optimizer.param_groups:
        for main in group["params"]:
            moments = {"exp_avg": main.detach().clone(), "exp_avg_sq": main.detach().clone()}
            optimizer.optimizer.state[main] = {**moments, "step": torch.tensor(1.0)}
    state = optimizer.sharded_state_dict(
        model.module.sharded_state_dict(),
        metadata={
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
        },
    )
    tensors = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    return {each.key: sorted({int(x) for x in each.data.flatten()}) for each in tensors}


expected = {"buckets of 100: ": [[0, 1], [1, 2], [3]], "one bucket:     ": [[1], [2], [3]]}
found = {}
for name, size in zip(expected, (100, 10**6)):
    states = saved(size)
    kinds = ("param", "exp_avg", "exp_avg_sq")
    of_kinds = [[states[f"optimizer.state.{kind}.layers.{i}"] for i in range(3)] for kind in kinds]
    assert of_kinds[0] == of_kinds[1] == of_kinds[2], of_kinds
    found[name] = of_kinds[0]
    print(name + " | ".join(f"layers.{i} {' '.join(map(str, x))}" for i, x in enumerate(of_kinds[0])))
sys.exit(found != expected)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/try.py" "$folder" 2>/dev/null
