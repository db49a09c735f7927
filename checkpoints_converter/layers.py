"""The tensors of our kinds of layers beside theirs, as most families name and pack them.

`our` and `their` are prefixes that end with a dot. Legend of shapes: h hidden_size; Mamba-2:
d = heads * head size, gn = groups * state; attention: q query and kv key/value heads of size k;
f inner width of an MLP or expert; V vocabulary.
"""

from collections.abc import Sequence

from checkpoints_converter.weights import (
    Mapping,
    Names,
    concatenated,
    padded_vocabulary,
    per_expert,
    qkv_interleaved,
    renamed,
)
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.linears import expert_width
from megatron_hybrid.model.counts import CONV_KERNEL
from megatron_hybrid.model.tensor_names import NORM_NAMES


def norm(model: ModelConfig, kind: str, our: str, theirs: str, ours: Names) -> Mapping:
    """The norm before a layer: [h].

    Args:
        kind: the layer's symbol.
        our: prefix of the layer, `decoder.layers.0.`.
        theirs: the whole name.
    """
    name = ours.pick(*(our + candidate for candidate in NORM_NAMES[kind]))
    return renamed(name, theirs, (model.hidden_size,))


def vocabulary(
    model: ModelConfig, embedding: str, output: str, theirs: Names, *, held_once: bool
) -> list[Mapping]:
    """Embedding and output layer, [V, h] each; ours has V padded.

    Args:
        held_once: how the family writes tied ones: as the embedding alone, else as two alike.
            Files that are there may hold either, or both.
    """
    assert model.vocab_size is not None and model.padded_vocab_size is not None
    sizes = {
        "vocab_size": model.vocab_size,
        "padded": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
    }
    our = "embedding.word_embeddings.weight"
    if not model.untie_embeddings_and_output_weights:
        present = [name for name in (embedding, output) if theirs.has(name)]
        names = present or ([embedding] if held_once else [embedding, output])
        return [padded_vocabulary(our, names, **sizes)]
    return [
        padded_vocabulary(our, (embedding,), **sizes),
        padded_vocabulary("output_layer.weight", (output,), **sizes),
    ]


def mamba(model: ModelConfig, our: str, their: str) -> list[Mapping]:
    """in_proj [2d + 2gn + heads, h] is packed z, x, B, C, dt; the convolution x, B, C."""
    h, heads = model.hidden_size, model.mamba_num_heads
    assert heads is not None
    d, gn = heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    rows = {"z": d, "x": d, "B": gn, "C": gn, "dt": heads}

    def packed(name: str, parts: Sequence[str], *rest: int) -> Mapping:
        stored = [(f"{our}mixer.{name}.{part}", (rows[part], *rest)) for part in parts]
        return concatenated(stored, their + name)

    norm = [renamed(f"{our}mixer.norm.weight", f"{their}norm.weight", (d,))]
    return [
        packed("in_proj.weight", ("z", "x", "B", "C", "dt"), h),
        packed("conv1d.weight", ("x", "B", "C"), 1, CONV_KERNEL),
        packed("conv1d.bias", ("x", "B", "C")),
        *(
            renamed(f"{our}mixer.{name}", their + name, (heads,), fp32=True)
            for name in ("A_log", "D", "dt_bias")
        ),
        *(norm if model.mamba_rms_norm else []),
        renamed(f"{our}mixer.out_proj.weight", f"{their}out_proj.weight", (h, d)),
    ]


def attention(model: ModelConfig, our: str, their: str) -> list[Mapping]:
    """q_proj [q*k, h], k_proj and v_proj [kv*k, h], o_proj [h, q*k]."""
    h, q, kv, k = (
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.kv_channels,
    )
    assert q is not None and kv is not None and k is not None
    return [
        qkv_interleaved(
            f"{our}self_attention.linear_qkv.weight",
            *(f"{their}{part}_proj.weight" for part in "qkv"),
            heads=q,
            groups=kv,
            head_dim=k,
            width=(h,),
        ),
        renamed(f"{our}self_attention.linear_proj.weight", f"{their}o_proj.weight", (h, q * k)),
    ]


def mlp(our: str, their: str, h: int, f: int | None) -> list[Mapping]:
    """An MLP without a gate: up_proj [f, h], down_proj [h, f]."""
    assert f is not None
    return [
        renamed(f"{our}linear_fc1.weight", f"{their}up_proj.weight", (f, h)),
        renamed(f"{our}linear_fc2.weight", f"{their}down_proj.weight", (h, f)),
    ]


def experts(model: ModelConfig, our: str, their: str, ours: Names, theirs: Names) -> list[Mapping]:
    """Experts without a gate: up_proj [f, l], down_proj [l, f] of each, or stacked on either side;
    l is h, or the size of latent tokens.

    Ours are stacked unless the checkpoint was saved with singleton shards; theirs are single unless
    they were saved as transformers holds them in memory.
    """
    h, f, count = expert_width(model), model.moe_ffn_hidden_size, model.num_moe_experts
    assert f is not None and count is not None
    mappings = []
    for our_name, their_name, shape in (
        ("linear_fc1.weight", "up_proj", (f, h)),
        ("linear_fc2.weight", "down_proj", (h, f)),
    ):
        single = [f"{our}mlp.experts.experts.{e}.{our_name}" for e in range(count)]
        stacked = f"{our}mlp.experts.experts.{our_name}"
        their_single = [f"{their}{e}.{their_name}.weight" for e in range(count)]
        their_stacked = f"{their}{their_name}"
        mappings.append(
            per_expert(
                single if ours.has(single[0]) else stacked,
                their_stacked if theirs.has(their_stacked) else their_single,
                count,
                shape,
            )
        )
    return mappings
