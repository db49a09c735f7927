"""What the config in a checkpoint says of it: whether this run may go on from there.

Read from files alone, before the engine starts.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.config import ModelConfig, RunConfig, load_config
from megatron_hybrid.config.describe import shown
from megatron_hybrid.config.effects import EFFECTS
from megatron_hybrid.config.layer_entries import SIZES
from megatron_hybrid.config.layers import layers
from megatron_hybrid.config.layers import rotates as rotates_
from megatron_hybrid.config.pattern import ATTENTION, MOE, has_kind
from megatron_hybrid.config.phases import run_tokens, sequence_lengths
from megatron_hybrid.config.rules import Rule
from megatron_hybrid.config.rules.common import LENGTHS, number_set, values
from megatron_hybrid.config.tracker import CONFIG_FILE
from megatron_hybrid.data.megatron_blend import parse_split
from megatron_hybrid.errors import UserError
from megatron_hybrid.small_files import naming

# What decides which tensors a model has, and of which shapes. Vocabularies padded to the same rows
# are alike here, which words they hold is for the tokenizers to say; of the same words, they are
# the same model however they are padded.
SHAPE_FIELDS = (
    "hybrid_layer_pattern", "hidden_size", "ffn_hidden_size", "activation", "add_bias_linear",
    "num_attention_heads", "num_query_groups", "kv_channels",
    "mamba_version", "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups",
    "mamba_rms_norm", "mamba_intermediate_size", "mamba_dt_rank", "mamba_inner_layernorms",
    "parallel_heads_join", "num_meta_tokens", "reuse_kv",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "padded_vocab_size", "untie_embeddings_and_output_weights",
    "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_router_enable_expert_bias", "moe_latent_size",
    "mtp_num_layers", "mtp_hybrid_override_pattern",
)  # fmt: skip

# The rest of what a model is: with other values the same tensors load, and compute something else.
FUNCTION_FIELDS = (
    "window_size", "attn_mask_type", "position_embedding_type", "rotary_base", "rotary_percent",
    "normalization", "layernorm_epsilon",
    "key_multiplier", "ssm_multipliers", "ssm_in_multiplier", "ssm_out_multiplier",
    "attention_in_multiplier", "attention_out_multiplier", "mlp_multipliers",
    "embedding_multiplier", "lm_head_multiplier",
    "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk",
)  # fmt: skip

# Of these, what each layer may have of its own, and where that is among what a model says.
OF_LAYERS = frozenset(name for names in SIZES.values() for name in names)
LAYER_SIZES = "sizes of layers"

# How a run begins, and what is held or said by itself. The rest is compared.
_NOT_COMPARED = {
    "optimizer.restart_schedule", "training.objective", "training.objective_options",
    "training.seed",
}  # fmt: skip
# Of what comes in, how steps take it.
_OF_STEPS = (
    "data.packed_documents", "training.global_batch_size", "training.batch_size_schedule",
)  # fmt: skip
TRAINING_FIELDS = tuple(
    name
    for name, effect in EFFECTS.items()
    if effect in ("weights", "training", "differs") or name in _OF_STEPS
    if name not in _NOT_COMPARED and not name.startswith(("checkpoint.", "upcycling."))
)

# How many samples a run draws, and of those held out.
_DRAWN = (
    *LENGTHS, "training.global_batch_size", "training.eval_interval", "training.eval_iters",
)  # fmt: skip


def saved_config(folder: Path) -> RunConfig | None:
    """The config of the run that saved a checkpoint; None for one of Megatron-LM's own."""
    return read_config(folder) if (folder / CONFIG_FILE).exists() else None


def read_config(folder: Path, *words: str, which: tuple[Rule, ...] = ()) -> RunConfig:
    """The config of the run that saved a checkpoint.

    Args:
        words: changes on top of it, as on a command line.
        which: rules to apply.

    Raises:
        UserError: naming the file, which is missing, damaged or of another version.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing else says which model {folder} holds")
    with naming(path):
        return load_config([str(path), *words], which=which)


def refuse_other_model(folder: Path, model: ModelConfig, saved: ModelConfig) -> None:
    """Refuse a checkpoint whose own config says that its tensors are not those of this model.

    Raises:
        UserError: every field that differs, with both values.
    """
    differences = [
        f"  - model.{name}={shown(ours)}, in the checkpoint {shown(theirs)}"
        for name in SHAPE_FIELDS
        if not (name == "padded_vocab_size" and model.vocab_size == saved.vocab_size)
        and not (name in OF_LAYERS and (model.layers or saved.layers))
        and (ours := _shape_value(model, name)) != (theirs := _shape_value(saved, name))
    ]
    if not differences:
        found = other_sizes(model, layer_sizes(saved), SHAPE_FIELDS)
        differences = [
            f"  - {name}={shown(ours)}, in the checkpoint {shown(theirs)}"
            for name, ours, theirs in found
        ]
    if differences:
        raise UserError("\n".join([f"{folder} holds another model:", *differences]))


def other_functions(model: ModelConfig, said: Mapping[str, Any]) -> list[str]:
    """What a model computes otherwise than the one whose weights it goes on from.

    It may be meant, as another base of RoPE for longer sequences.

    Args:
        said: fields of that one, as far as they are known.

    Returns:
        A part of a sentence for each field that differs.
    """
    theirs = said.get(LAYER_SIZES)
    unlike = theirs is not None and bool(model.layers or said.get("layers"))
    rotates = "rope" in (model.position_embedding_type, said.get("position_embedding_type"))
    rotates = rotates or (unlike and rotates_(model))
    attends = has_kind(model.hybrid_layer_pattern, ATTENTION)
    of_layers = other_sizes(model, theirs, FUNCTION_FIELDS) if unlike and theirs else []
    return [f"{name}={shown(ours)} (there {shown(value)})" for name, ours, value in of_layers] + [
        f"model.{name}={shown(ours)} (there {shown(said[name])})"
        for name in FUNCTION_FIELDS
        if name in said and (ours := getattr(model, name)) != said[name]
        if not (unlike and name in OF_LAYERS)
        if rotates or not name.startswith("rotary_")
        if attends or not name.startswith(("rotary_", "position_", "window_", "attn_"))
    ]


def said_of_functions(model: ModelConfig) -> dict[str, Any]:
    """What the config of a model says for `other_functions`; a dense one's nothing of experts."""
    has_experts = MOE in model.hybrid_layer_pattern
    found = {name: v for name, v in model if has_experts or not name.startswith("moe_")}
    return found | {LAYER_SIZES: layer_sizes(model)}


def layer_sizes(model: ModelConfig) -> list[dict[str, Any]]:
    """The sizes of each layer, by field."""
    return [layer.sizes for layer in layers(model)]


def other_sizes(
    model: ModelConfig, theirs: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """The sizes of layers that are of the same kinds there, and of other values: field, both."""
    for layer, sizes in zip(layers(model), theirs, strict=False):
        for name, ours in layer.sizes.items():
            if name in names and name in sizes and ours != sizes[name]:
                yield f"model.layers.{layer.number}.{name}", ours, sizes[name]


def other_training(config: RunConfig, saved: RunConfig) -> list[str]:
    """What a run that goes on trains otherwise than before: typed anew, or forgotten; of experts
    nothing, where there were none.

    Returns:
        A part of a sentence for each field that differs.
    """
    now, then = values(config, TRAINING_FIELDS), values(saved, TRAINING_FIELDS)
    found = [
        f"{name}={shown(value)} (there {shown(then[name])})"
        for name, value in now.items()
        if value != then[name]
        if MOE in saved.model.hybrid_layer_pattern or ".moe_" not in name
    ]
    ends = _schedule_end(config), _schedule_end(saved)
    if None not in ends and ends[0] != ends[1] and not config.optimizer.restart_schedule:
        found.append(
            f"a schedule of the learning rate to the run's end at {ends[0]} tokens "
            f"(there {ends[1]})"
        )
    return found


def _schedule_end(config: RunConfig) -> int | None:
    """Tokens at which the learning rate is at its lowest, where the run's length decides it."""
    options = config.optimizer
    said = (options.lr_decay_samples, options.lr_decay_tokens) != (None, None)
    steady = options.lr_decay_style == "constant" and not options.lr_warmup_fraction
    if said or steady or number_set(config, LENGTHS) != 1:
        return None
    return run_tokens(config)


def _shape_value(model: ModelConfig, name: str) -> Any:
    value = getattr(model, name)
    # Where a pipeline is cut does not change the model.
    return value.replace("|", "") if name == "hybrid_layer_pattern" else value


def refuse_other_data(folder: Path, config: RunConfig, saved: RunConfig, *, has_plan: bool) -> None:
    """Refuse to go on with samples that are not those which the checkpoint has counted.

    Where a plan travels in the checkpoint, the plan itself judges whatever else is edited.

    Raises:
        UserError: every field that differs, with both values.
    """
    fields: dict[str, tuple[object, object]] = {
        "data.mock_data": (str(config.data.mock_data).lower(), str(saved.data.mock_data).lower())
    }
    if not config.data.mock_data:
        fields["data.sample_order"] = (config.data.sample_order, saved.data.sample_order)
    if not has_plan:
        lengths = [sorted(set(sequence_lengths(each))) for each in (config, saved)]
        fields["data.seq_length"] = (lengths[0], lengths[1])
        fields["training.seed"] = (config.training.seed, saved.training.seed)
    if not has_plan and not config.data.mock_data:
        fields["data.data_path"] = (_blend(config), _blend(saved))
        if _shares(config) != _shares(saved):
            fields["data.split"] = (config.data.split, saved.data.split)
    differences = [
        f"  - {name}={ours}, in the checkpoint {theirs}"
        for name, (ours, theirs) in fields.items()
        if ours != theirs
    ]
    if differences:
        raise _counted_others(folder, differences)


def refuse_other_passes(
    folder: Path, config: RunConfig, saved: RunConfig, passes: list[str]
) -> None:
    """The same where the length of a run alone makes megatron-core's order another one.

    Args:
        passes: as `data.datasets.other_passes`.

    Raises:
        UserError: with the fields that decide how many samples are drawn.
    """
    if passes:
        theirs = values(saved, _DRAWN)
        differences = [
            f"  - {name}={shown(ours)}, in the checkpoint {shown(theirs[name])}"
            for name, ours in values(config, _DRAWN).items()
            if ours != theirs[name]
        ]
        raise _counted_others(folder, [*differences, *(f"  - {text}" for text in passes)])


def refuse_other_files(folder: Path, files: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """The same where what is under a path is not what it was: a file that was made anew.

    Args:
        files: digests by prefix.
        saved: those in the checkpoint, as far as it has any.

    Raises:
        UserError: naming each file.
    """
    differences = [
        f"  - data.data_path: {prefix} holds other tokens than before"
        for prefix, digest in files.items()
        if saved.get(prefix, digest) != digest
    ]
    if differences:
        raise _counted_others(folder, differences)


def _counted_others(folder: Path, differences: list[str]) -> UserError:
    head = f"{folder} has counted other samples (checkpoint.finetune=true starts anew):"
    return UserError("\n".join([head, *differences]))


def _shares(config: RunConfig) -> list[float]:
    """Those of the split, whatever they sum to."""
    return [round(share, 9) for share in parse_split(config.data.split)]


def _blend(config: RunConfig) -> list[list[object]]:
    """Weights, which need not sum to 1, and prefixes, in an order that decides among equals."""
    total = sum(weight for weight, _ in config.data.data_path)
    return [[round(weight / total, 9), prefix] for weight, prefix in config.data.data_path]
