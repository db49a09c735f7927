"""Bytes that one micro batch leaves behind on a rank for its backward pass, by layer kind.

Of the torch backend: what its operations keep, held by tests against hooks on all saved tensors.
Of transformer_engine: what Transformer Engine's linears, fused attention and mamba-ssm's
fused scan keep by their sources; that was not measured on a GPU.

Not counted: packed documents (attention is taken to see one document a row), and the fp32 products
by which a CPU without bf16 instructions attends.

Letters as in `model.counts`; T tokens that all TP ranks see, t those of this rank under sequence
parallelism; e bytes of a number (2 in bf16).
"""

from collections.abc import Collection

from megatron_hybrid.config.linears import expert_width, gdn_widths, value_channels
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, GDN, MAMBA, MLP, MOE, PARALLEL
from megatron_hybrid.ops.attention_blocks import Block, plan_blocks
from megatron_hybrid.planner.layout import Layout

CHUNK_TOKENS = 64  # of ops.ssd: states are kept before each chunk
SCAN_BLOCK_TOKENS = 32  # of ops.selective_scan: the same
DELTA_STRETCH_TOKENS = 1024  # of ops.gated_delta: states are kept before each stretch
SCAN_CHUNK_TOKENS = 2048  # of mamba-ssm's selective scan


def layer_activations(
    model: ModelConfig,
    kind: str,
    layout: Layout,
    *,
    number_bytes: int,
    fused: bool,
    fp8: bool,
    recompute: Collection[str] = (),
) -> int:
    """Of one layer.

    Args:
        number_bytes: e.
        fused: the backend is transformer_engine.
        fp8: its linears keep their inputs in float8.
        recompute: modules that are computed again in the backward pass, by the engine's names.
    """
    e, d, T, t = number_bytes, model.hidden_size, layout.tokens, layout.own_tokens
    stored = 1 if fp8 else e
    dropped = dropout_mask(model, layout, number_bytes=e, fused=fused)
    if kind == MOE:
        return dropped + _moe(model, layout, e, stored, recompute, fused=fused)
    if kind == MLP and "mlp" in recompute:
        return dropped + layer_input(model, layout, number_bytes=e)
    residual = dropped + e * t * d + 4 * t  # the layer's input, and the norm's statistics
    if fused:
        residual += stored * t * d  # the normed input; the torch backend makes it again
    elif layout.sequence_parallel and layout.tp > 1:
        residual += e * T * d  # gathered over TP
    again = "core_attn" in recompute
    if kind == PARALLEL and model.parallel_heads_join == "mean":
        return (
            residual
            + _mamba(model, layout, e, stored, fused=fused)
            + _shared_heads(model, layout, e, selective=again)
        )
    if kind == PARALLEL:
        return (
            residual
            + _joined(model, layout, e, stored, fused=fused)
            + _mamba(model, layout, e, stored, fused=fused)
            + _attention(model, layout, e, fused=fused, selective=again)
        )
    if kind == GDN:
        return residual + _gated_delta_net(model, layout, e, stored, fused=fused)
    if kind == MAMBA:
        return residual + _mamba(model, layout, e, stored, fused=fused)
    if kind == ATTENTION:
        return residual + _attention(model, layout, e, fused=fused, selective=again)
    assert kind == MLP and model.ffn_hidden_size is not None
    before, between, after = _activation(model, fused=fused)
    return residual + T * model.ffn_hidden_size // layout.tp * (
        e * (before + between) + stored * after
    )


def dropout_mask(model: ModelConfig, layout: Layout, *, number_bytes: int, fused: bool) -> int:
    """What `model.hidden_dropout` drops of a layer's output, or of the embedding.

    On the CPU torch keeps the factor of each number in the number's own format, on a GPU one byte.
    """
    if not model.hidden_dropout:
        return 0
    return (1 if fused else number_bytes) * layout.own_tokens * model.hidden_size


def _activation(model: ModelConfig, *, fused: bool) -> tuple[int, int, int]:
    """Numbers kept an inner channel: fc1's output, in between, and fc2's input."""
    if model.activation == "swiglu":
        if model.mlp_multipliers[0] != 1:
            return 1, 2, 1  # the gate as multiplied; of fc1's output nothing
        return 2, 0 if fused else 2, 1
    return 1, 0, 1


def _joined(model: ModelConfig, layout: Layout, e: int, stored: int, *, fused: bool) -> int:
    """What two linears keep of one normed input, beyond what a layer with one keeps."""
    normed = layout.own_tokens * model.hidden_size
    # Mamba-2 has its factor in the projection.
    scaled = int(model.attention_in_multiplier != 1)
    scaled += model.mamba_version == 1 and model.ssm_in_multiplier != 1
    if fused:
        return (stored * normed if stored < e or scaled else 0) + scaled * e * normed
    if layout.sequence_parallel and layout.tp > 1:
        # Each gathers it for itself; the normed one itself is kept for no one.
        return e * layout.tokens * model.hidden_size
    return (1 + scaled) * e * normed


def _mamba(model: ModelConfig, layout: Layout, e: int, stored: int, *, fused: bool) -> int:
    if model.mamba_version == 1:
        return _mamba1(model, layout, e, stored, fused=fused)
    assert model.mamba_num_heads is not None
    tp, T = layout.tp, layout.tokens
    heads, inner = model.mamba_num_heads, model.mamba_num_heads * model.mamba_head_dim
    # Where CP exceeds the groups of a TP rank, a group is on every rank that has heads of it.
    groups = max(model.mamba_num_groups // tp, layout.cp)
    projected = T * ((2 * inner + heads) // tp + 2 * groups * model.mamba_state_dim)
    output = T * inner // tp
    if fused:  # projection; the scan's output before and after the gate, which our norm keeps
        return e * (projected + 2 * output) + stored * output
    chunks = layout.micro_batch * -(-layout.seq_length // CHUNK_TOKENS)
    states = chunks * heads * model.mamba_head_dim * model.mamba_state_dim // (tp * layout.cp)
    # Under CP the norm is an operation of its own, with an input of its own.
    norm = e * output + 4 * T * model.mamba_num_groups // tp if layout.cp > 1 else 0
    return e * (projected + output + states) + norm


def _mamba1(model: ModelConfig, layout: Layout, e: int, stored: int, *, fused: bool) -> int:
    assert model.mamba_intermediate_size is not None and model.mamba_dt_rank is not None
    T, inner = layout.tokens, model.mamba_intermediate_size // layout.tp
    width, n = T * inner, model.mamba_state_dim
    # Under CP the tokens are all, and the channels a part; of dt, B and C a rank has all.
    shared = T * layout.cp * (model.mamba_dt_rank + 2 * n)
    tokens = SCAN_CHUNK_TOKENS if fused else SCAN_BLOCK_TOKENS
    blocks = layout.micro_batch * -(-layout.seq_length // tokens)
    # Decay rates are made of their logarithms, and both are kept.
    states = 4 * (blocks + 2) * inner * n // layout.cp
    # Projection, convolution's output, steps.
    numbers = 4 * width + shared
    if model.mamba_inner_layernorms:
        numbers += shared
        states += 4 * 3 * T * layout.cp
    if fused:  # copies by channel of x, z, B and C; outputs before and after the gate
        return e * (numbers + 4 * width + 2 * n * T * layout.cp) + stored * width + 2 * states
    return e * (numbers + width) + states


def _gated_delta_net(
    model: ModelConfig, layout: Layout, e: int, stored: int, *, fused: bool
) -> int:
    """The same on both backends, as the rule is torch's; in float8 the last linear keeps a copy."""
    assert model.linear_num_value_heads is not None
    T, tp, heads = layout.tokens, layout.tp, model.linear_num_value_heads
    keys, values = gdn_widths(model)
    stretches = layout.micro_batch * -(-layout.seq_length // DELTA_STRETCH_TOKENS)
    states = 4 * stretches * values * model.linear_key_head_dim // (tp * layout.cp)
    # Projection, the convolution's output, the rule's, and what was normed.
    numbers = (2 * (keys + values + heads) + 2 * keys + values + values) // tp
    # Decays, rates, and what both were made of.
    gates = 4 * 4 * heads // tp
    normed = stored if fused else e
    return T * (e * numbers + gates + normed * values // tp) + states


def _attention(model: ModelConfig, layout: Layout, e: int, *, fused: bool, selective: bool) -> int:
    """Queries, keys and values, the core, and the output, which the linear after it keeps."""
    heads, _, channels = _attention_sizes(model, layout)
    output = e * layout.tokens * heads * channels
    # Cosines and sines, of queries and keys, for every channel that rotates.
    tables = 0
    if model.position_embedding_type == "rope":
        tables = 4 * e * layout.tokens * int(channels * model.rotary_percent)
    inputs = _attention_inputs(model, layout, e, fused=fused)
    if selective:
        return inputs + tables + output
    core = _attention_core(model, layout, e, fused=fused)
    if model.attention_dropout and not fused:
        inputs = 0  # the core keeps fp32 copies instead
    return inputs + tables + core + output


def _shared_heads(model: ModelConfig, layout: Layout, e: int, *, selective: bool) -> int:
    """What attention and the join keep where both mixers share their linears; torch's backend."""
    heads, groups, channels = _attention_sizes(model, layout)
    T, of_values = layout.tokens, value_channels(model, PARALLEL)
    width = T * heads * of_values
    own = 0 if model.reuse_kv else groups
    projected = T * ((heads + own) * channels + own * of_values)
    tables = rotated = 0
    if model.position_embedding_type == "rope":
        tables = 4 * T * int(channels * model.rotary_percent)
        rotated = T * (heads + own) * channels
    attended = 0
    if not selective:
        attended = _attention_core(model, layout, e, fused=False, channels=of_values)
        most = max(channels, of_values)
        if most != channels:  # filled up, for the kernel
            rotated = T * (heads + groups) * most
        if layout.cp > 1:
            # Gathered keys and values are tensors of their own.
            projected = 0 if rotated else projected
            rotated += T * groups * most * (2 * layout.cp - bool(rotated))
    # Both outputs, with their norms' statistics, and the mean.
    return e * (projected + tables + rotated + 2 * width) + attended + 2 * 4 * T


def _attention_inputs(model: ModelConfig, layout: Layout, e: int, *, fused: bool) -> int:
    """Queries, keys and values as the core gets them, and what their views keep alive."""
    heads, groups, channels = _attention_sizes(model, layout)
    queries, keys = (layout.tokens * count * channels for count in (heads, groups))
    rotated = model.position_embedding_type == "rope"
    packed = queries + 2 * keys  # what linear_qkv gives; a view of it keeps all of it
    # Queries lie between keys and values, so that those of several groups are copied.
    copied = queries if rotated or 1 < groups < heads else 0
    if not fused and layout.cp > 1:
        # Gathered keys and values are tensors of their own.
        return e * ((copied or packed) + 2 * keys * layout.cp)
    return e * (packed + copied + (keys if rotated else 0))


def _attention_sizes(model: ModelConfig, layout: Layout) -> tuple[int, int, int]:
    """Query heads and key/value heads of a TP rank, and channels of a head."""
    heads, groups, channels = (
        model.num_attention_heads, model.num_query_groups, model.kv_channels,
    )  # fmt: skip
    assert heads is not None and groups is not None and channels is not None
    return heads // layout.tp, max(groups // layout.tp, 1), channels


def _attention_core(
    model: ModelConfig, layout: Layout, e: int, *, fused: bool, channels: int | None = None
) -> int:
    """The logarithms of the softmaxes' sums, and what torch keeps of each block of queries.

    A block that is not exactly causal keeps its mask, in e bytes a query and key. Where there are
    several blocks their outputs are kept beside the whole. With dropout torch multiplies without a
    fused kernel, in fp32: it keeps the softmaxes, the factors of the dropout and their product,
    and queries, keys and values of every head.

    Args:
        channels: of a head, as the kernel gets them; None: the model's.
    """
    heads, groups, usual = _attention_sizes(model, layout)
    channels = channels or usual
    logs = 4 * layout.tokens * heads
    if fused:
        return logs
    sizes = []
    for chunks in _chunks_of_ranks(layout):
        blocks = plan_blocks(
            chunks, [0], layout.seq_length,
            None if model.window_size is None else model.window_size[0] + 1,
            model.num_meta_tokens,
        )  # fmt: skip
        if model.attn_mask_type == "no_mask":  # all queries at once, with every key and no mask
            queries, keys = sum(stop - start for start, stop in chunks), layout.seq_length
            blocks = [Block(keys - queries, keys, 0, exactly_causal=True)]
        pairs = [(b.stop - b.start) * b.keys for b in blocks]
        masks = sum(
            size for size, block in zip(pairs, blocks, strict=True) if not block.exactly_causal
        )
        if model.attention_dropout:
            tokens = sum(b.stop - b.start + 2 * b.keys for b in blocks)
            of_head = 4 * (3 * sum(pairs) + tokens * channels)
            sizes.append(layout.micro_batch * heads * of_head)
            continue
        parts = e * layout.tokens * heads * channels if len(blocks) > 1 else 0
        # Keys and values that do not lie together: meta tokens', and a window's.
        apart = sum(block.keys for block in blocks if block.metas not in (0, block.key_start))
        copies = 2 * layout.micro_batch * apart * groups * channels
        sizes.append(logs + e * (masks + copies) + parts)
    return max(sizes)


def _chunks_of_ranks(layout: Layout) -> list[list[tuple[int, int]]]:
    """What each CP rank has of the sequence: (first, last + 1) of its chunks, in zigzag."""
    if layout.cp == 1:
        return [[(0, layout.seq_length)]]
    count = 2 * layout.cp
    size = layout.seq_length // count
    return [
        [(i * size, (i + 1) * size) for i in (rank, count - 1 - rank)] for rank in range(layout.cp)
    ]


def _moe(
    model: ModelConfig,
    layout: Layout,
    e: int,
    stored: int,
    recompute: Collection[str],
    *,
    fused: bool,
) -> int:
    """A token's copies are taken to be spread evenly over experts."""
    normed = layer_input(model, layout, number_bytes=e)
    ends = 2 * normed + 4 * layout.own_tokens  # the layer's input, and what the norm makes of it
    if "moe" in recompute:
        return normed if "layernorm" in recompute else ends
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    d, T, t, top = model.hidden_size, layout.tokens, layout.own_tokens, model.moe_router_topk
    routed = t * top  # what this rank sends, and on average gets
    before, between, after = _activation(model, fused=fused)
    # An expert's output is weighted at its inner channels.
    inner = e * (before + between) + (stored * after if fused else e * 2)
    each = expert_width(model)
    experts = routed * (stored * each + inner * model.moe_ffn_hidden_size // layout.etp)
    router = t * (12 * model.num_moe_experts + 40 * top)
    shared = 0
    if model.moe_shared_expert_intermediate_size is not None and "shared_experts" not in recompute:
        width = model.moe_shared_expert_intermediate_size // layout.tp
        shared = T * width * (e * (before + between) + stored * after)
        if layout.sequence_parallel and layout.tp > 1 and not fused:
            shared += e * T * d
    latent = 0
    if model.moe_latent_size is not None:  # what is summed; and, in float8, the projected tokens
        latent = t * (stored * each + (stored * d if stored < e else 0))
    return ends + router + experts + shared + latent


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
    # What the output layer keeps: the normed input, on the torch backend as gathered over TP.
    normed = e * d * (t if fused else T)
    return e * t * d + 4 * t + normed + (e + (4 if fused else 0)) * logits


def prediction_activations(
    model: ModelConfig,
    layout: Layout,
    *,
    number_bytes: int,
    fused: bool,
    recompute: Collection[str] = (),
    full: bool = False,
) -> tuple[int, int]:
    """Of the modules of multi-token prediction, on the last stage: what they keep until the
    backward pass, and what one of them makes again in it.

    Args:
        full: all of a module but its end is computed again.
    """
    e, d, T, t = number_bytes, model.hidden_size, layout.tokens, layout.own_tokens
    split = layout.sequence_parallel and layout.tp > 1
    # What a module joins: hidden states, which the output layer keeps too where it has the same
    # tokens of them, and embeddings.
    read = e * t * d * (2 if split and not fused else 1)
    read += dropout_mask(model, layout, number_bytes=e, fused=fused)
    # Normed and joined, as the projection keeps it; of two norms the statistics; and the projected
    # tokens of the other TP ranks, of which this rank's are a view.
    inside = 2 * e * d * (t if fused else T) + 2 * 4 * t + e * (T - t) * d
    inside += sum(
        layer_activations(
            model, kind, layout, number_bytes=e, fused=fused, fp8=False, recompute=recompute
        )
        for kind in model.mtp_hybrid_override_pattern or ""
    )
    end = output_activations(model, layout, number_bytes=e, fused=fused)
    modules = model.mtp_num_layers or 0
    if full and modules:
        return modules * (read + end), inside
    return modules * (read + inside + end), 0


def layer_input(model: ModelConfig, layout: Layout, *, number_bytes: int) -> int:
    """What a layer leaves that is computed again: its input."""
    return number_bytes * layout.own_tokens * model.hidden_size
