"""Fields of a config.json that every family has: those of transformers' base class, now and once.

Most say how text is generated or what a program does with the model, and nothing of the model.
"""

from checkpoints_converter.fields import Flag, MustBe, NoEffect, Parsed, Rules, Whole

_GENERATION = NoEffect("how text is generated, which generation_config.json says")
_OUTPUTS = NoEffect("what a call returns beside the logits")
_CLASSIFIER = NoEffect("of models that classify")
_PROGRAM = NoEffect("of the program that wrote or runs it")
_IDS = NoEffect("tokens with a meaning, which the tokenizer's files say")


def _version(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("must be a version, such as '5.24.0'")


# What generation was set by in older files, and what is popped from newer ones.
_GENERATED_BY = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p",
    "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty",
    "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "renormalize_logits",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "max_time",
    "num_logits_to_keep", "use_cache", "cache_implementation",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind",
)  # fmt: skip

COMMON: Rules = {
    "model_type": NoEffect("it chose the family"),
    "tie_word_embeddings": Flag(default=False),
    # A length is chosen for training by it.
    "max_position_embeddings": Whole(nullable=True),
    # Releases differ in what one folder computes.
    "transformers_version": Parsed(function=_version, nullable=True),
    "dtype": NoEffect("each tensor has its own", also=("torch_dtype",)),
    # importing.py looks where it points to.
    "transformers_weights": NoEffect("which file holds the weights"),
    "architectures": NoEffect("the tensors show what the model is"),
    "quantization_config": MustBe(
        default=None, allowed=(None,), why="quantized weights cannot be trained on"
    ),
    "compression_config": MustBe(
        default=None, allowed=(None,), why="compressed weights cannot be trained on"
    ),
    "per_layer_config": MustBe(
        default=None, allowed=(None, {}), why="transformers up to 5.24 builds no such model"
    ),
    "is_encoder_decoder": MustBe(default=False, allowed=(False,), why="there is no encoder here"),
    "add_cross_attention": MustBe(default=False, allowed=(False,), why="there is no encoder here"),
    "pruned_heads": MustBe(default=None, allowed=(None, {}), why="no heads are left out here"),
    **dict.fromkeys(_GENERATED_BY, _GENERATION),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
         "decoder_start_token_id"), _IDS,
    ),
    **dict.fromkeys(
        ("output_hidden_states", "output_attentions", "output_router_logits", "return_dict",
         "use_return_dict", "tie_last_hidden_states", "torchscript"), _OUTPUTS,
    ),
    **dict.fromkeys(
        ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"), _CLASSIFIER
    ),
    **dict.fromkeys(
        ("name_or_path", "auto_map", "attn_implementation", "experts_implementation",
         "chunk_size_feed_forward", "use_mamba_kernels", "tokenizer_class", "prefix",
         "task_specific_params", "use_bfloat16", "tf_legacy_loss", "is_decoder",
         "cross_attention_hidden_size", "tie_encoder_decoder",
         "allow_global_per_layer_attribute_access", "serialize_explicit_per_layer_config"),
        _PROGRAM,
    ),
}  # fmt: skip
