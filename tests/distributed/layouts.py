"""The same few training steps of the same model, on the ranks of any layout.

`train_steps` runs on each rank; `merge_gradients` puts the ranks' parts together again.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.config import RunConfig, build_config
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.packing import pack_documents

STEPS = 2  # the second is of updated weights; more of them: test_resharding
SEQ_LENGTH = 64
GLOBAL_BATCH_SIZE = 4
VOCAB_SIZE = 75  # of 96 rows
LABELS = 3
EOD = 0
# As many layers as the finest cut has stages: what a layout adds is between and in layers, of which
# each kind is there, and experts in either half.
DENSE = "M-*M"
MOE = "ME*E"
DIFFUSION = "*E-*"  # trained by masked diffusion, with biases
DIFFUSION_FIELDS = {"add_bias_linear": True, "moe_shared_expert_intermediate_size": None}
# Attention and Mamba side by side, Mamba-1 and Mamba-2, with every multiplier, of two sizes, with
# biases.
HEADS = "H-*H"
HEADS_FIELDS = {
    "activation": "swiglu", "add_bias_linear": True, "mamba_rms_norm": False, "key_multiplier": 0.7,
    "ssm_multipliers": [0.4, 0.6, 1.5, 0.8, 1.2], "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.6, "attention_in_multiplier": 0.9, "attention_out_multiplier": 0.8,
    "mlp_multipliers": [0.9, 0.6], "embedding_multiplier": 3.0, "lm_head_multiplier": 0.5,
    "layers": {
        "1": {"mamba_version": 1, "mamba_dt_rank": 3},
        "4": {
            "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 8,
            "mamba_num_heads": 4, "mamba_head_dim": 24, "mamba_state_dim": 8,
            "mamba_num_groups": 4, "window_size": [20, 0],
        },
    },
}  # fmt: skip
# What Hymba has: one projection to attention and Mamba-1 and one from both, norms within Mamba-1,
# meta tokens, keys and values of another layer.
HYMBA = "M*-H-H"
HYMBA_FIELDS = {
    "activation": "swiglu", "parallel_heads_join": "mean", "mamba_version": 1,
    "mamba_inner_layernorms": True, "mamba_dt_rank": 3, "mamba_state_dim": 8,
    "num_meta_tokens": 8, "embedding_multiplier": 2.0,
    "layers": {
        "1": {"mamba_version": 2}, "2": {"window_size": [5, 0]}, "4": {"window_size": [20, 0]},
        "6": {"window_size": [9, 0], "reuse_kv": True},
    },
}  # fmt: skip
# Gated delta nets of two sizes, with as many value heads as key heads, and with three a key head.
DELTA = "GG"
DELTA_SIZES = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 16, "num_meta_tokens": 8,
    "layers": {"2": {"linear_num_value_heads": 12, "linear_value_head_dim": 8}},
}  # fmt: skip
# Heads and groups that context parallelism of four does not divide.
STATES = "MM*GH"
STATES_SIZES = {
    "mamba_num_heads": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    "layers": {
        "2": {
            "mamba_version": 1, "mamba_state_dim": 8, "mamba_intermediate_size": 90,
            "mamba_dt_rank": 3,
        },
        "5": {"mamba_head_dim": 8, "mamba_state_dim": 8},
    },
}  # fmt: skip
# Predicts two more tokens, with layers of their own after the last.
AHEAD = "M-*E"
AHEAD_FIELDS = {
    "mtp_num_layers": 2, "mtp_hybrid_override_pattern": "*E", "mtp_loss_scaling_factor": 0.3,
    "embedding_multiplier": 3.0,
}  # fmt: skip
# Two of each kind, the second of which is unlike the first: Mamba-1 and Mamba-2, other numbers of
# heads, which are as wide or not, groups of the gated norm, angles of RoPE, activations and
# experts, which biases balance: of the first layer latent, of the second in groups.
UNLIKE = "M-*EM-*E"
UNLIKE_LAYERS = {
    "1": {
        "mamba_version": 1, "mamba_state_dim": 8, "mamba_intermediate_size": 96, "mamba_dt_rank": 3,
    },
    "4": {"moe_latent_size": 24},
    "5": {"mamba_num_heads": 4, "mamba_head_dim": 24, "mamba_state_dim": 8, "mamba_num_groups": 4},
    "5-6": {"ffn_hidden_size": 96, "activation": "swiglu"},
    "7": {
        "num_attention_heads": 6, "num_query_groups": 6, "kv_channels": 8, "window_size": [20, 0],
    },
    "8": {
        "num_moe_experts": 6, "moe_ffn_hidden_size": 48, "moe_router_topk": 3,
        "moe_shared_expert_intermediate_size": None, "activation": "gelu",
        "moe_router_num_groups": 3, "moe_router_group_topk": 2,
    },
}  # fmt: skip
UNLIKE_SIZES = {
    "layers": UNLIKE_LAYERS, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; `segments` is how the pattern is cut with `|`; `batch`, how
    many samples a step of the layout test has: two micro-batches a replica, where that shows all.
    """

    name: str
    ranks: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    segments: int = 1
    needs_moe: bool = False
    overlap: bool = False
    state_passing: bool = False
    batch: int = GLOBAL_BATCH_SIZE

    def pattern(self, layers: str) -> str:
        size = len(layers) // self.segments
        return "|".join(layers[i : i + size] for i in range(0, len(layers), size))


ONE_RANK = Layout("one rank", 1, batch=2)
LAYOUTS = (
    Layout("TP2+SP", 2, tp=2, batch=2),
    Layout("PP2", 2, pp=2, segments=2, batch=2),
    Layout("PP2xVPP2", 2, pp=2, segments=4),
    Layout("CP2", 2, cp=2, batch=2),
    Layout("DP2", 2),
    Layout("DP2 overlapped", 2, overlap=True),
    Layout("EP2", 2, ep=2, needs_moe=True),
    Layout("TP2xPP2", 4, tp=2, pp=2, segments=2, batch=2),
    Layout("TP2xCP2", 4, tp=2, cp=2, batch=2),
    Layout("CP2xEP2", 2, cp=2, ep=2, needs_moe=True, batch=2),
    Layout("PP2xEP2", 4, pp=2, ep=2, segments=2, needs_moe=True),
    Layout("DP2xEP2", 4, ep=2, needs_moe=True),
)
# Only of layers with a state: between them nothing differs.
PASSING = (
    Layout("CP2, states passed", 2, cp=2, batch=2, state_passing=True),
    Layout("CP4, states passed", 4, cp=4, batch=2, state_passing=True),
    Layout("TP2xCP2, states passed", 4, tp=2, cp=2, batch=2, state_passing=True),
)


class Variant(NamedTuple):
    """How the steps are done; `sft`: of what is packed, a part is learnt, as of conversations."""

    packed: bool
    recompute: bool = False
    sft: bool = False


def steps_of_variant(layout: Layout, variant: Variant) -> int:
    """How many: what updates the weights is the same in all variants, and is tried in the plain one
    and on one rank; where updates overlap with what computes, in each.
    """
    plain = not (variant.packed or variant.recompute or variant.sft)
    return STEPS if plain or layout.overlap or layout.ranks == 1 else 1


def layout_config(
    layout: Layout,
    layers: str,
    *,
    packed: bool,
    recompute: bool,
    sft: bool = False,
    batch: int = GLOBAL_BATCH_SIZE,
) -> RunConfig:
    """A small fp32 model in a layout; the same weights and data whatever the layout."""
    objective = "masked_diffusion" if layers == DIFFUSION else "sft" if sft else "pretraining"
    moe = {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 32,
        "moe_router_topk": 2,
        "moe_shared_expert_intermediate_size": 32,
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.001,
    }
    return build_config(
        {
            "model": {
                "hybrid_layer_pattern": layout.pattern(layers),
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "position_embedding_type": "rope",
                "mamba_head_dim": 16,
                "mamba_state_dim": 16,
                "mamba_num_groups": 2,
                "vocab_size": VOCAB_SIZE,
                "make_vocab_size_divisible_by": 32,
                "attn_mask_type": "no_mask" if layers == DIFFUSION else "causal",
                **(moe if "E" in layers else {}),
                **(DIFFUSION_FIELDS if layers == DIFFUSION else {}),
                **(UNLIKE_SIZES if layers == UNLIKE else {}),
                **(DELTA_SIZES if layers == DELTA else {}),
                **(STATES_SIZES if layers == STATES else {}),
                **(HEADS_FIELDS if layers == HEADS else {}),
                **(HYMBA_FIELDS if layers == HYMBA else {}),
                **(AHEAD_FIELDS if layers == AHEAD else {}),
            },
            "parallel": {
                "tensor_model_parallel_size": layout.tp,
                "sequence_parallel": layout.tp > 1,
                "pipeline_model_parallel_size": layout.pp,
                "context_parallel_size": layout.cp,
                "mamba_cp_comm_type": "state_passing" if layout.state_passing else "all_to_all",
                "expert_model_parallel_size": layout.ep,
                "overlap_grad_reduce": layout.overlap,
                "overlap_param_gather": layout.overlap,
            },
            "precision": {"recipe": "fp32"},
            "data": {
                "mock_data": True,
                "tokenizer_type": "null",
                "seq_length": SEQ_LENGTH,
                "packed_documents": packed,
            },
            "training": {
                "global_batch_size": batch,
                "train_iters": STEPS,
                "objective": objective,
                "objective_options": {"mask_token_id": EOD} if layers == DIFFUSION else {},
                "recompute_granularity": "full" if recompute else None,
                "recompute_method": "uniform" if recompute else None,
                "recompute_num_layers": 1 if recompute else None,
            },
            # Clipping would scale the gradients that are compared. Adam's first steps are signs,
            # in which rounding of gradients near zero grows to whole steps, unless eps is large.
            "optimizer": {
                "lr": 1e-4,
                "lr_decay_style": "constant",
                "adam_eps": 1e-2,
                "clip_grad": 1e9,
            },
        },
        world_size=layout.ranks,
        has_cuda=False,
    )


def sample(index: int, packed: bool, sft: bool = False) -> Batch:
    """Sample `index` of the run: random tokens, with document ends when packed; with `sft`, few
    samples have as many tokens that are learnt as another."""
    draws = torch.Generator().manual_seed(index)
    tokens = torch.randint(1, VOCAB_SIZE, (1, SEQ_LENGTH + 1), generator=draws)
    if packed:
        tokens[0, torch.randperm(SEQ_LENGTH, generator=draws)[:4]] = EOD
    # Few different labels: gradients of the tokens then add up rather than cancel, and what is
    # compared is not mostly rounding.
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:] % LABELS
    if not packed:
        positions = torch.arange(SEQ_LENGTH)[None]
        return Batch(inputs, labels, torch.ones(1, SEQ_LENGTH), positions, samples=(index,))
    packing = pack_documents(inputs == EOD)
    learnt = torch.rand(1, SEQ_LENGTH, generator=draws) < (1 + index % 5) / 8
    return Batch(
        inputs, labels, packing.loss_mask * (learnt if sft else 1.0), packing.position_ids,
        packing.cu_seqlens, packing.max_seqlen, packing.seq_idx, (index,),
    )  # fmt: skip


def batches_of_this_rank(
    packed: bool, sft: bool = False, batch: int = GLOBAL_BATCH_SIZE
) -> Iterator[Batch]:
    """This data-parallel rank's contiguous share of each global batch, without end."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    share = batch // parallel_state.get_data_parallel_world_size()
    step = 0
    while True:
        first = step * batch + rank * share
        yield from (sample(i, packed, sft) for i in range(first, first + share))
        step += 1


@contextmanager
def built(config: RunConfig) -> Iterator[tuple[list[Any], Any, Any]]:
    """(DDP chunks, optimizer, Stepper) of a config on this rank, as the trainer builds them."""
    with in_groups(config):
        yield build(config)


def in_groups(config: RunConfig) -> AbstractContextManager[None]:
    """The process groups of a config's layout, for all that is built in it."""
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups

    return model_parallel_groups(config, initialize())


def build(config: RunConfig) -> tuple[list[Any], Any, Any]:
    """What `built` gives, within `in_groups`."""
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_hybrid.training.step import Stepper

    device = initialize().device
    engine_config = transformer_config(config, "torch", device)
    chunks = build_model_chunks(config, engine_config, "torch")
    model = wrap_data_parallel(config, engine_config, chunks)
    optimizer = build_optimizer(config, engine_config, model)
    return model, optimizer, Stepper(config, model, optimizer, "torch", device)


def save_weights(layers: str, folder: Path) -> None:
    """A checkpoint that every layout starts from: weights drawn so that each one matters.

    Norms and D are not all ones, so that a permuted or dropped one shows; steps (1e-3 to 0.1) and
    decays (1 to 16) are over the whole of the ranges that Mamba-2's initialisation draws from.
    """
    from megatron.core import dist_checkpointing

    from megatron_hybrid.training.checkpoint_state import model_state, tensor_layout

    ranges = {"norm": (0.5, 1.5), "dt_bias": (-6.9, -2.25), "A_log": (0.0, 2.77), ".D": (-1.0, 1.0)}
    config = layout_config(ONE_RANK, layers, packed=False, recompute=False)
    with built(config) as (model, _, _):
        for name, parameter in model[0].named_parameters():
            low, high = next((r for part, r in ranges.items() if part in name), (-0.2, 0.2))
            parameter.data.uniform_(low, high)
        dist_checkpointing.save(model_state(model, tensor_layout()), str(folder))


def train_variants(
    layout: Layout, layers: str, weights: Path, variants: Sequence[Variant]
) -> list[list[tuple[float, float, dict[str, Any]]]]:
    """On a rank: `train_steps` in each of several variants, for one start of ranks and groups."""
    kept: list[Tensor] = []
    with in_groups(layout_config(layout, layers, packed=False, recompute=False)):
        return [train_steps(layout, layers, weights, variant, kept) for variant in variants]


def train_steps(
    layout: Layout, layers: str, weights: Path, variant: Variant, kept: list[Tensor]
) -> list[tuple[float, float, dict[str, Any]]]:
    """On a rank: the steps' losses, gradient norms and this rank's parts of the gradients.

    Args:
        kept: this rank's weights, as the first variant has loaded them; empty before it.
    """
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.step import BatchShape

    config = layout_config(layout, layers, batch=layout.batch, **variant._asdict())
    results = []
    model, optimizer, stepper = build(config)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    if kept:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)
        optimizer.reload_model_params()
    else:
        load_checkpoint(config, weights, model, optimizer, weights_only=True)
        kept += [parameter.detach().clone() for parameter in parameters]
    data = batches_of_this_rank(variant.packed, variant.sft, layout.batch)
    for _ in range(steps_of_variant(layout, variant)):
        shape = BatchShape(layout.batch, SEQ_LENGTH)
        result = stepper.train(data, shape, float("inf"), [])
        assert result.refusal is None
        results.append((result.loss, result.grad_norm, gradient_parts(model)))
    return results


def gradient_parts(model: list[Any]) -> dict[str, list[tuple[Any, ...]]]:
    """{checkpoint key: [(global shape, global offset, gradient)]} of this rank's parameters.

    The sharded state dict knows where each part of each parameter belongs in the whole model; it
    is built here over the gradients.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_hybrid.training.checkpoint_state import model_state, tensor_layout

    for chunk in model:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            _complete_gradients(buffer)
    values = [(p, p.data) for chunk in model for p in chunk.parameters()]
    try:
        for parameter, _ in values:
            parameter.data = parameter.main_grad
        state = model_state(model, tensor_layout())
        apply_factories(state)
        parts: dict[str, list[tuple[Any, ...]]] = {}
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                place = (tensor.global_shape, tensor.global_offset, tensor.data.clone())
                parts.setdefault(tensor.key, []).append(place)
    finally:
        for parameter, data in values:
            parameter.data = data
    return parts


def _complete_gradients(buffer: Any) -> None:
    """The distributed optimizer leaves each rank its shard of the sum: fetch the others'."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        shards = bucket.grad_data.chunk(group.size())
        mine = shards[group.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def merge_gradients(ranks: list[dict[str, list[tuple[Any, ...]]]]) -> dict[str, Tensor]:
    """The whole gradients; parts that several ranks hold must agree, and nothing be missing."""
    merged: dict[str, Tensor] = {}
    for parts in ranks:
        for key, places in parts.items():
            for shape, offset, gradient in places:
                whole = merged.setdefault(key, torch.full(shape, torch.nan))
                sizes = (1,) * (len(shape) - gradient.dim()) + tuple(gradient.shape)
                view = whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))]
                gradient = gradient.view(sizes)
                if not view.isnan().any():
                    torch.testing.assert_close(gradient, view, rtol=1e-5, atol=1e-7, msg=key)
                view.copy_(gradient)
    for key, whole in merged.items():
        assert not whole.isnan().any(), f"no rank holds some part of {key}"
    return merged
