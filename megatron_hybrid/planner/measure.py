"""What layers cost on this machine: timed on one rank, kind by kind."""

import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config import RunConfig, build_config
from megatron_hybrid.config.base import FrozenDict
from megatron_hybrid.config.layers import MULTIPLIED, sorts
from megatron_hybrid.config.pattern import ATTENTION, MLP, MOE, has_kind, parse_pattern
from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.planner.costs import EMBEDDING, OUTPUT, Cost, Costs

LAYERS = 2  # of a kind at a time
REPEATS = 5
# In which layers the parts are that selective recomputation may name.
_RECOMPUTED = {"core_attn": ATTENTION, "mlp": MLP, "moe": MOE, "shared_experts": MOE}


def measure_costs(config: RunConfig) -> Costs:
    """Milliseconds of a micro batch through a layer of each sort of a config's model.

    Within `training.distributed.model_parallel_groups` of one rank. The fastest of a few repeats:
    what else the machine does only adds.
    """
    found: dict[str, Cost] = {}
    every = sorted(sorts(config.model), key=lambda sort: sort.name)
    for number, sort in enumerate(every):
        # Alone, they are the model's sizes.
        own = sort.model.model_copy(update={"layers": FrozenDict()})
        alike = config.model_copy(update={"model": own})
        model = _model(alike, sort.kind)
        found[sort.name] = _layers(alike, model)
        if number == len(every) - 1:
            found[EMBEDDING], found[OUTPUT] = _ends(config, model)
    return Costs(MappingProxyType(found))


def timed_otherwise(config: RunConfig, *, has_cuda: bool) -> str | None:
    """What is not as it will be on GPUs, where this machine has none; None: nothing to say."""
    precision = config.precision
    if has_cuda or precision.recipe not in FLOAT8_RECIPES:
        return None
    how = "in float8 that is emulated, many times slower" if precision.emulate else "in bf16"
    return f"precision.recipe={precision.recipe}: without a GPU its linears are timed {how}"


def one_rank(config: RunConfig, pattern: str) -> RunConfig:
    """The same layers and micro batch in another pattern, on one rank.

    Nothing is left of the run around them, whose rules hold for its own pattern and length; nor of
    what has no place in the pattern.
    """
    values = config.model_dump(mode="json")
    values["model"]["hybrid_layer_pattern"] = pattern
    values["parallel"] = {}
    # The longest samples, as the planner reckons with.
    values["data"] |= {"phases": [], "sources": {}, "seq_length": max(sequence_lengths(config))}
    values["training"] |= {
        "global_batch_size": config.training.micro_batch_size, "batch_size_schedule": [],
    } | _recomputed(config, pattern)  # fmt: skip
    # Whichever layers stay in bf16, those between them are timed.
    values["precision"] |= {"num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0}
    left_out = ["overlap_p2p_comm", "align_param_gather", "cuda_graph_impl", "cuda_graph_modules"]
    values["model"] = {
        name: value
        for name, value in values["model"].items()
        if name not in MULTIPLIED or has_kind(pattern, MULTIPLIED[name])
        if not name.startswith("mtp_")
    }
    if MOE not in pattern:
        left_out += [name for name in values["gpu"] if "moe" in name]
        moe = [name for name in values["model"] if "moe" in name]
        values["model"] = {k: v for k, v in values["model"].items() if k not in moe}
    values["gpu"] = {k: v for k, v in values["gpu"].items() if k not in left_out}
    return build_config(values, which=())


def _recomputed(config: RunConfig, pattern: str) -> dict[str, Any]:
    """What the backward pass of other layers computes again."""
    training, layers = config.training, parse_pattern(pattern)
    if training.recompute_num_layers is not None:
        return {"recompute_num_layers": min(training.recompute_num_layers, layers.num_layers)}
    modules = [name for name in training.recompute_modules if layers.has(_RECOMPUTED[name])]
    if training.recompute_modules and not modules:
        return {"recompute_granularity": None, "recompute_modules": []}
    return {"recompute_modules": modules}


def _model(config: RunConfig, kind: str) -> Any:
    """A model of a few layers of a kind, on this machine's device."""
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.platform.backend import resolve_backend

    backend, device = resolve_backend(config.backend), initialize().device
    config = one_rank(config, kind * LAYERS)
    engine_config = transformer_config(config, backend, device)
    [chunk] = build_model_chunks(config, engine_config, backend)
    return chunk.module if hasattr(chunk, "module") else chunk


def _hidden(config: RunConfig, model: Any) -> Tensor:
    """A micro batch of hidden states `[s, b, h]`."""
    weight = next(p for p in model.parameters() if p.dim() == 2)
    shape = (config.data.seq_length, config.training.micro_batch_size, config.model.hidden_size)
    return torch.randn(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)


def _layers(config: RunConfig, model: Any) -> Cost:
    hidden = _hidden(config, model)
    rotary = None
    if model.position_embedding_type == "rope":  # which a model without attention has not
        rotary = model.rotary_pos_emb(config.data.seq_length)

    def forward() -> Tensor:
        output: Tensor = model.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary
        )
        return output

    cost = _timed(forward, hidden.device)
    return Cost(cost.forward_ms / LAYERS, cost.backward_ms / LAYERS)


def _ends(config: RunConfig, model: Any) -> tuple[Cost, Cost]:
    """Embedding; output layer and loss."""
    hidden = _hidden(config, model)
    length, batch = hidden.shape[:2]
    tokens = torch.randint(0, 8, (batch, length), device=hidden.device)
    positions = torch.arange(length, device=hidden.device).expand(batch, length)

    def loss() -> Tensor:
        logits, _ = model.output_layer(hidden)
        losses: Tensor = model.compute_language_model_loss(tokens, logits)
        return losses

    def embedded() -> Tensor:
        output: Tensor = model.embedding(input_ids=tokens, position_ids=positions)
        return output

    return _timed(embedded, hidden.device), _timed(loss, hidden.device)


def _timed(forward: Callable[[], Tensor], device: torch.device) -> Cost:
    """The fastest forward and backward pass of a few, after one that is not timed."""
    best = [float("inf"), float("inf")]
    for repeat in range(1 + REPEATS):
        _wait(device)
        times = [time.perf_counter()]
        output = forward()
        _wait(device)
        times.append(time.perf_counter())
        output.backward(torch.ones_like(output))
        _wait(device)
        times.append(time.perf_counter())
        if repeat:
            best = [min(best[i], times[i + 1] - times[i]) for i in range(2)]
    return Cost(1e3 * best[0], 1e3 * best[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
