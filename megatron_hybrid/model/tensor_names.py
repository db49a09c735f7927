"""Names in a distributed checkpoint that do not follow from one layer's class alone."""

from collections.abc import Iterator

from megatron_hybrid.config.layers import layers
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, GDN, MAMBA, MLP, MOE, PARALLEL

# The vocabulary's matrices, whose rows beyond its words are padding; in the optimizer's state after
# its own prefixes.
VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
# What an objective trains beside the model.
OBJECTIVE = "objective."
# Parts of names of what is no weight of the model: states of layers (none of ours has any), of the
# optimizer and of generators, and what belongs to an objective.
NO_WEIGHTS = ("optimizer.", "rng_state", "._extra_state", "float8_history.", OBJECTIVE)
# Of the modules of multi-token prediction, without which a model is whole.
PREDICTION = "mtp."
# With Transformer Engine (and in our own layers), a norm belongs to the linear that follows it.
NORM_NAMES = {
    MAMBA: ("mixer.in_proj.layer_norm_weight", "norm.weight"),
    ATTENTION: ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    MLP: ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    MOE: ("pre_mlp_layernorm.weight",),
    PARALLEL: ("input_layernorm.weight", "mixer.in_proj.layer_norm_weight"),
    GDN: ("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight"),
}


_STATES = {
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


def extra_states(model: ModelConfig) -> Iterator[str]:
    """Keys of the states that the engine's modules keep beside their weights, and ask for.

    In our own layers they are empty; those of Transformer Engine take an empty one for none. They
    are as many as that would ask for: norms and attention, too.
    """
    for each in layers(model):
        yield from _of_layer(f"decoder.layers.{each.number - 1}.", each.kind, each.model)
    for module in range(model.mtp_num_layers or 0):
        own = f"{PREDICTION}layers.{module}."
        for name in ("enorm", "hnorm", "eh_proj", "final_layernorm"):
            yield f"{own}{name}._extra_state/shard_0_1"
        for place, kind in enumerate(model.mtp_hybrid_override_pattern or ""):
            yield from _of_layer(f"{own}mtp_model_layer.layers.{place}.", kind, model)
    yield "decoder.final_norm._extra_state/shard_0_1"
    # Asked for where its weight is the embedding's, too.
    yield "output_layer._extra_state/shard_0_1"


def _of_layer(layer: str, kind: str, model: ModelConfig) -> Iterator[str]:
    """Those of one layer with the sizes of `model`."""
    names = _STATES[kind]
    if kind == PARALLEL and model.parallel_heads_join == "mean":
        names = ("mixer.in_proj", "mixer.out_proj", "mixer.core_attention")
    yield from (f"{layer}{name}._extra_state/shard_0_1" for name in names)
    if kind != MOE:
        return
    experts = model.num_moe_experts
    assert experts is not None
    if model.moe_latent_size is not None:
        for name in ("fc1_latent_proj", "fc2_latent_proj"):
            yield f"{layer}mlp.{name}._extra_state/shard_0_1"
    for name in ("linear_fc1", "linear_fc2"):
        key = f"{layer}mlp.experts.experts.{name}._extra_state"
        yield from (f"{key}/shard_{expert}_{experts}" for expert in range(experts))
