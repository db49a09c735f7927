"""The layer pattern, such as `M-M*|ME`: one symbol a layer, `|` between pipeline segments.

A leaf: it imports nothing of this package and no torch, so that the config's rules can use it.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

MAMBA, ATTENTION, MLP, MOE, PARALLEL, GDN, SEPARATOR = "M", "*", "-", "E", "H", "G", "|"
KINDS = MappingProxyType(
    {
        MAMBA: "Mamba", ATTENTION: "attention", MLP: "MLP", MOE: "MoE",
        PARALLEL: "parallel heads", GDN: "gated delta net",
    }
)  # fmt: skip
# What a layer is made of, where that is more than itself: both read the same normed input.
_MADE_OF = MappingProxyType({PARALLEL: (ATTENTION, MAMBA)})
# What reads from left to right, token by token.
_RECURRENT = (MAMBA, GDN)
_ALLOWED = ", ".join(f"{symbol!r} ({kind})" for symbol, kind in KINDS.items())
_PREDICTION = "/"  # before each module of multi-token prediction
MOST_LAYERS = 100_000  # so that a slip of the finger does not fill the memory
_RANGE = re.compile(r"\s*(\d+)(?:-(\d+))?\s*")
_MOST_PROBLEMS = 10  # that are told of one by one
# Symbols of megatron-core's patterns that have no layer here.
_ENGINE_ONLY = MappingProxyType(
    {
        "D": "sparse attention",
        "+": "multi-latent attention",
        _PREDICTION: "multi-token prediction: model.mtp_num_layers and "
        "model.mtp_hybrid_override_pattern say it",
    }
)


def made_of(kind: str) -> tuple[str, ...]:
    """The kinds whose sizes and parameters a layer has: its own, or those of its parallel heads."""
    return _MADE_OF.get(kind, (kind,))


def is_or_has(symbol: str, kind: str) -> bool:
    """Whether a layer is of a kind, or has it in it."""
    return kind == symbol or kind in made_of(symbol)


def having(kind: str) -> str:
    """The symbols of the layers that are of a kind or have it in them: "*H" of attention."""
    return "".join(symbol for symbol in KINDS if is_or_has(symbol, kind))


def pattern_problems(text: str) -> list[str]:
    """What is wrong with a pattern, one sentence each with position, symbol and what is allowed."""
    problems = []
    for position, symbol in enumerate(text, start=1):
        if symbol in KINDS or symbol == SEPARATOR:
            continue
        meaning = f" ({_ENGINE_ONLY[symbol]})" if symbol in _ENGINE_ONLY else ""
        verb = "is not supported" if symbol in _ENGINE_ONLY else "is not a layer"
        problems.append(f"symbol {position}, {symbol!r}{meaning}, {verb}; allowed: {_ALLOWED}, '|'")
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"{len(problems) - _MOST_PROBLEMS} more symbols are wrong"]
    if not text.replace(SEPARATOR, ""):
        return [*problems, f"it has no layer; allowed: one or more of {_ALLOWED}, and '|'"]
    for index, segment in enumerate(text.split(SEPARATOR), start=1):
        if not segment:
            count = text.count(SEPARATOR) + 1
            problems.append(
                f"pipeline segment {index} of {count} is empty; each segment between '|' "
                "must hold at least one layer"
            )
    return problems


@dataclass(frozen=True)
class Pattern:
    """A valid pattern, cut at `|`. `segments` are strings of layer symbols, none empty."""

    segments: tuple[str, ...]

    @property
    def layers(self) -> str:
        """All layer symbols in order, without `|`."""
        return "".join(self.segments)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    def has(self, kind: str) -> bool:
        """Whether there is a layer of one kind, or one that has it in it."""
        return any(symbol in self.layers for symbol in having(kind))

    def count(self, symbol: str) -> int:
        """Layers of one kind."""
        return self.layers.count(symbol)

    def chunks(self, stages: int) -> tuple[str, ...]:
        """The layers of each pipeline chunk; chunk i is of stage `i % stages`.

        Without `|` the pattern is cut evenly, as the engine does; a rest is left out, as rules
        refuse it.
        """
        if len(self.segments) > 1 and stages > 1:
            return self.segments
        size = self.num_layers // stages
        return tuple(self.layers[i * size : (i + 1) * size] for i in range(stages))

    def most_layers(self, stages: int) -> int:
        """Of any pipeline stage."""
        stages = min(stages, self.num_layers)
        chunks = self.chunks(stages)
        return max(sum(map(len, chunks[stage::stages])) for stage in range(stages))

    def engine_text(self, pipeline_size: int, modules: int = 0, prediction: str = "") -> str:
        """The pattern as megatron-core must get it for `pipeline_size` stages.

        Args:
            modules: of multi-token prediction, with the layers `prediction` each.

        Without pipelining the engine would build the first segment only, so `|` is left out.
        Parallel heads, which it does not know, stand in the place of attention: such layers are
        given the angles of RoPE.
        """
        text = self.layers if pipeline_size == 1 else SEPARATOR.join(self.segments)
        return text.replace(PARALLEL, ATTENTION) + modules * f"{_PREDICTION}{prediction}"


def parse_pattern(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        ValueError: `pattern_problems` of it, joined.
    """
    problems = pattern_problems(text)
    if problems:
        raise ValueError(f"pattern {text!r}: " + "; ".join(problems))
    return Pattern(tuple(text.split(SEPARATOR)))


def has_kind(text: str, kind: str) -> bool:
    """Whether a pattern, even a wrong one, has a layer of one kind, or one that has it in it."""
    return any(symbol in text for symbol in having(kind))


def cut_evenly(pattern: str, stages: int) -> str:
    """A pattern cut by '|' into stages of as many layers, but for one; wherever it was cut."""
    layers = pattern.replace("|", "")
    size, rest = divmod(len(layers), stages)
    ends = [0, *(size * i + min(i, rest) for i in range(1, stages + 1))]
    return "|".join(layers[a:b] for a, b in pairwise(ends) if b > a)


def recurrent_symbols(text: str) -> str:
    """The symbols of a pattern, even a wrong one, whose layers read from left to right: "MH"."""
    kinds = (kind for kind in KINDS if any(is_or_has(kind, each) for each in _RECURRENT))
    return "".join(kind for kind in kinds if kind in text)


def read_numbers(text: str) -> tuple[int, ...]:
    """`2,4,10-20` -> the numbers.

    Raises:
        ValueError: it is not like that.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= MOST_LAYERS:
            raise ValueError(
                f"{text!r} is not like 2,4,10-20 (layers are counted from 1, to {MOST_LAYERS})"
            )
        numbers += range(first, last + 1)
    return tuple(numbers)
