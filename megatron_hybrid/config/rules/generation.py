"""Rules of a layout that generates: ranks divide the model as in training, and nothing else."""

from math import lcm

from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.ranks import EP, ETP, PP, TP
from megatron_hybrid.config.rules.common import Facts, Problems, Rule
from megatron_hybrid.config.rules.model import MODEL
from megatron_hybrid.config.rules.parallel import (
    expert_parallel,
    expert_tensor_parallel_device,
    tensor_parallel,
)
from megatron_hybrid.config.run import RunConfig

# What may be said where a model generates, of layout and loading; the rest of a run's is put off.
LAYOUT_FIELDS = (TP, PP, EP, ETP, "checkpoint.verify_integrity")


def pipeline_stages(c: RunConfig, _: Facts) -> Problems:
    """Every stage has a layer; the pattern is cut anew, wherever the run that trained cut it."""
    pp, layers = c.parallel.pipeline_model_parallel_size, c.model.hybrid_layer_pattern
    count = parse_pattern(layers).num_layers
    if pp > count:
        yield f"{PP}={pp} must be at most the layers of model.hybrid_layer_pattern, {count}"


def one_copy(c: RunConfig, facts: Facts) -> Problems:
    """The ranks hold the model once: all of them compute every token."""
    p = c.parallel
    experts = p.expert_model_parallel_size * (p.expert_tensor_parallel_size or 1)
    ranks = p.pipeline_model_parallel_size * lcm(p.tensor_model_parallel_size, experts)
    if facts.world_size is not None and facts.world_size != ranks:
        yield (
            f"the number of ranks, {facts.world_size}, must be {ranks}, as {TP}="
            f"{p.tensor_model_parallel_size}, {PP}={p.pipeline_model_parallel_size} and {EP}="
            f"{p.expert_model_parallel_size} hold the model once; allowed: --nproc {ranks}, or "
            "another layout"
        )


GENERATION: tuple[Rule, ...] = (
    *MODEL, tensor_parallel, expert_parallel, expert_tensor_parallel_device, pipeline_stages,
    one_copy,
)  # fmt: skip
