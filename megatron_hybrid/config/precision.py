"""What each precision recipe is: formats, scaling, and which layers it leaves in BF16.

Torch-free: rules, planner and kernels read the same table.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.run import RunConfig

E4M3, E5M2 = "e4m3", "e5m2"
# Delayed scaling goes by the largest value in so many steps (Transformer Engine's default).
AMAX_HISTORY = 1024


@dataclass(frozen=True)
class Float8Recipe:
    """How the operands of a linear's matrix products become float8.

    Attributes:
        engine_name: megatron-core's `fp8_recipe`.
        gradients: format of gradients; weights and activations are E4M3.
        scaling: "current" (one scale a tensor, from its own largest value), "delayed" (from the
            largest of the steps before), "tiles" (128 x 128 of a weight, 1 x 128 of the rest) or
            "blocks" (1 x 32, powers of two).
        end_layers_in_bf16: how many layers of the pattern stay in BF16 at either end.
        width_multiple: what the widths of a matrix must be multiples of, on each rank.
        tokens_multiple: the same of the tokens on a rank.
        capability: the least compute capability of a GPU that runs it.
        capability_below: the least above that which does not; None: all above do.
    """

    engine_name: Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
    gradients: str
    scaling: Literal["current", "delayed", "tiles", "blocks"]
    end_layers_in_bf16: int
    width_multiple: int = 16
    tokens_multiple: int = 8
    capability: tuple[int, int] = (8, 9)
    capability_below: tuple[int, int] | None = None

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability runs it."""
        below = self.capability_below
        return self.capability <= capability and (below is None or capability < below)

    @property
    def engine_format(self) -> Literal["e4m3", "hybrid"]:
        """megatron-core's `fp8`: "hybrid" has gradients of another format."""
        return "hybrid" if self.gradients == E5M2 else "e4m3"


# Nemotron-H (arXiv 2504.03624) and Nemotron Nano 2 (arXiv 2508.14444) leave the first and last four
# matrix products in BF16, which are those of two layers, as every layer has two. Widths and tokens
# are those that Transformer Engine's `assert_dim_for_fp8_exec` and its MXFP8 blocks take;
# capabilities those that its 2.20.2 accepts on entering the recipe's context.
FLOAT8_RECIPES = {
    "fp8_tensorwise": Float8Recipe("tensorwise", E5M2, "current", 2),
    "fp8_blockwise": Float8Recipe("blockwise", E4M3, "tiles", 2, capability=(9, 0)),
    "fp8_delayed": Float8Recipe("delayed", E5M2, "delayed", 0),
    "mxfp8": Float8Recipe(
        "mxfp8", E4M3, "blocks", 0, width_multiple=32, tokens_multiple=32,
        capability=(10, 0), capability_below=(12, 0),
    ),
}  # fmt: skip


def float8_layers(config: RunConfig) -> list[int]:
    """The numbers (from 1) of the layers of a resolved config whose linears are in float8."""
    precision = config.precision
    if precision.recipe not in FLOAT8_RECIPES:
        return []
    count = parse_pattern(config.model.hybrid_layer_pattern).num_layers
    at_start = precision.num_layers_at_start_in_bf16 or 0
    return list(range(1 + at_start, 1 + count - (precision.num_layers_at_end_in_bf16 or 0)))
