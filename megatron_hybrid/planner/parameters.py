"""Parameters of one rank of a pipeline stage, by the formulas of `model.counts`."""

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.model.counts import Parameters, layer_parameters, prediction_parameters
from megatron_hybrid.planner.layout import Layout, chunk_sorts


def stage_parameters(model: ModelConfig, layout: Layout, stage: int) -> Parameters:
    """Of all that a pipeline stage has on one rank."""
    found = Parameters()
    for chunk in chunk_sorts(model, layout)[stage :: layout.pp]:
        for sort in chunk:
            found += layer_parameters(
                sort.model, sort.kind, tp=layout.tp, ep=layout.ep, etp=layout.etp
            )
    assert model.padded_vocab_size is not None
    words = model.padded_vocab_size * model.hidden_size // layout.tp
    if stage == 0:
        found += Parameters(dense=words + model.num_meta_tokens * model.hidden_size)
    if stage == layout.pp - 1:
        found += Parameters(dense=model.hidden_size)
        # A tied output layer is the embedding, but on another stage it needs a copy.
        if model.untie_embeddings_and_output_weights or layout.pp > 1:
            found += Parameters(dense=words)
        found += prediction_parameters(model, tp=layout.tp, ep=layout.ep, etp=layout.etp)
        if model.mtp_num_layers and layout.pp > 1:  # which read tokens of their own
            found += Parameters(dense=words)
    return found
