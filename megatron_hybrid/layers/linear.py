"""Linears under tensor and sequence parallelism, one of them with the norm before it.

Legend: s sequence (of this rank), b batch, h hidden size, o output size of this TP rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear as EngineColumnParallelLinear,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear as EngineRowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_hybrid.layers.norm import norm_weight, parameter_device
from megatron_hybrid.ops.gated_norm import rms_norm_grouped
from megatron_hybrid.ops.linear import linear


def parallel_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: ProcessGroup | None,
    product: Callable[[Tensor, Tensor], Tensor] = linear,
    **unused: object,
) -> Tensor:
    """The product in a column- or row-parallel linear: its `_forward_impl`.

    With sequence parallelism the gathered input is kept for the backward pass, where the engine
    gathers it anew: between processes of one machine that costs more than the memory.

    Args:
        input: `[s, b, h]`.
        weight: `[o, h]`.
        bias: `[o]`.
        allreduce_dgrad: add up the input's gradient over TP.
        sequence_parallel: gather the input over TP, and scatter the sum of its gradient.
        tp_group: may be None where neither is asked for.
        product: `ops.linear.linear`, or another with its arguments.
        unused: what the engine's own product is told beside these.

    Returns:
        `[s, b, o]`, with sequence parallelism `[s * TP, b, o]`.
    """
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = product(input, weight)
    return output if bias is None else output + bias


class ColumnParallelLinear(EngineColumnParallelLinear):
    """The engine's linear with the weight split by rows over TP, on our product."""

    _forward_impl = staticmethod(parallel_linear)


class RowParallelLinear(EngineRowParallelLinear):
    """The engine's linear with the weight split by columns over TP, on our product."""

    _forward_impl = staticmethod(parallel_linear)

    def __init__(self, *args: Any, is_expert: bool, **named: Any) -> None:
        super().__init__(*args, is_expert=is_expert, **named)
        if not is_expert:
            return
        # On one rank the engine would reduce an expert's output over that rank alone, and fail to
        # add its bias to what comes of it.
        self.explicit_expert_comm = True
        if self.bias is not None and self.tp_group.size() == 1:
            # A whole expert sees tokens of all TP ranks that share it, over which its gradients are
            # added up as over any others: not once more as those of sequence parallelism.
            self.bias.sequence_parallel = False


class WholeLinear(nn.Module):
    """A linear that every TP rank has all of, and that sees this rank's own tokens.

    What Transformer Engine's is with `parallel_mode="duplicated"`. The engine adds up the gradients
    of its parameters over TP under sequence parallelism; without that they are alike.

    Forward: `[s, b, h]` -> (`[s, b, o]` with the bias added, None).
    """

    _forward_impl = staticmethod(parallel_linear)

    def __init__(
        self, input_size: int, output_size: int, config: TransformerConfig, init_method: Callable
    ) -> None:
        super().__init__()
        made = {"dtype": config.params_dtype, "device": parameter_device(config)}
        self.weight = nn.Parameter(torch.empty(output_size, input_size, **made))
        self.bias = (
            nn.Parameter(torch.zeros(output_size, **made)) if config.add_bias_linear else None
        )
        if config.perform_initialization:
            init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        output = self._forward_impl(
            input, self.weight, self.bias,
            allreduce_dgrad=False, sequence_parallel=False, tp_group=None,
        )  # fmt: skip
        return output, None


def made_again_in_backward(
    tensor: Tensor, make: Callable[[], Tensor]
) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which operations keep `make` instead of `tensor` for their backward pass.

    For a tensor that is cheap to make from others which are kept anyway.
    """
    # Not the tensor itself, which autograd would keep as long as `pack`.
    identity = (tensor.data_ptr(), tensor.shape)

    def pack(saved: Tensor) -> Tensor | None:
        return None if (saved.data_ptr(), saved.shape) == identity else saved

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        with torch.no_grad():
            return make()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """`TELayerNormColumnParallelLinear` for any device: RMSNorm, then the engine's linear.

    Parameters and checkpoint keys have Transformer Engine's names (`layer_norm_weight`, `weight`,
    `bias`). The norm runs on this rank's part of the sequence, before the all-gather of sequence
    parallelism.

    Forward: `[s, b, h]` -> (`[s * TP, b, o]` with sequence parallelism, else `[s, b, o]`; bias).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        **linear_arguments: Any,
    ) -> None:
        super().__init__(
            input_size, output_size, config=config, init_method=init_method, **linear_arguments
        )
        self.layer_norm_weight = norm_weight(config, input_size, config.sequence_parallel)
        self.eps = config.layernorm_epsilon

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        def norm() -> Tensor:
            weight = self.layer_norm_weight
            return rms_norm_grouped(hidden_states, weight, weight.numel(), self.eps)

        normed = norm()
        with made_again_in_backward(normed, norm):
            return super().forward(normed)
