"""Names in a distributed checkpoint that do not follow from one layer's class alone."""

from collections.abc import Iterator

from megatron_hybrid.config.layers import layers
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, GDN, MAMBA, MLP, MOE, PARALLEL

# The vocabulary's matrices, whose rows beyond its words are padding; in the optimizer's state after
# its own prefixes.
VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
# Parts of names of what is no weight: states of layers (none of ours has any), of the optimizer and
# of generators.
NO_WEIGHTS = ("optimizer.", "rng_state", "._extra_state", "float8_history.")
# With Transformer Engine (and in our own layers), a norm belongs to the linear that follows it.
NORM_NAMES = {
    MAMBA: ("mixer.in_proj.layer_norm_weight", "norm.weight"),
    ATTENTION: ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    MLP: ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    MOE: ("pre_mlp_layernorm.weight",),
    PARALLEL: ("input_layernorm.weight", "mixer.in_proj.layer_norm_weight"),
    GDN: ("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight"),
}


def extra_states(model: ModelConfig) -> Iterator[str]:
    """Keys of the states that the engine's modules keep beside their weights, and ask for.

    In our own layers they are empty; those of Transformer Engine take an empty one for none. They
    are as many as that would ask for: norms and attention, too.
    """
    of_kind = {
        MAMBA: ("mixer.in_proj", "mixer.out_proj"),
        ATTENTION: (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "self_attention.core_attention",
        ),
        MLP: ("mlp.linear_fc1", "mlp.linear_fc2"),
        GDN: ("self_attention.in_proj", "self_attention.out_proj"),
        PARALLEL: (
            "input_layernorm",
            "mixer.in_proj",
            "mixer.out_proj",
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "self_attention.core_attention",
        ),
        MOE: (
            "pre_mlp_layernorm",
            "mlp.shared_experts.linear_fc1",
            "mlp.shared_experts.linear_fc2",
        ),
    }
    if model.parallel_heads_join == "mean":
        of_kind[PARALLEL] = ("mixer.in_proj", "mixer.out_proj", "mixer.core_attention")
    for each in layers(model):
        layer, experts = f"decoder.layers.{each.number - 1}.", each.model.num_moe_experts
        yield from (f"{layer}{name}._extra_state/shard_0_1" for name in of_kind[each.kind])
        if each.kind == MOE:
            assert experts is not None
            if each.model.moe_latent_size is not None:
                for name in ("fc1_latent_proj", "fc2_latent_proj"):
                    yield f"{layer}mlp.{name}._extra_state/shard_0_1"
            for name in ("linear_fc1", "linear_fc2"):
                key = f"{layer}mlp.experts.experts.{name}._extra_state"
                yield from (f"{key}/shard_{expert}_{experts}" for expert in range(experts))
    yield "decoder.final_norm._extra_state/shard_0_1"
    # Asked for where its weight is the embedding's, too.
    yield "output_layer._extra_state/shard_0_1"
