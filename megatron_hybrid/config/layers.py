"""What is layer i? Its kind and its own sizes, from the pattern, the model's sizes and
`model.layers`.

Whoever asks for a size of a layer asks the resolved layer, never the model: of two layers of one
kind each may have its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from megatron_hybrid.config.base import FrozenDict
from megatron_hybrid.config.layer_entries import said_of_layers, sizes_of, version_of
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import (
    ATTENTION,
    KINDS,
    MAMBA,
    MLP,
    PARALLEL,
    is_or_has,
    parse_pattern,
)
from megatron_hybrid.errors import ConfigError

# The layers that a field of the whole model is of: what it says of others is a mistake.
MULTIPLIED = MappingProxyType(
    {
        "key_multiplier": ATTENTION, "ssm_multipliers": MAMBA, "mamba_rms_norm": MAMBA,
        "mamba_inner_layernorms": MAMBA, "mlp_multipliers": MLP, "parallel_heads_join": PARALLEL,
        "ssm_in_multiplier": PARALLEL, "ssm_out_multiplier": PARALLEL,
        "attention_in_multiplier": PARALLEL, "attention_out_multiplier": PARALLEL,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A resolved layer.

    Attributes:
        number: its place in the pattern, from 1.
        kind: its symbol.
        model: the model with this layer's own sizes in place of the model's.
        own: the sizes that are not the model's, by field.
        keys: the entry of `model.layers` that says a field, where one does.
    """

    number: int
    kind: str
    model: ModelConfig
    own: Mapping[str, Any]
    keys: Mapping[str, str]

    def path(self, name: str) -> str:
        """The dotted field that says a size: "model.layers.3.ffn_hidden_size"."""
        return f"model.layers.{self.keys[name]}.{name}" if name in self.keys else f"model.{name}"

    @property
    def sizes(self) -> dict[str, Any]:
        """All that it has of its own, by field."""
        names = sizes_of(self.kind, self.model.mamba_version)
        return {name: getattr(self.model, name) for name in names}

    @property
    def what(self) -> str:
        """Its kind in words: "Mamba-2"."""
        version = f"Mamba-{self.model.mamba_version}"
        if self.kind == PARALLEL and self.model.mamba_version == 1:
            return f"{KINDS[PARALLEL]} with {version}"
        return version if self.kind == MAMBA else KINDS[self.kind]

    @property
    def rotates(self) -> bool:
        """Whether it has RoPE."""
        return self.has(ATTENTION) and self.model.position_embedding_type == "rope"

    def has(self, kind: str) -> bool:
        """Whether it is of a kind, or has it in it."""
        return is_or_has(self.kind, kind)


def layers(model: ModelConfig) -> tuple[Layer, ...]:
    """Every layer of a resolved model, in the order of the pattern."""
    symbols = parse_pattern(model.hybrid_layer_pattern).layers
    if not model.layers:
        return tuple(Layer(n, kind, model, {}, {}) for n, kind in enumerate(symbols, start=1))
    models: dict[tuple[tuple[str, Any], ...], ModelConfig] = {(): model}
    found = []
    for number, of_layer in enumerate(said_of_layers(model), start=1):
        names = sizes_of(symbols[number - 1], version_of(model, of_layer))
        of_layer = {name: entries for name, entries in of_layer.items() if name in names}
        own = {
            name: entries[0].value
            for name, entries in of_layer.items()
            if entries[0].value != getattr(model, name)
        }
        key = tuple(sorted(own.items()))
        if key not in models:
            models[key] = model.model_copy(update=own)
        keys = {name: entries[0].key for name, entries in of_layer.items()}
        found.append(Layer(number, symbols[number - 1], models[key], own, keys))
    return tuple(found)


def layers_of(model: ModelConfig, kind: str) -> tuple[Layer, ...]:
    """The layers of one kind, or with it in them, for rules: the first one of them where none says
    anything.
    """
    if not model.layers:
        found = enumerate(parse_pattern(model.hybrid_layer_pattern).layers, start=1)
        first = next(((n, symbol) for n, symbol in found if is_or_has(symbol, kind)), None)
        return () if first is None else (Layer(*first, model, {}, {}),)
    return tuple(layer for layer in layers(model) if layer.has(kind))


@dataclass(frozen=True)
class Sort:
    """Layers that are alike.

    Attributes:
        name: the kind's symbol; of others of a kind than the first, with the first one's number.
        layer: the first of them.
        numbers: of all, from 1.
    """

    name: str
    layer: Layer
    numbers: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Their symbol."""
        return self.layer.kind

    def has(self, kind: str) -> bool:
        """Whether they are of a kind, or have it in them."""
        return self.layer.has(kind)

    @property
    def model(self) -> ModelConfig:
        """The model with their sizes."""
        return self.layer.model


def sorts(model: ModelConfig) -> tuple[Sort, ...]:
    """The layers of a resolved model by what they are alike in; of one kind by first places."""
    if not model.layers:
        symbols = parse_pattern(model.hybrid_layer_pattern).layers
        of_kinds = {
            kind: tuple(n for n, symbol in enumerate(symbols, start=1) if symbol == kind)
            for kind in KINDS
            if kind in symbols
        }
        return tuple(Sort(k, Layer(of[0], k, model, {}, {}), of) for k, of in of_kinds.items())
    first: dict[tuple[Any, ...], Layer] = {}
    numbers: dict[tuple[Any, ...], list[int]] = {}
    for layer in layers(model):
        key = (layer.kind, *sorted(layer.own.items()))
        first.setdefault(key, layer)
        numbers.setdefault(key, []).append(layer.number)
    found: list[Sort] = []
    for kind in KINDS:
        of_kind = [(layer, numbers[key]) for key, layer in first.items() if layer.kind == kind]
        for place, (layer, of) in enumerate(of_kind):
            found.append(Sort(f"{kind}{of[0]}" if place else kind, layer, tuple(of)))
    return tuple(found)


@lru_cache(maxsize=16)
def sort_of_each(model: ModelConfig) -> tuple[Sort, ...]:
    """The sort of every layer, in the order of the pattern."""
    found = {number: sort for sort in sorts(model) for number in sort.numbers}
    return tuple(found[number] for number in sorted(found))


def producers(model: ModelConfig) -> dict[int, Layer | None]:
    """By its number, for each layer that reuses keys and values, the one that has them: the nearest
    before it with attention that reuses none."""
    found: dict[int, Layer | None] = {}
    nearest: Layer | None = None
    for layer in layers(model) if model.layers else ():
        if layer.kind == PARALLEL and layer.model.reuse_kv:
            found[layer.number] = nearest
        elif layer.has(ATTENTION):
            nearest = layer
    return found


def are_unlike(model: ModelConfig) -> bool:
    """Whether some layer has sizes other than the model's."""
    return bool(model.layers) and any(layer.own for layer in layers(model))


def rotates(model: ModelConfig) -> bool:
    """Whether some layer has RoPE."""
    return any(layer.rotates for layer in layers_of(model, ATTENTION))


def multiplied(model: ModelConfig) -> dict[str, Any]:
    """Of the factors on what layers compute, and of what else is not in every model of a kind,
    those that are not as usual, with what is usual.
    """
    names = (*MULTIPLIED, "embedding_multiplier", "lm_head_multiplier", "num_meta_tokens")
    usual = {name: ModelConfig.model_fields[name].default for name in names}
    return {name: value for name, value in usual.items() if getattr(model, name) != value}


def in_the_model(model: ModelConfig) -> ModelConfig:
    """The same model with sizes that all layers of a kind have said by itself, not by `layers`.

    As it is where some layers of a kind are unlike, or kinds have unlike values of one field.
    """
    every = sorts(model)
    sizes = {(name, value) for sort in every for name, value in sort.layer.sizes.items()}
    if not model.layers or any(sort.name != sort.kind for sort in every):
        return model
    if len(sizes) != len(dict(sizes)):
        return model
    return model.model_copy(update=dict(sizes) | {"layers": FrozenDict()})


def mamba_layers(model: ModelConfig, version: int) -> tuple[Layer, ...]:
    """The layers with Mamba of one version, for rules, as `layers_of`."""
    return tuple(each for each in layers_of(model, MAMBA) if each.model.mamba_version == version)


def mamba1_problem(model: ModelConfig, what: str) -> str | None:
    """Why something that knows no Mamba-1 cannot take a model; None: it can.

    Args:
        what: that, such as "an export".
    """
    of_one = mamba_layers(model, 1)
    if not of_one:
        return None
    return f"{of_one[0].path('mamba_version')}=1: {what} does not take Mamba-1 yet; allowed: 2"


def refuse_mamba1(model: ModelConfig, what: str) -> None:
    """Refuse Mamba-1 where it is not served.

    Raises:
        ConfigError: `mamba1_problem`.
    """
    if problem := mamba1_problem(model, what):
        raise ConfigError([problem])


def unlike_problem(model: ModelConfig, what: str) -> str | None:
    """Why something that goes by one size of each kind cannot take a model; None: it can take
    `in_the_model` of it.

    Args:
        what: that, such as "an export".
    """
    if not in_the_model(model).layers:
        return None
    seen: dict[str, Layer] = {}
    for layer in (sort.layer for sort in sorts(model)):
        for name, value in layer.sizes.items():
            other = seen.setdefault(name, layer)
            if value != (first := other.sizes[name]):
                return (
                    f"layer {layer.number} has {layer.path(name)}={shown_size(value)} and layer "
                    f"{other.number} {other.path(name)}={shown_size(first)}: {what} does not take "
                    "layers of unlike sizes yet"
                )
    raise AssertionError("layers are unlike in some size")


def refuse_unlike(model: ModelConfig, what: str) -> None:
    """Refuse layers of unlike sizes where they are not served.

    Raises:
        ConfigError: `unlike_problem`.
    """
    if model.layers and (problem := unlike_problem(model, what)):
        raise ConfigError([problem])


def shown_size(value: Any) -> str:
    """A size, or what else a model says of its layers, as one types it."""
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def numbers_text(numbers: tuple[int, ...]) -> str:
    """Layer numbers with runs of them written as ranges: "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
