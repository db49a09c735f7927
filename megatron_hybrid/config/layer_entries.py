"""What `model.layers` says, before anything is resolved: which layers an entry is about, which
sizes a kind of layer has of its own, and of several entries that say a size, which one holds.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_hybrid.config.model import UNSAID, LayerConfig, ModelConfig
from megatron_hybrid.config.pattern import (
    ATTENTION,
    GDN,
    KINDS,
    MAMBA,
    MLP,
    MOE,
    PARALLEL,
    is_or_has,
    parse_pattern,
)

_MAMBA = (
    "mamba_version", "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups",
    "mamba_intermediate_size", "mamba_dt_rank",
)  # fmt: skip
_ATTENTION = (
    "num_attention_heads", "num_query_groups", "kv_channels", "window_size",
    "position_embedding_type",
)  # fmt: skip
# Which sizes a layer has of its own, by kind.
SIZES = MappingProxyType(
    {
        MAMBA: _MAMBA,
        ATTENTION: _ATTENTION,
        PARALLEL: (*_ATTENTION, "reuse_kv", *_MAMBA),
        MLP: ("ffn_hidden_size", "activation"),
        MOE: (
            "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk",
            "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_router_num_groups",
            "moe_router_group_topk", "activation",
        ),
        GDN: (
            "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
            "linear_value_head_dim",
        ),
    }
)  # fmt: skip
# Of a layer's with Mamba, which only one of one version has.
_VERSIONS = MappingProxyType(
    {
        "mamba_num_heads": 2, "mamba_head_dim": 2, "mamba_num_groups": 2,
        "mamba_intermediate_size": 1, "mamba_dt_rank": 1,
    }
)  # fmt: skip
_NUMBERS = re.compile(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?")
# Of two entries that both say a size of a layer, the one that says it of fewer layers holds.
_KIND, _RANGE, _NUMBER = range(3)


def sizes_of(kind: str, mamba_version: int) -> tuple[str, ...]:
    """Which sizes a layer has of its own."""
    if not is_or_has(kind, MAMBA):
        return SIZES[kind]
    return tuple(
        name for name in SIZES[kind] if _VERSIONS.get(name, mamba_version) == mamba_version
    )


@dataclass(frozen=True)
class Key:
    """The name of an entry of `model.layers`, read.

    Attributes:
        numbers: the layers that it is about, from 1; of a kind, all places.
        kind: its symbol; None: any.
        rank: entries of a higher one win.
    """

    numbers: range
    kind: str | None
    rank: int


def read_key(text: str, num_layers: int) -> Key | None:
    """What an entry is about; None: it is no number, range or kind."""
    if text in KINDS:
        return Key(range(1, num_layers + 1), text, _KIND)
    match = _NUMBERS.fullmatch(text)
    if match is None:
        return None
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    return Key(range(first, last + 1), None, _RANGE if match[2] else _NUMBER)


@dataclass(frozen=True)
class Said:
    """A size that an entry says of a layer."""

    key: str
    rank: int
    value: Any


def said_of_layers(model: ModelConfig) -> list[dict[str, list[Said]]]:
    """By layer and field, what entries say of it, the one that holds first."""
    symbols = parse_pattern(model.hybrid_layer_pattern).layers
    found: list[dict[str, list[Said]]] = [{} for _ in symbols]
    for text, entry in model.layers.items():
        key = read_key(text, len(symbols))
        for number in key.numbers if key else ():
            kind = symbols[number - 1] if number <= len(symbols) else None
            if key is None or kind is None or key.kind not in (None, kind):
                continue
            for name, value in said(entry):
                if name in SIZES[kind]:
                    found[number - 1].setdefault(name, []).append(Said(text, key.rank, value))
    for of_layer in found:
        for each in of_layer.values():
            each.sort(key=lambda one: -one.rank)
    return found


def version_of(model: ModelConfig, of_layer: dict[str, list[Said]]) -> int:
    """A layer's, by what is said of it."""
    entries = of_layer.get("mamba_version")
    version: int = entries[0].value if entries else model.mamba_version
    return version


def mamba_versions(model: ModelConfig) -> set[int]:
    """Of all layers with Mamba; null sizes need not be resolved."""
    symbols = parse_pattern(model.hybrid_layer_pattern).layers
    of_layers = said_of_layers(model)
    return {
        version_of(model, of_layer)
        for kind, of_layer in zip(symbols, of_layers, strict=True)
        if is_or_has(kind, MAMBA)
    }


def all_say(model: ModelConfig, kind: str, name: str) -> bool:
    """Whether every layer of a kind, or with it in it, that has a size says its own; null sizes
    need not be resolved."""
    symbols = parse_pattern(model.hybrid_layer_pattern).layers
    of_layers = zip(symbols, said_of_layers(model), strict=True)
    return all(
        name in of_layer
        for symbol, of_layer in of_layers
        if is_or_has(symbol, kind) and name in sizes_of(symbol, version_of(model, of_layer))
    )


def said(entry: LayerConfig) -> Iterator[tuple[str, Any]]:
    """The fields that an entry says, with their values."""
    for name in LayerConfig.model_fields:
        if (value := getattr(entry, name)) is not UNSAID:
            yield name, value
