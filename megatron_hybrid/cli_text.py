"""What the command line prints: the help of `pretrain`, made from the fields, and the counts."""

from typing import get_origin

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_hybrid.config import RunConfig, presets
from megatron_hybrid.config.describe import (
    allowed,
    fields,
    items_of,
    plain_type,
    section_of,
)
from megatron_hybrid.config.flags import flags
from megatron_hybrid.config.layers import are_unlike, layers, numbers_text, shown_size
from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.model.counts import count_parameters, flops_per_token

_USAGE = """\
[bold]megatron-hybrid pretrain[/] PRESET | FILE.yaml  \\[section.field=value | --flag value]...

  PRESET, FILE.yaml   what the run starts from; a file may itself say `preset: tiny`
  section.field=value sets a field; the value is YAML, and wins over the file
  --flag value        the same, by Megatron-LM's name of the field
  --load DIR          without PRESET or FILE: goes on with the config that the checkpoint holds
  --nproc N           start N ranks on this machine; without it this process is one rank, or the
                      one that torchrun or the like made it
  --dry-run           print the resolved config and exit
  --help              show this text

[bold]Examples[/]
  megatron-hybrid pretrain tiny --data-path data/text --tokenizer-model data/tokenizer.model
  megatron-hybrid pretrain run.yaml parallel.tensor_model_parallel_size=2 --sequence-parallel \
--nproc 2
  megatron-hybrid pretrain nemotron_h_8b --data-path 0.3 code 0.7 web --dry-run
  megatron-hybrid pretrain phases.yaml data.sources.web.max_epochs=2 \
data.phases\\[1].weights.web=0.5
  megatron-hybrid pretrain --load runs/default/checkpoints --train-iters 2000
"""


def print_pretrain_help(console: Console) -> None:
    """Forms, examples, presets, and every flag by section."""
    console.soft_wrap = True
    console.print(_USAGE, highlight=False)
    console.print(f"[bold]Presets[/]  {', '.join(presets())}\n", highlight=False)
    by_path: dict[str, list[str]] = {}
    for flag in flags().values():
        by_path.setdefault(flag.path, []).append(flag.name)
    section = None
    for path, info in fields().items():
        name = path.rpartition(".")[0] or "run"
        if name != section:
            section = name
            console.print(f"[bold]{section}[/]")
        default = "required" if info.is_required() else f"default {default_of(info)}"
        kind = "" if plain_type(info) is bool else f"  {allowed(info)}"
        console.print(f"  {', '.join(by_path[path])}{escape(kind)}", highlight=False)
        console.print(f"      {escape(f'{info.description} ({default})')}", highlight=False)
        _print_inner_fields(path, info, console)


def _print_inner_fields(path: str, info: FieldInfo, console: Console) -> None:
    """The fields of a source or a phase, as overrides and YAML reach them."""
    item = items_of(info)
    if item is None or (section := section_of(item)) is None:
        return
    place = f"{path}[N]" if get_origin(plain_type(info)) is tuple else f"{path}.NAME"
    for name, field in section.model_fields.items():
        line = f"{place}.{name}=...  {allowed(field)}: {field.description}"
        console.print(f"        {escape(line)}", highlight=False)


def default_of(info: FieldInfo) -> str:
    """A field's default as YAML would say it."""
    value = info.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict) and not value:
        return "{}" if isinstance(value, dict) else "[]"
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def unlike_layers_text(config: RunConfig) -> str:
    """The sizes of every layer, a line each, as comments of YAML; nothing where all are alike."""
    if not are_unlike(config.model):
        return ""
    lines = ["# layers, as resolved:"]
    for layer in layers(config.model):
        sizes = ", ".join(f"{name}={shown_size(value)}" for name, value in layer.sizes.items())
        lines.append(f"# {layer.number:>4} {layer.kind} {sizes}")
    return "\n".join([*lines, ""])


def print_counts(config: RunConfig, console: Console) -> None:
    """Parameters and training FLOPs of a config's model, by kind of layer."""
    model, seq_length = config.model, max(sequence_lengths(config))
    found, flops = count_parameters(model), flops_per_token(model, seq_length)
    table = Table("part")
    for title in ("layers", "parameters each", "parameters", "MFLOPs a token"):
        table.add_column(title, justify="right")
    for sort, (kind, cost) in zip(found.sorts, flops.by_sort, strict=True):
        count, name = len(sort.numbers), f"{sort.what} ({kind})"
        if kind not in found.per_layer:
            name += f" {numbers_text(sort.numbers)}"
        table.add_row(
            name, f"{count:,}", f"{sort.each:,}", f"{sort.each * count:,}", f"{cost / 1e6:,.1f}"
        )
    table.add_row(
        "embeddings, output", "", "", f"{found.embedding:,}", f"{flops.logits / 1e6:,.1f}"
    )
    if found.prediction:
        table.add_row(
            "multi-token prediction", f"{model.mtp_num_layers}",
            f"{found.prediction // (model.mtp_num_layers or 1):,}", f"{found.prediction:,}",
            f"{flops.prediction / 1e6:,.1f}",
        )  # fmt: skip
    table.add_row("final norm", "", "", f"{found.final_norm:,}", "")
    table.add_section()
    total = f"{flops.total / 1e6:,.1f}"
    table.add_row(
        "[bold]total[/]", f"{sum(found.layers.values()):,}", "", f"[bold]{found.total:,}[/]", total
    )
    if found.active != found.total:
        table.add_row("active for a token", "", "", f"{found.active:,}", "")
    console.print(table)
    console.print(
        f"FLOPs: training, forward and backward, at {seq_length:,} tokens a sequence; "
        "recomputation not counted.",
        highlight=False,
    )
