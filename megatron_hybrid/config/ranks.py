"""What one rank has of a run: its copy of the model, its tokens of a micro batch.

Its channels of each layer are in `linears.py`. Rules, trainer and planner ask here, so that no one
of them knows a way of dividing that the others do not.
"""

from math import prod

from megatron_hybrid.config.run import RunConfig

TP = "parallel.tensor_model_parallel_size"
CP = "parallel.context_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"

Factors = dict[str, int]


def model_ranks(c: RunConfig) -> Factors:
    """By field, the sizes whose product are the ranks that hold one copy of the dense layers."""
    p = c.parallel
    return {
        TP: p.tensor_model_parallel_size,
        PP: p.pipeline_model_parallel_size,
        CP: p.context_parallel_size,
    }


def expert_ranks(c: RunConfig) -> Factors:
    """The same of the experts."""
    p = c.parallel
    return {
        ETP: p.expert_tensor_parallel_size or 1,
        EP: p.expert_model_parallel_size,
        PP: p.pipeline_model_parallel_size,
    }


def sequence_ranks(c: RunConfig, *, gathered: bool = False) -> Factors:
    """By field, the sizes whose product are the ranks that share the tokens of a sequence.

    Args:
        gathered: where tensor-parallel ranks all see what their context-parallel rank has: inside
            a layer. Between layers, where linears take their inputs from, sequence parallelism
            splits it once more.
    """
    p = c.parallel
    split = p.sequence_parallel and not gathered
    return {CP: p.context_parallel_size} | ({TP: p.tensor_model_parallel_size} if split else {})


def rank_tokens(c: RunConfig, seq_length: int, *, gathered: bool = False) -> int:
    """Tokens of a micro batch on a rank; a length that does not divide is cut off: rules refuse it.

    Args:
        seq_length: of a sample, which differs from phase to phase.
        gathered: as for `sequence_ranks`.
    """
    shared = seq_length // prod(sequence_ranks(c, gathered=gathered).values())
    return shared * c.training.micro_batch_size


def data_parallel_size(c: RunConfig, world_size: int) -> int:
    """Copies of the model on so many ranks; 0 where they are not a whole number of copies."""
    copies, rest = divmod(world_size, prod(model_ranks(c).values()))
    return 0 if rest else copies


def written(factors: Factors) -> str:
    """Factors as a sentence has them: "a.b=2 * c.d=4"."""
    return " * ".join(f"{name}={value}" for name, value in factors.items())
