"""The reference of the config as Markdown, made from the fields' own descriptions."""

from collections.abc import Iterable, Iterator
from typing import get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_hybrid.cli_text import default_of
from megatron_hybrid.config import RunConfig, megatron_fp8
from megatron_hybrid.config.describe import (
    allowed,
    fields,
    items_of,
    plain_type,
    section_of,
    sections,
)
from megatron_hybrid.config.flags import flags
from megatron_hybrid.objectives.registry import OBJECTIVES, find_objective

# Names of flags that Megatron-LM's parser has not.
_OURS = """
--run-dir --backend --preset --activation --attn-mask-type --layernorm-epsilon
--add-bias-linear --num-moe-experts --virtual-pipeline-model-parallel-size --overlap-p2p-comm
--align-param-gather --gradient-accumulation-fusion --apply-rope-fusion --bias-activation-fusion
--bias-dropout-fusion --recipe --emulate --layers --sources --phases --max-epochs --sample-order
--block-tokens --packed-documents --batch-size-schedule --train-tokens --hang-timeout-s
--eval-tasks --eval-tasks-include-path --eval-tasks-limit --eval-tasks-num-fewshot
--objective --objective-options --callbacks --nonfinite-action --loss-spike-factor
--loss-spike-action --lr-warmup-tokens --lr-decay-tokens --lr-wsd-decay-tokens
--restart-schedule --keep-last --load-optim --load-rng --router-std --router-noise
--reinit-fraction --scale-weights --from --tensorboard --float8-interval --expert-load-interval
--key-multiplier --ssm-multipliers --ssm-in-multiplier --ssm-out-multiplier
--attention-in-multiplier --attention-out-multiplier --mlp-multipliers --embedding-multiplier
--lm-head-multiplier --mamba-rms-norm --mamba-version --mamba-intermediate-size --mamba-dt-rank
--mamba-inner-layernorms --parallel-heads-join --num-meta-tokens --reuse-kv
--mamba-cp-comm-type --mlflow-experiment --mlflow-run-name --mlflow-tracking-uri
"""
# Of `--no-field-name`, those that it has.
_THEIR_NEGATIONS = """
--no-align-param-gather --no-gradient-accumulation-fusion --no-bias-dropout-fusion
--no-load-optim --no-load-rng
"""

_HEAD = """\
# Reference of the config

Made by `megatron-hybrid config --reference` from the descriptions in the code, which
`megatron-hybrid pretrain --help` prints too. How a config is written, changed and checked is in
[train.md](train.md#the-config).

Each field is set in YAML, as an override `section.field=value`, or by a flag of its own name,
`--field-name value` (`--field-name` and `--no-field-name` where it is true or false). Under
"Megatron-LM" are the flags of Megatron-LM that set it, where it has some.
"""


def reference() -> str:
    """Every field by section: what it may hold, its default, its flags and what it means."""
    parts = [_HEAD, "## The run", _table(_own_fields())]
    for name, section in sections().items():
        parts += [f"## {name}", _purpose(section)]
        parts.append(_table((f"{name}.{field}", field) for field in section.model_fields))
        for field, info in section.model_fields.items():
            parts += _inner(f"{name}.{field}", info)
    parts += _objectives()
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def megatron_flags_of(path: str) -> list[str]:
    """The flags of Megatron-LM that set a field: those of its own name first."""
    found = [name for name, flag in flags().items() if flag.path == path and is_megatrons(name)]
    if path == megatron_fp8.RECIPE:
        found.append(megatron_fp8.FORMAT)
    return found + [megatron_fp8.END_LAYERS] * (path in megatron_fp8.ENDS)


def is_megatrons(name: str) -> bool:
    """Whether a flag that is taken here is one of Megatron-LM's."""
    if name.startswith("--no-"):
        return name in _THEIR_NEGATIONS.split()
    return name not in _OURS.split()


def _own_fields() -> Iterator[tuple[str, str]]:
    return ((name, name) for name in RunConfig.model_fields if name not in sections())


def _purpose(section: type[BaseModel]) -> str:
    return _escaped(" ".join((section.__doc__ or "").split()))


def _table(named: Iterable[tuple[str, str]]) -> str:
    """Fields of the config, as pairs of the dotted name and what is shown of it."""
    rows = ["| field | must be | default | Megatron-LM | |", "|---|---|---|---|---|"]
    for path, shown in named:
        info = fields()[path]
        theirs = ", ".join(f"`{name}`" for name in megatron_flags_of(path))
        rows.append(_row(shown, info, theirs))
    return "\n".join(rows)


def _inner(path: str, info: FieldInfo) -> list[str]:
    """The table of a source's or a phase's fields, where a field holds such."""
    item = items_of(info)
    if item is None or (section := section_of(item)) is None:
        return []
    place = f"{path}[N]" if get_origin(plain_type(info)) is tuple else f"{path}.NAME"
    return [f"### {place}", _purpose(section), _plain_table(section)]


def _objectives() -> list[str]:
    """The options of each objective that has some."""
    parts = []
    for name in OBJECTIVES:
        if (options := find_objective(name).Options) is not None:
            parts += [f"### training.objective_options of {name}", _plain_table(options)]
    if parts:
        parts.insert(0, "## Options of objectives")
    return parts


def _plain_table(section: type[BaseModel]) -> str:
    """The table of a section that has no flags."""
    rows = ["| field | must be | default | |", "|---|---|---|---|"]
    rows += [_row(name, info) for name, info in section.model_fields.items()]
    return "\n".join(rows)


def _row(name: str, info: FieldInfo, *flags: str) -> str:
    default = "required" if info.is_required() else f"`{default_of(info)}`"
    cells = (
        f"`{name}`",
        _escaped(allowed(info)),
        default,
        *flags,
        _escaped(info.description or ""),
    )
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell too."""
    for character in "\\|*<":
        text = text.replace(character, f"\\{character}")
    return text
