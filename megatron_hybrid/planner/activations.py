"""Bytes that one micro batch leaves behind on a rank for its backward pass, by layer kind.

Of the torch backend: what its operations keep, held by tests against hooks on all saved tensors.
Of transformer_engine: what Transformer Engine's linears, fused attention and mamba-ssm's
fused scan keep by their sources; that was not measured on a GPU.

Letters as in `model.counts`; T tokens that all TP ranks see, t those of this rank under sequence
parallelism; e bytes of a number (2 in bf16).
"""

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE
from megatron_hybrid.planner.layout import Layout

CHUNK_TOKENS = 64  # of ops.ssd: states are kept before each chunk


def layer_activations(
    model: ModelConfig, kind: str, layout: Layout, *, number_bytes: int, fused: bool, fp8: bool
) -> int:
    """Of one layer.

    Args:
        number_bytes: e.
        fused: the backend is transformer_engine.
        fp8: its linears keep their inputs in float8.
    """
    e, d, T, t = number_bytes, model.hidden_size, layout.tokens, layout.own_tokens
    stored = 1 if fp8 else e
    if kind == MOE:
        return _moe(model, layout, e, stored, fused=fused)
    residual = e * t * d + 4 * t  # the layer's input, and the norm's statistics
    if fused:
        residual += stored * t * d  # the normed input; the torch backend makes it again
    elif layout.sequence_parallel and layout.tp > 1:
        residual += e * T * d  # gathered over TP
    if kind == MAMBA:
        return residual + _mamba(model, layout, e, stored, fused=fused)
    if kind == ATTENTION:
        return residual + _attention(model, layout, e, fused=fused)
    assert kind == MLP and model.ffn_hidden_size is not None
    before, between, after = _activation(model, fused=fused)
    return residual + T * model.ffn_hidden_size // layout.tp * (
        e * (before + between) + stored * after
    )


def _activation(model: ModelConfig, *, fused: bool) -> tuple[int, int, int]:
    """Numbers kept an inner channel: fc1's output, in between, and fc2's input."""
    if model.activation == "swiglu":
        return 2, 0 if fused else 2, 1
    return 1, 0, 1


def _mamba(model: ModelConfig, layout: Layout, e: int, stored: int, *, fused: bool) -> int:
    assert model.mamba_num_heads is not None
    tp, T = layout.tp, layout.tokens
    heads, inner = model.mamba_num_heads, model.mamba_num_heads * model.mamba_head_dim
    width = 2 * inner + 2 * model.mamba_num_groups * model.mamba_state_dim + heads
    projected, output = T * width // tp, T * inner // tp
    if fused:  # projection; the scan's output before and after the gate, which our norm keeps
        return e * (projected + 2 * output) + stored * output
    chunks = layout.micro_batch * -(-layout.seq_length // CHUNK_TOKENS)
    states = chunks * heads * model.mamba_head_dim * model.mamba_state_dim // (tp * layout.cp)
    # Under CP the norm is an operation of its own, with an input of its own.
    norm = e * output + 4 * T * model.mamba_num_groups // tp if layout.cp > 1 else 0
    return e * (projected + output + states) + norm


def _attention(model: ModelConfig, layout: Layout, e: int, *, fused: bool) -> int:
    heads, groups, channels = (
        model.num_attention_heads, model.num_query_groups, model.kv_channels,
    )  # fmt: skip
    assert heads is not None and groups is not None and channels is not None
    T, tp = layout.tokens, layout.tp
    queries, keys = T * heads * channels // tp, T * groups * channels // tp
    logs = 4 * T * heads // tp
    rotated = model.position_embedding_type == "rope"
    if not fused and layout.cp > 1:  # keys and values of all; the output in parts and whole
        return e * (4 * queries + 2 * keys * layout.cp) + logs
    # A copy of the queries, which lie between keys and values, unless there is one group.
    copies = queries if rotated or (groups > tp and heads > groups) else 0
    if rotated:
        copies += keys
    return e * (queries + 2 * keys + copies + queries) + logs


def _moe(model: ModelConfig, layout: Layout, e: int, stored: int, *, fused: bool) -> int:
    """A token's copies are taken to be spread evenly over experts."""
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    d, T, t, top = model.hidden_size, layout.tokens, layout.own_tokens, model.moe_router_topk
    routed = t * top  # what this rank sends, and on average gets
    before, between, after = _activation(model, fused=fused)
    # An expert's output is weighted at its inner channels.
    inner = e * (before + between) + (stored * after if fused else e * 2)
    experts = routed * (stored * d + inner * model.moe_ffn_hidden_size // layout.etp)
    router = t * (12 * model.num_moe_experts + 40 * top)
    shared = 0
    if model.moe_shared_expert_intermediate_size is not None:
        width = model.moe_shared_expert_intermediate_size // layout.tp
        shared = T * width * (e * (before + between) + stored * after)
        if layout.sequence_parallel and layout.tp > 1 and not fused:
            shared += e * T * d
    return 2 * e * t * d + 4 * t + router + experts + shared


def output_activations(
    model: ModelConfig, layout: Layout, *, number_bytes: int, fused: bool
) -> int:
    """Of the final norm, the output layer and the loss, on the last stage.

    The torch backend's loss writes the gradient over the logits; the engine's keeps their softmax
    in fp32 beside them.
    """
    e, d, T, t = number_bytes, model.hidden_size, layout.tokens, layout.own_tokens
    assert model.padded_vocab_size is not None
    logits = T * model.padded_vocab_size // layout.tp
    gathered = e * T * d if layout.sequence_parallel and layout.tp > 1 and not fused else 0
    return 2 * e * t * d + 4 * t + gathered + (e + (4 if fused else 0)) * logits


def layer_input(model: ModelConfig, layout: Layout, *, number_bytes: int) -> int:
    """What a layer leaves that is computed again: its input."""
    return number_bytes * layout.own_tokens * model.hidden_size
