"""Whether the ranks can divide every global batch that is still to come."""

import math

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.ranks import data_parallel_size
from megatron_hybrid.config.rules.common import divisors, listing
from megatron_hybrid.data.batches import Steps
from megatron_hybrid.errors import UserError


def check_batch_sizes(
    config: RunConfig, steps: Steps, consumed_samples: int, world_size: int | None
) -> None:
    """Refuse a run of which some global batch is not a whole number of micro-batches on each rank.

    The last batch of a phase may be short where the size of the batches was changed in mid-run.

    Args:
        world_size: None: not known; what any number of ranks needs is checked.

    Raises:
        UserError: with the sizes, and by what they are divided.
    """
    parallel, micro_batch_size = config.parallel, config.training.micro_batch_size
    stages = parallel.pipeline_model_parallel_size
    factors = {"training.micro_batch_size": micro_batch_size}
    if world_size is not None:
        factors["data-parallel size"] = data_parallel_size(config, world_size)
    if parallel.virtual_pipeline_model_parallel_size is not None and stages > 1:
        factors["parallel.pipeline_model_parallel_size"] = stages  # interleaved stages take turns
    unit = math.prod(factors.values())
    sizes = sorted(steps.batch_sizes_from(consumed_samples))
    wrong = [size for size in sizes if size % unit]
    if wrong:
        product = " * ".join(f"{name}={value}" for name, value in factors.items())
        raise UserError(
            f"global batches of {listing(wrong)} samples lie ahead (from sample "
            f"{consumed_samples} on, the last of a phase may be short), and each must be a "
            f"multiple of {product} = {unit}; "
            f"allowed for the product: {listing(divisors(math.gcd(*sizes)))}"
        )
