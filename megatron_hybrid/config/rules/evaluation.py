"""Rules of a layout that evaluates: ranks divide the model, its sequences and what is evaluated."""

from megatron_hybrid.config.ranks import CP
from megatron_hybrid.config.rules.common import Rule
from megatron_hybrid.config.rules.data import DATA
from megatron_hybrid.config.rules.files import DATA_FILES, data_given
from megatron_hybrid.config.rules.generation import LAYOUT_FIELDS, pipeline_stages
from megatron_hybrid.config.rules.model import MODEL
from megatron_hybrid.config.rules.parallel import (
    expert_parallel,
    expert_tensor_parallel_device,
    mamba_context_parallel,
    packed_context_parallel,
    sequence_length,
    state_passing,
    tensor_parallel,
    world_size,
)

EVALUATED_LAYOUT = (*LAYOUT_FIELDS, CP)
# Which samples an evaluation of the run's own data takes.
EVALUATED_DATA = (
    "data.data_path", "data.sources", "data.phases", "data.split", "data.packed_documents",
    "training.eval_iters",
)  # fmt: skip
WINDOWS = "data.seq_length"  # tokens of a window, of any data

EVALUATION: tuple[Rule, ...] = (
    *MODEL, tensor_parallel, mamba_context_parallel, state_passing, expert_parallel,
    expert_tensor_parallel_device, pipeline_stages, world_size,
)  # fmt: skip
OWN_DATA: tuple[Rule, ...] = (
    sequence_length, packed_context_parallel, *DATA, data_given, *DATA_FILES,
)  # fmt: skip
