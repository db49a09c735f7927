"""From what is asked of `megatron-hybrid upcycle` to the config of the MoE model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.source_model import derived_values
from megatron_hybrid.config import ModelConfig, RunConfig, load_config, rules
from megatron_hybrid.config.flags import parse_command_line
from megatron_hybrid.config.layers import layers, shown_size
from megatron_hybrid.config.pattern import MLP, MOE, parse_pattern
from megatron_hybrid.config.rules.common import divisors, listing
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.upcycling.scheme import factors_problem, sizes_in_common

# Of the load-balancing loss where a model had no experts before: what the paper trained with.
AUX_LOSS_COEFF = 0.01
# Fields that this command's options decide.
_OPTIONS = {
    "model.num_moe_experts": "--experts with --granularity",
    "model.moe_ffn_hidden_size": "--granularity",
    "model.moe_router_topk": "--topk",
    "model.moe_router_pre_softmax": "--router-order",
    "model.moe_shared_expert_intermediate_size": "--shared-experts",
    "optimizer.restart_schedule": "--restart-schedule or --no-restart-schedule",
    "checkpoint.load": "--load",
    "checkpoint.finetune": "pretrain, which loads what is made here,",
    "checkpoint.load_optim": "pretrain, which loads what is made here,",
    "checkpoint.load_rng": "pretrain, which loads what is made here,",
    "upcycling.from": "--load",
    "upcycling.router_std": "--router-std",
    "upcycling.router_noise": "--router-noise",
    "upcycling.reinit_fraction": "--reinit-fraction",
    "upcycling.scale_weights": "--scale-weights or --no-scale-weights",
}


@dataclass(frozen=True)
class Request:
    """What an upcycling is to make.

    Attributes:
        experts: E, copies of each MLP.
        granularity: G, experts that one copy is cut into.
        topk: T, experts a token goes to.
        layers: numbers of the layers that change, from 1; None for all MLP layers.
        shared_experts: S, shards of each MLP that go into an expert for all tokens.
        pre_softmax: softmax before the top-k, not after it.
    """

    experts: int
    granularity: int
    topk: int
    layers: tuple[int, ...] | None = None
    shared_experts: int = 0
    pre_softmax: bool = True


def upcycled_config(
    dense: RunConfig, request: Request, save: Path, words: Sequence[str]
) -> RunConfig:
    """The config of the MoE model, to be trained from a checkpoint at `save`.

    Args:
        dense: config of the dense run.
        save: the folder of checkpoints to be.
        words: changes on top, as on a command line.

    Raises:
        CheckpointError: the request does not fit the dense model, with every reason.
        ConfigError: the changes are wrong, or the config that they make.
    """
    typed = dict(parse_command_line(words).values)
    problems = _problems(dense.model, request, typed) + _said_twice(typed)
    if problems:
        try:
            load_config(words, which=rules.NO_FILES, base=dense.model_dump(mode="json"))
        except ConfigError as error:
            problems += error.problems
        raise _refusal(problems)
    values = derived_values(dense, save)
    values["model"] |= _model_values(dense.model, request)
    if MOE not in dense.model.hybrid_layer_pattern:
        values["model"]["moe_aux_loss_coeff"] = AUX_LOSS_COEFF
    pattern = values["model"]["hybrid_layer_pattern"]
    config = load_config(words, which=rules.NO_FILES, base=values)
    found = config.model.hybrid_layer_pattern
    if found.replace("|", "") != pattern.replace("|", ""):
        raise CheckpointError(
            f"model.hybrid_layer_pattern={found!r} must be {pattern!r}, which --layers decides, "
            "but for the places of '|'"
        )
    if said := _said_of_layers(config.model, _chosen(dense.model, request)):
        raise _refusal(said)
    return config


def _refusal(problems: Sequence[str]) -> CheckpointError:
    lines = [f"  - {problem}" for problem in problems]
    return CheckpointError("\n".join(["this upcycling cannot be done:", *lines]))


def _model_values(model: ModelConfig, request: Request) -> dict[str, Any]:
    """Fields of the MoE model that differ from the dense one's."""
    chosen = _chosen(model, request)
    mlp, _ = sizes_in_common(model, chosen)
    assert mlp.ffn_hidden_size is not None
    width = mlp.ffn_hidden_size // request.granularity
    numbers = iter(range(1, len(model.hybrid_layer_pattern) + 1))
    pattern = "".join(
        symbol if symbol == "|" or next(numbers) not in chosen else MOE
        for symbol in model.hybrid_layer_pattern
    )
    own = {layer.number: dict(layer.own) for layer in layers(model) if layer.own}
    for number in own.keys() & chosen:  # of an MLP's sizes, experts have the activation
        own[number] = {k: v for k, v in own[number].items() if k == "activation"}
    return {
        "layers": {str(number): sizes for number, sizes in own.items() if sizes},
        "hybrid_layer_pattern": pattern,
        "num_moe_experts": request.experts * (request.granularity - request.shared_experts),
        "moe_ffn_hidden_size": width,
        "moe_router_topk": request.topk,
        "moe_router_pre_softmax": request.pre_softmax,
        "moe_shared_expert_intermediate_size": request.shared_experts * width or None,
    }


def _chosen(model: ModelConfig, request: Request) -> frozenset[int]:
    """Numbers of the layers that change, from 1."""
    if request.layers is not None:
        return frozenset(request.layers)
    return frozenset(_mlp_layers(model))


def _mlp_layers(model: ModelConfig) -> list[int]:
    layers = parse_pattern(model.hybrid_layer_pattern).layers
    return [number for number, symbol in enumerate(layers, start=1) if symbol == MLP]


def _said_twice(typed: Mapping[str, Any]) -> list[str]:
    """Fields among the words that say what the command's own options say."""
    return [
        f"{path}={value} cannot be set here: {_OPTIONS[path]} decides it"
        for path, value in typed.items()
        if path in _OPTIONS
    ]


def _said_of_layers(moe: ModelConfig, chosen: frozenset[int]) -> list[str]:
    """The same of `model.layers`: entries that say of a layer that changes what an option says."""
    found = [
        f"{path}={shown_size(value)} cannot be set here: {_OPTIONS[f'model.{name}']} decides it"
        for layer in layers(moe)
        if layer.number in chosen
        for name, value in layer.sizes.items()
        if f"model.{name}" in _OPTIONS and (path := layer.path(name)) != f"model.{name}"
    ]
    return list(dict.fromkeys(found))


def _problems(model: ModelConfig, request: Request, typed: Mapping[str, Any]) -> list[str]:
    """Why the request does not fit the dense model."""
    e, g, t, s = request.experts, request.granularity, request.topk, request.shared_experts
    pattern = parse_pattern(model.hybrid_layer_pattern).layers
    mlps = _mlp_layers(model)
    problems = []
    if not mlps:
        problems.append(f"model.hybrid_layer_pattern={pattern!r} has no '{MLP}' layer to upcycle")
    elif others := sorted(_chosen(model, request) - set(mlps)):
        problems.append(
            f"--layers {listing(others)}: not an MLP; '{MLP}' layers are {listing(mlps, 40)}"
        )
    chosen = _chosen(model, request) & set(mlps)
    changed = [layer for layer in layers(model) if layer.number in chosen]
    mlp, unlike = sizes_in_common(model, chosen)
    problems += unlike + factors_problem(model)
    f = mlp.ffn_hidden_size or 1
    if f % g:
        name = changed[0].path("ffn_hidden_size") if changed else "model.ffn_hidden_size"
        problems.append(
            f"--granularity {g} must divide the MLPs' {name}={f}; allowed: {listing(divisors(f))}"
        )
    function = typed.get("model.moe_router_score_function", model.moe_router_score_function)
    if t == 1 and not request.pre_softmax and function == "softmax":
        problems.append(
            "--topk 1 with --router-order topk-softmax gives the one expert the weight 1, whatever "
            "the router says, so that it learns nothing; allowed: --topk 2 and more, or "
            "--router-order softmax-topk"
        )
    if s >= g:
        allowed = f"0 to {g - 1}" if g > 1 else "0"
        problems.append(
            f"--shared-experts {s} must leave some of the --granularity {g} shards to the router; "
            f"allowed: {allowed}"
        )
    elif t > e * (g - s):
        routed = f"{e} * {g}" if not s else f"{e} * ({g} - {s})"
        problems.append(
            f"--topk {t} must be at most the number of experts, {routed} = {e * (g - s)}; "
            f"allowed: 1 to {e * (g - s)}"
        )
    return problems
