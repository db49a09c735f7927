"""What is asked of `megatron-hybrid compress prune`, and every reason against it.

Layers are counted from 1, in the parent.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.layers import Layer, layers, producers
from megatron_hybrid.config.pattern import ATTENTION, KINDS, MAMBA, MLP, MOE, read_numbers
from megatron_hybrid.config.rules.common import listing, must_be_multiple
from megatron_hybrid.errors import UserError

# The sizes that are cut, and the layers that have them.
CUT = MappingProxyType(
    {
        "ffn_hidden_size": MLP,
        "mamba_num_heads": MAMBA,
        "mamba_head_dim": MAMBA,
        "num_attention_heads": ATTENTION,
        "num_moe_experts": MOE,
        "moe_shared_expert_intermediate_size": MOE,
    }
)
_SIZE = re.compile(r"\s*([a-z_]+)\s*=\s*(\d{1,9})\s*")


@dataclass(frozen=True)
class Request:
    """What a pruning is to make.

    Attributes:
        num_layers: how many are to stay, the most important ones; None: all but `drop_layers`.
        drop_layers: numbers of those that go.
        hidden_size: None: the parent's.
        sizes: of all layers that have them, by field of `CUT`.
        of_layers: numbers, field and size, which win over `sizes`.
    """

    num_layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    hidden_size: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    of_layers: Sequence[tuple[tuple[int, ...], str, int]] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        depth = self.num_layers is not None or bool(self.drop_layers)
        return not (depth or self.hidden_size is not None or self.sizes or self.of_layers)


def read_sizes(text: str) -> list[tuple[tuple[int, ...], str, int]]:
    """`10-20:ffn_hidden_size=96,mamba_num_heads=8` -> numbers, field and size of each.

    Raises:
        ValueError: it is not like that; names the field.
    """
    numbers, separator, said = text.rpartition(":")
    if not separator:
        raise ValueError(f"{text!r} is not like 10-20:ffn_hidden_size=96,mamba_num_heads=8")
    found = []
    for each in said.split(","):
        match = _SIZE.fullmatch(each)
        if match is None:
            raise ValueError(f"{each!r} is not like ffn_hidden_size=96")
        if match[1] not in CUT:
            near = difflib.get_close_matches(match[1], CUT, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{match[1]!r} is no size that is cut{meant}; allowed: "
                             f"{', '.join(CUT)}")  # fmt: skip
        found.append((read_numbers(numbers), match[1], int(match[2])))
    return found


def option(name: str) -> str:
    """How a field is typed: `--ffn-hidden-size`."""
    return f"--{name.replace('_', '-')}"


def problems(model: ModelConfig, request: Request, *, scored: bool, keep_first: bool) -> list[str]:
    """Why a request does not fit the parent, all reasons.

    Args:
        scored: there are scores.
        keep_first: of channels, heads and experts the first ones are to stay.
    """
    every = layers(model)
    found = list(_of_choice(model, every, request, scored=scored, keep_first=keep_first))
    found += _of_depth(model, every, request, scored=scored)
    found += _of_hidden_size(model, every, request)
    found += _of_sizes(every, request)
    return list(dict.fromkeys(found))


def _of_choice(
    model: ModelConfig,
    every: Sequence[Layer],
    request: Request,
    *,
    scored: bool,
    keep_first: bool,
) -> Iterator[str]:
    """Whether it is said, once, what stays."""
    if request.is_empty:
        yield (
            "nothing is asked; allowed: --num-layers, --drop-layers, --hidden-size, --layers, "
            f"{', '.join(option(name) for name in CUT)}"
        )
    if scored and keep_first:
        yield "--scores with --keep first: they say the same thing; allowed: one of them"
    said = [*request.sizes.items(), *((name, value) for _, name, value in request.of_layers)]
    cuts = [
        f"{option(name)} {value}"
        for name, value in said
        if any(each.kind == CUT[name] and value != getattr(each.model, name) for each in every)
    ]
    if request.hidden_size not in (None, model.hidden_size):
        cuts.insert(0, f"--hidden-size {request.hidden_size}")
    if cuts and not scored and not keep_first:
        yield (
            f"{cuts[0]}: nothing says which of them stay; allowed: --scores, a file of "
            "`megatron-hybrid compress score`, or --keep first"
        )


def _of_depth(
    model: ModelConfig, every: Sequence[Layer], request: Request, *, scored: bool
) -> Iterator[str]:
    count, dropped = len(every), set(request.drop_layers)
    outside = sorted(number for number in dropped if number > count)
    if outside:
        yield (
            f"--drop-layers {listing(outside)}: the model has {count} layers; allowed: 1 to {count}"
        )
    if request.num_layers is not None:
        if dropped:
            yield (
                f"--num-layers {request.num_layers} with --drop-layers "
                f"{listing(sorted(dropped))}: they say the same thing; allowed: one of them"
            )
        if not 1 <= request.num_layers <= count:
            yield (
                f"--num-layers {request.num_layers} must be at most the model's {count}; "
                f"allowed: 1 to {count}"
            )
        elif request.num_layers < count and not scored:
            yield (
                f"--num-layers {request.num_layers} of {count} needs to know which are the least "
                "important; allowed: --scores, or --drop-layers with their numbers"
            )
    if dropped:
        yield from depth_problems(model, dropped, "--drop-layers")


def depth_problems(model: ModelConfig, dropped: set[int], what: str) -> Iterator[str]:
    """Why layers cannot go.

    Args:
        what: that says so, for the sentence.
    """
    start = 1
    segments = model.hybrid_layer_pattern.split("|")
    for stage, segment in enumerate(segments, start=1):
        numbers = range(start, start + len(segment))
        start += len(segment)
        if dropped.issuperset(numbers):
            of = f" of pipeline segment {stage} of {len(segments)}" if len(segments) > 1 else ""
            yield (
                f"{what} {listing(sorted(numbers), 40)} takes all layers{of} of "
                f"model.hybrid_layer_pattern={model.hybrid_layer_pattern!r}; "
                f"allowed: to leave at least one"
            )
    for number, producer in producers(model).items():
        if producer is not None and producer.number in dropped and number not in dropped:
            yield (
                f"{what} {producer.number}: layer {number} reuses its keys and values; allowed: "
                f"to drop {number} too"
            )


def _of_hidden_size(model: ModelConfig, every: Sequence[Layer], request: Request) -> Iterator[str]:
    size = request.hidden_size
    if size is None:
        return
    if not 1 <= size <= model.hidden_size:
        yield (
            f"--hidden-size {size} must be at most model.hidden_size={model.hidden_size}; "
            f"allowed: 1 to {model.hidden_size}"
        )
    stay = [each for each in every if each.number not in request.drop_layers]
    others = [each for each in stay if not has_axes(each)]
    if others and size != model.hidden_size:
        yield (
            f"--hidden-size {size}: layer {others[0].number} is {others[0].what}, whose linears "
            f"are not cut yet; allowed: models of Mamba-2, attention, MLP and MoE layers"
        )


def has_axes(layer: Layer) -> bool:
    """Whether a layer's tensors can be cut."""
    if layer.kind == MAMBA:
        return layer.model.mamba_version == 2
    return layer.kind in (ATTENTION, MLP, MOE)


def _of_sizes(every: Sequence[Layer], request: Request) -> Iterator[str]:
    for name, value in request.sizes.items():
        of_kind = [each for each in every if has_axes(each) and each.kind == CUT[name]]
        if not of_kind:
            yield f"{option(name)} {value}: the model has no {_kind(name)} layers"
        for layer in of_kind:
            yield from _of_size(layer, name, value, option(name))
    for numbers, name, value in request.of_layers:
        for number in numbers:
            what = f"--layers {number}:{name}"
            if number > len(every):
                yield f"{what}={value}: the model has {len(every)} layers"
                break
            layer = every[number - 1]
            if number in request.drop_layers:
                yield f"{what}={value}: --drop-layers takes layer {number} away"
            elif not has_axes(layer) or layer.kind != CUT[name]:
                yield f"{what}={value}: layer {number} is {layer.what}, and not {_kind(name)}"
            else:
                yield from _of_size(layer, name, value, what)


def _kind(name: str) -> str:
    return "Mamba-2" if CUT[name] == MAMBA else KINDS[CUT[name]]


def _of_size(layer: Layer, name: str, value: int, what: str) -> Iterator[str]:
    """Why a layer cannot have a size. `what`: how it is typed."""
    model = layer.model
    has = getattr(model, name)
    if has is None:
        yield f"{what} {value}: layer {layer.number} has no shared expert"
        return
    if not 1 <= value <= has:
        yield (
            f"{what} {value} must be at most layer {layer.number}'s {layer.path(name)}={has}; "
            f"allowed: 1 to {has}"
        )
        return
    if name == "mamba_num_heads":
        groups, of = model.mamba_num_groups, layer.path("mamba_num_groups")
        yield from must_be_multiple(what, value, of, groups)
    if name == "num_attention_heads":
        assert model.num_query_groups is not None
        of = layer.path("num_query_groups")
        yield from must_be_multiple(what, value, of, model.num_query_groups)
    if name == "num_moe_experts" and value != has:
        if value < model.moe_router_topk:
            yield (
                f"{what} {value} must be at least {layer.path('moe_router_topk')}="
                f"{model.moe_router_topk}; allowed: {model.moe_router_topk} to {has}"
            )
        if model.moe_router_num_groups is not None:
            yield (
                f"{what} {value} with {layer.path('moe_router_num_groups')}="
                f"{model.moe_router_num_groups}: experts of groups are not cut yet; allowed: "
                f"{has}"
            )


def refusal(found: Sequence[str]) -> UserError:
    """All of them in one message."""
    lines = [f"  - {problem}" for problem in found]
    return UserError("\n".join(["this pruning cannot be done:", *lines]))


def stages(pattern: str, dropped: set[int]) -> str:
    """The pattern without some layers, with its segments."""
    number, kept = 0, []
    for symbol in pattern:
        if symbol != "|":
            number += 1
            if number in dropped:
                continue
        kept.append(symbol)
    return "".join(kept)
