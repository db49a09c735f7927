"""Rules of the layout: what the ranks may divide, and how many there must be."""

from math import prod

from megatron_hybrid.config.layers import layers_of
from megatron_hybrid.config.pattern import (
    ATTENTION,
    GDN,
    MAMBA,
    MLP,
    MOE,
    parse_pattern,
)
from megatron_hybrid.config.phases import sequence_length_fields
from megatron_hybrid.config.ranks import (
    CP,
    EP,
    ETP,
    PP,
    TP,
    data_parallel_size,
    expert_ranks,
    model_ranks,
    sequence_ranks,
    written,
)
from megatron_hybrid.config.rules.common import (
    Facts,
    Problems,
    Rule,
    must_be_multiple,
    must_divide,
)
from megatron_hybrid.config.rules.context_parallel import mamba_context_parallel, state_passing
from megatron_hybrid.config.run import RunConfig

_VPP = "parallel.virtual_pipeline_model_parallel_size"


def tensor_parallel(c: RunConfig, _: Facts) -> Problems:
    """Each TP rank holds whole heads, whole groups and an equal share of each inner width."""
    tp = c.parallel.tensor_model_parallel_size
    needed = {
        ATTENTION: ("num_attention_heads", "num_query_groups"),
        MAMBA: ("mamba_num_heads", "mamba_num_groups", "mamba_intermediate_size"),
        GDN: ("linear_num_key_heads", "linear_num_value_heads"),
        MLP: ("ffn_hidden_size",),
        MOE: ("moe_shared_expert_intermediate_size",),
    }
    for symbol, names in needed.items():
        of_kind = layers_of(c.model, symbol)
        for name in names:
            for layer in of_kind:
                size = layer.sizes.get(name)
                if size is not None:
                    yield from must_divide(TP, tp, layer.path(name), size)
    # The padded vocabulary is a multiple of this, whatever the tokenizer brings.
    multiple = c.model.make_vocab_size_divisible_by
    yield from must_divide(TP, tp, "model.make_vocab_size_divisible_by", multiple)


def sequence_parallel(c: RunConfig, _: Facts) -> Problems:
    """Sequence parallelism splits over TP ranks, so there must be some."""
    tp = c.parallel.tensor_model_parallel_size
    if c.parallel.sequence_parallel and tp == 1:
        yield f"parallel.sequence_parallel=true needs {TP} of at least 2; it is 1"


def sequence_length(c: RunConfig, _: Facts) -> Problems:
    """CP gives a rank two equal chunks (zigzag); sequence parallelism cuts its part again."""
    cp, shared = c.parallel.context_parallel_size, sequence_ranks(c)
    lengths = dict(sequence_length_fields(c))
    if c.model.num_meta_tokens:
        lengths["model.num_meta_tokens"] = c.model.num_meta_tokens
    for name, seq_length in lengths.items():
        if cp > 1:
            yield from must_be_multiple(name, seq_length, f"2 * {CP}", 2 * cp)
        if shared.get(TP, 1) > 1:
            of = prod(shared.values())
            yield from must_be_multiple(name, seq_length, f"{TP} * {CP}", of)


def pipeline_layers(c: RunConfig, _: Facts) -> Problems:
    """Each pipeline stage gets as many segments as the others, or layers where there is no '|'."""
    pattern = parse_pattern(c.model.hybrid_layer_pattern)
    pp = c.parallel.pipeline_model_parallel_size
    if len(pattern.segments) > 1:
        name, count = "the segments of model.hybrid_layer_pattern", len(pattern.segments)
    else:
        name, count = "the layers of model.hybrid_layer_pattern", pattern.num_layers
    yield from must_divide(PP, pp, name, count)


def virtual_pipeline(c: RunConfig, _: Facts) -> Problems:
    """VPP follows from the segments; when it is given, it must agree."""
    vpp = c.parallel.virtual_pipeline_model_parallel_size
    pp = c.parallel.pipeline_model_parallel_size
    if vpp is None:
        return
    segments = len(parse_pattern(c.model.hybrid_layer_pattern).segments)
    if pp == 1:
        yield f"{_VPP}={vpp} needs {PP} of at least 2, it is 1; allowed: null"
    elif segments != vpp * pp:
        chunks = segments // pp
        allowed = f"null, {chunks}" if chunks > 1 and segments % pp == 0 else "null"
        yield (
            f"{_VPP}={vpp} must be the segments of model.hybrid_layer_pattern={segments} / "
            f"{PP}={pp}; allowed: {allowed}"
        )


def expert_parallel(c: RunConfig, _: Facts) -> Problems:
    """Each EP rank holds whole experts; each expert's width is cut over its own TP."""
    ep, etp = c.parallel.expert_model_parallel_size, c.parallel.expert_tensor_parallel_size
    if MOE not in c.model.hybrid_layer_pattern:
        for name, size in ((EP, ep), (ETP, etp)):
            if size not in (1, None):
                yield f"{name}={size} needs model.num_moe_experts, which is null; allowed: 1"
        return
    for layer in layers_of(c.model, MOE):
        experts, width = layer.model.num_moe_experts, layer.model.moe_ffn_hidden_size
        assert experts is not None
        yield from must_divide(EP, ep, layer.path("num_moe_experts"), experts)
        if width is not None and etp is not None:
            yield from must_divide(ETP, etp, layer.path("moe_ffn_hidden_size"), width)
    if etp is not None and etp > 1 and c.model.add_bias_linear:
        yield f"{ETP}={etp} must be 1 with model.add_bias_linear=true"


def expert_tensor_parallel_device(c: RunConfig, facts: Facts) -> Problems:
    """gloo's all_gather refuses the unequal shards that splitting experts makes."""
    etp = c.parallel.expert_tensor_parallel_size
    if facts.has_cuda is False and etp is not None and etp > 1:
        yield f"{ETP}={etp} needs GPUs: gloo cannot gather shards of unequal size; allowed: 1"


def moe_tensor_parallel(c: RunConfig, _: Facts) -> Problems:
    """megatron-core's MoE layer refuses to train with TP unless the sequence is split too."""
    tp = c.parallel.tensor_model_parallel_size
    if MOE in c.model.hybrid_layer_pattern and tp > 1 and not c.parallel.sequence_parallel:
        yield (
            f"parallel.sequence_parallel=false must be true with {TP}={tp} and 'E' layers in "
            "model.hybrid_layer_pattern"
        )


def world_size(c: RunConfig, facts: Facts) -> Problems:
    """The ranks must fill whole copies of the model, dense and expert."""
    world = facts.world_size
    if world is None:
        return
    layouts = [model_ranks(c)]
    if MOE in c.model.hybrid_layer_pattern:
        layouts.append(expert_ranks(c))
    for layout in layouts:
        ranks = prod(layout.values())
        if world % ranks:
            yield (
                f"the number of ranks, {world}, must be a multiple of {written(layout)}; "
                f"allowed: {ranks}, {2 * ranks}, {3 * ranks}, ..."
            )
            return


def batch_size(c: RunConfig, facts: Facts) -> Problems:
    """A data-parallel rank runs whole micro-batches; interleaved pipelines need enough of them."""
    dp = None if facts.world_size is None else data_parallel_size(c, facts.world_size)
    if dp == 0:
        return
    yield from _batch_size(c, "training.global_batch_size", c.training.global_batch_size, dp)
    for number, (_, size) in enumerate(c.training.batch_size_schedule):
        yield from _batch_size(c, f"training.batch_size_schedule[{number}]: size", size, dp)


def _batch_size(c: RunConfig, name: str, batch: int, dp: int | None) -> Problems:
    """The problems of one global batch size; `dp` is None where it is not known."""
    micro, of_name = c.training.micro_batch_size, "training.micro_batch_size"
    if dp is not None:
        micro, of_name = micro * dp, f"{of_name} * data-parallel size"
    yield from must_be_multiple(name, batch, of_name, micro)
    stages = c.parallel.pipeline_model_parallel_size
    vpp = c.parallel.virtual_pipeline_model_parallel_size
    count = batch // micro
    if vpp is not None and stages > 1 and batch % micro == 0 and count % stages:
        whole = micro * stages
        yield (
            f"{name}={batch} is {count} micro-batches a rank, but {_VPP}={vpp} needs a multiple of "
            f"{PP}={stages}; allowed: {whole}, {2 * whole}, {3 * whole}, ..."
        )


def overlap(c: RunConfig, _: Facts) -> Problems:
    """Gathering parameters early rides on reduced gradients."""
    p = c.parallel
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true; "
            "it is false"
        )


def distributed_optimizer(c: RunConfig, _: Facts) -> Problems:
    """It costs nothing on one rank, and only its checkpoints load in any layout."""
    if not c.parallel.use_distributed_optimizer:
        yield "parallel.use_distributed_optimizer=false is not supported; allowed: true"


def packed_context_parallel(c: RunConfig, facts: Facts) -> Problems:
    """Transformer Engine cuts packed documents one by one, and they are not padded for that."""
    cp = c.parallel.context_parallel_size
    if c.data.packed_documents and cp > 1 and facts.has_cuda:
        yield (
            f"parallel.context_parallel_size={cp} with data.packed_documents=true is not "
            "supported on GPUs; allowed: 1, or data.packed_documents=false"
        )


PARALLEL: tuple[Rule, ...] = (
    tensor_parallel,
    sequence_parallel,
    sequence_length,
    mamba_context_parallel,
    state_passing,
    pipeline_layers,
    virtual_pipeline,
    expert_parallel,
    expert_tensor_parallel_device,
    moe_tensor_parallel,
    world_size,
    batch_size,
    overlap,
    distributed_optimizer,
    packed_context_parallel,
)
