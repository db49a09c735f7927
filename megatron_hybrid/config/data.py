"""The data section: sources of tokens, and the phases in which a run blends them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from megatron_hybrid.config.base import (
    Amount,
    FilePath,
    FrozenDict,
    PathText,
    Positive,
    PositiveReal,
    Section,
    Text,
    Words,
    Workers,
)


def _blend(value: Any) -> Any:
    """Bring a prefix, `[w, a, w, b]` and `[[w, a], [w, b]]` to pairs; anything else is refused."""
    if value is None:
        return ()
    if isinstance(value, str):
        return ((1.0, value),)
    if not isinstance(value, Sequence):
        raise ValueError("neither a prefix nor a list")
    if len(value) == 1 and isinstance(value[0], str):
        return ((1.0, value[0]),)
    if value and not isinstance(value[0], Sequence):
        if len(value) % 2:
            raise ValueError("a weight without a prefix")
        return tuple(zip(value[::2], value[1::2], strict=True))
    return tuple(tuple(part) if isinstance(part, list) else part for part in value)


def _null_is_a_name(value: Any) -> Any:
    """YAML reads a bare `null` as nothing; here it names the tokenizer."""
    return "null" if value is None else value


def _null_is_no_source(value: Any) -> Any:
    return {} if value is None else value


def _null_is_no_phase(value: Any) -> Any:
    return () if value is None else value


def _one_is_several(value: Any) -> Any:
    """A single path needs no list."""
    return (value,) if isinstance(value, str) else value


Blend = Annotated[
    tuple[tuple[Annotated[float, Field(gt=0)], PathText], ...],
    Strict(False),
    BeforeValidator(_blend),
    Words("one prefix, or weights above 0 and prefixes such as [[0.3, a], [0.7, b]]"),
]
# Names stand in dotted overrides, so they hold no dot, bracket, `=` or blank.
Name = Annotated[
    Text, Field(pattern=r"^[\w+-]+$"), Words("a name of letters, digits, '_', '-' or '+'")
]
Paths = Annotated[
    tuple[PathText, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(_one_is_several),
    Words("a prefix, or a list of prefixes such as [data/web_0, data/web_1]"),
]
Weights = Annotated[
    dict[str, Annotated[float, Field(ge=0)]],
    Field(min_length=1),
    AfterValidator(FrozenDict),
    Words("weights by source such as {web: 0.6, code: 0.4}"),
]


class SourceConfig(Section):
    """A named body of tokenised text: one or more shards, read as one."""

    path: Paths = Field(
        description="prefixes of its token files (prefix.bin, prefix.idx), or globs of prefixes"
    )
    max_epochs: PositiveReal | None = Field(
        default=None,
        description="most passes over it in the whole run; null: data.max_epochs",
    )
    fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of its training tokens that is used"
    )
    split: Text | None = Field(
        default=None, description="its own train,validate,test shares; null: data.split"
    )


class PhaseConfig(Section):
    """A stretch of the run with one blend and one sequence length."""

    name: Name = Field(description="name of the phase, in logs and plots")
    start_tokens: Amount | None = Field(
        default=None, description="tokens of the run at which it begins"
    )
    start_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="share of the run's tokens at which it begins"
    )
    last_tokens: Amount | None = Field(
        default=None, description="it begins this many tokens before the run's end"
    )
    weights: Weights = Field(
        description="each source's weight in the blend; they need not sum to 1"
    )
    seq_length: Positive | None = Field(
        default=None, description="tokens in a sample; null: data.seq_length"
    )


Sources = Annotated[
    dict[Name, SourceConfig],
    BeforeValidator(_null_is_no_source),
    AfterValidator(FrozenDict),
    Words("sources by name such as {web: {path: data/web}}"),
]
Phases = Annotated[
    tuple[PhaseConfig, ...],
    Strict(False),
    BeforeValidator(_null_is_no_phase),
    Words("a list of phases such as [{name: all, weights: {web: 0.6, code: 0.4}}]"),
]


class DataConfig(Section):
    """What is read, and how it is cut into samples."""

    data_path: Blend = Field(
        default=(),
        description="token files: one prefix, or weights and prefixes (prefix.bin, prefix.idx); "
        "in place of sources and phases",
    )
    sources: Sources = Field(
        default=FrozenDict(), description="bodies of tokenised text by name, for phases to blend"
    )
    phases: Phases = Field(
        default=(), description="blends of the sources, one after the other over the run's tokens"
    )
    max_epochs: PositiveReal | None = Field(
        default=None, description="most passes over any source; null: no cap"
    )
    sample_order: Literal["plan", "megatron"] = Field(
        default="plan",
        description="plan: computed, no index files, no repeats; megatron: megatron-core's "
        "GPTDataset order, for parity with its runs",
    )
    block_tokens: Positive | None = Field(
        default=None,
        description="tokens in a block, the unit in which a source is shuffled; null: by the "
        "sequence lengths",
    )
    split: Text = Field(
        default="969,30,1",
        description="shares of each source's tokens (with sample_order=megatron: documents) to "
        "train, validate and test on",
    )
    seq_length: Positive = Field(default=1024, description="tokens in a sample")
    tokenizer_type: Annotated[
        Literal["sentencepiece", "huggingface", "null"], BeforeValidator(_null_is_a_name)
    ] = Field(default="sentencepiece", description="kind of tokenizer; null: token ids only")
    tokenizer_model: FilePath | None = Field(
        default=None, description="the tokenizer's file (sentencepiece) or folder (huggingface)"
    )
    packed_documents: bool = Field(
        default=False,
        description="attention, positions and SSM state start anew at each document, which ends "
        "with the end token or where the files' index says",
    )
    data_cache_path: FilePath | None = Field(
        default=None,
        description="folder of the indices of sample_order=megatron; null: run_dir/data_cache",
    )
    mock_data: bool = Field(default=False, description="train on made-up tokens")
    num_workers: Workers = Field(default=2, description="processes that read data, on each rank")
