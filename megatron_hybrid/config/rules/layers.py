"""Rules of `model.layers`: entries are about layers that there are, and sizes that those have."""

from megatron_hybrid.config.layer_entries import Key, read_key, said, said_of_layers
from megatron_hybrid.config.layers import Layer, layers, shown_size
from megatron_hybrid.config.pattern import KINDS, PARALLEL, parse_pattern
from megatron_hybrid.config.rules.common import Facts, Problems, Rule
from megatron_hybrid.config.run import RunConfig

_FORMS = "a layer number such as 3, a range such as 10-20, or a kind: " + ", ".join(
    f"{symbol} ({kind})" for symbol, kind in KINDS.items()
)


def layer_entries(c: RunConfig, _: Facts) -> Problems:
    """Each entry names layers of the pattern, and fields that some of them have."""
    symbols = parse_pattern(c.model.hybrid_layer_pattern).layers
    resolved = layers(c.model)
    for text, entry in c.model.layers.items():
        path, key = f"model.layers.{text}", read_key(text, len(symbols))
        if key is None or not key.numbers:
            yield f"{path} is about no layer; allowed: {_FORMS}"
        elif key.kind is not None and key.kind not in symbols:
            yield (
                f"{path} needs {key.kind!r} layers in model.hybrid_layer_pattern="
                f"{c.model.hybrid_layer_pattern!r}; allowed: {', '.join(sorted(set(symbols)))}"
            )
        elif key.numbers[-1] > len(symbols):
            yield (
                f"{path}: there is no layer {key.numbers[-1]}; model.hybrid_layer_pattern="
                f"{c.model.hybrid_layer_pattern!r} has layers 1 to {len(symbols)}"
            )
        else:
            of = [resolved[n - 1] for n in key.numbers if key.kind in (None, symbols[n - 1])]
            of.sort(key=lambda layer: list(KINDS).index(layer.kind))
            allowed = [name for layer in of for name in layer.sizes]
            for name, value in said(entry):
                if name not in allowed:
                    yield (
                        f"{path}.{name}={shown_size(value)}: {_whose(key, of)} no such field; "
                        f"allowed: {', '.join(dict.fromkeys(allowed))}"
                    )


def _whose(key: Key, of: list[Layer]) -> str:
    """The layers of an entry, as what has or has not a field."""
    named = " or ".join(dict.fromkeys(layer.what for layer in of))
    if key.kind is not None:
        return f"{named} layers have"
    if len(key.numbers) == 1:
        return f"layer {key.numbers[0]} is {_article(named)} {named} layer and has"
    return f"layers {key.numbers[0]} to {key.numbers[-1]} are of {named} and have"


def _article(word: str) -> str:
    return "a" if word.startswith(("Mamba", KINDS[PARALLEL])) else "an"


def layer_ranges(c: RunConfig, _: Facts) -> Problems:
    """Two ranges may say the same of a layer, but not one this and one that."""
    told: set[tuple[str, str, str]] = set()
    for number, of_layer in enumerate(said_of_layers(c.model), start=1):
        for name, entries in of_layer.items():
            first = entries[0]
            for other in entries[1:]:
                found = (first.key, other.key, name)
                if other.rank != first.rank or other.value == first.value or found in told:
                    continue
                told.add(found)
                yield (
                    f"model.layers.{first.key}.{name}={shown_size(first.value)} and "
                    f"model.layers.{other.key}.{name}={shown_size(other.value)} disagree about "
                    f"layer {number}; allowed: ranges that agree, or model.layers.{number}.{name}, "
                    "which wins over both"
                )


LAYERS: tuple[Rule, ...] = (layer_entries, layer_ranges)
