"""Build megatron-core's HybridModel from a RunConfig: one model, or this rank's pipeline chunks."""

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.layers import are_unlike, layers, rotates
from megatron_hybrid.config.pattern import MAMBA, parse_pattern
from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.config.rules.context_parallel import way_of_states
from megatron_hybrid.layers.meta_tokens import add_meta_tokens, rotate_by_document
from megatron_hybrid.layers.multipliers import multiply_output
from megatron_hybrid.layers.router import TopKRouter
from megatron_hybrid.layers.shared_heads import share_keys_and_values
from megatron_hybrid.layers.vocabulary import draw_vocabulary, leave_out_padding
from megatron_hybrid.model.float8 import emulate_float8
from megatron_hybrid.model.own_sizes import with_own_sizes
from megatron_hybrid.model.specs import hybrid_stack_spec, layer_classes, mamba_mixer_spec
from megatron_hybrid.model.transformer_config import layer_configs
from megatron_hybrid.platform import initialize


def build_model(
    config: RunConfig,
    engine_config: TransformerConfig,
    backend: str,
    vp_stage: int | None = None,
) -> HybridModel:
    """The part of the model that belongs to this rank (and virtual pipeline stage).

    Process groups come from `megatron.core.parallel_state`, which must be initialised.

    Args:
        engine_config: `model.transformer_config.transformer_config(config, …)`.
        vp_stage: which of the rank's chunks; None without virtual pipeline stages.
    """
    model = config.model
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    pattern = parse_pattern(model.hybrid_layer_pattern)
    last_chunk = (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1) - 1
    words, rows = model.vocab_size, model.padded_vocab_size
    assert words is not None and rows is not None, (
        "resolved from the tokenizer before the model is built"
    )
    passing = way_of_states(config, backend) == "state_passing"
    stack = hybrid_stack_spec(backend, model, state_passing=passing)
    if are_unlike(model):
        on_meta = engine_config.use_cpu_initialization
        device = torch.device("meta") if on_meta else initialize().device
        configs = layer_configs(config, backend, device)
        mixers = {
            each.number: mamba_mixer_spec(backend, each.model, each.kind, state_passing=passing)
            for each in layers(model)
            if each.has(MAMBA)
        }
        stack = with_own_sizes(stack, model, configs, mixers)
    built = layer_classes(backend).model(
        config=engine_config,
        hybrid_stack_spec=stack,
        vocab_size=rows,
        max_sequence_length=max(sequence_lengths(config)),
        hybrid_layer_pattern=pattern.engine_text(
            pp_group.size(), model.mtp_num_layers or 0, model.mtp_hybrid_override_pattern or ""
        ),
        pre_process=pp_group.rank() == 0 and vp_stage in (None, 0),
        post_process=pp_group.rank() == pp_group.size() - 1 and vp_stage in (None, last_chunk),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope" if rotates(model) else "none",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    share_keys_and_values(built.decoder.layers)
    if built.pre_process or built.mtp_process:
        multiply_output(built.embedding, model.embedding_multiplier)
        if model.num_meta_tokens:
            # As large as what norms give, as Hymba draws them.
            metas = draw_vocabulary(
                config.training.seed, "meta_tokens", model.num_meta_tokens, 1.0, whole=True
            )
            add_meta_tokens(built.embedding, engine_config, model.num_meta_tokens, metas)
    if model.num_meta_tokens and rotates(model) and config.data.packed_documents:
        rotate_by_document(built)
    if built.post_process:
        multiply_output(built.output_layer, model.lm_head_multiplier)
        leave_out_padding(built.output_layer, words)
        if model.untie_embeddings_and_output_weights and engine_config.perform_initialization:
            # The engine draws it as it draws the weights of layers.
            draw = draw_vocabulary(
                config.training.seed, "output_layer", words, model.init_method_std
            )
            draw(built.output_layer.weight)
    return built


def build_model_chunks(
    config: RunConfig, engine_config: TransformerConfig, backend: str
) -> list[torch.nn.Module]:
    """This rank's pipeline chunks, on its device, in the precision of the config."""
    virtual_stages = config.parallel.virtual_pipeline_model_parallel_size
    chunks: list[torch.nn.Module] = []
    for vp_stage in range(virtual_stages) if virtual_stages else [None]:
        # The engine makes routers' weights on the CPU, wherever all others are.
        chunk = build_model(config, engine_config, backend, vp_stage).to(initialize().device)
        emulate_float8(config, chunk, next(chunk.parameters()).device)
        if config.data.packed_documents:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.samples_in_row = config.training.micro_batch_size
        chunks.append(Float16Module(engine_config, chunk) if engine_config.bf16 else chunk)
    return chunks
