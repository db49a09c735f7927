"""What a pruning would do, in numbers, before it does anything."""

from rich.console import Console
from rich.table import Table

from megatron_hybrid.checkpoint.derived import BLOCK_BYTES
from megatron_hybrid.checkpoint.progress import ahead
from megatron_hybrid.compression.write import Pruning
from megatron_hybrid.config.layers import layers, numbers_text
from megatron_hybrid.model.counts import count_parameters

_GIB = 2**30


def print_report(pruning: Pruning, console: Console) -> None:
    """Layers, sizes, both models beside each other, and what the run has before it."""
    parent, config = pruning.parent.model, pruning.config.model
    stay = {each.parent.number for each in pruning.kept}
    gone = tuple(each.number for each in layers(parent) if each.number not in stay)
    lines = {
        "pattern": f"{parent.hybrid_layer_pattern} -> {config.hybrid_layer_pattern}",
        "dropped": numbers_text(gone) if gone else "no layer",
        "training": ahead(pruning.config, pruning.progress),
    }
    for name, text in lines.items():
        console.print(f"{name:8}  {text}", highlight=False, markup=False, soft_wrap=True)
    sizes = Table("size", "layers", "parent", "pruned")
    if config.hidden_size != parent.hidden_size:
        sizes.add_row("hidden_size", "all", str(parent.hidden_size), str(config.hidden_size))
    for (name, before, after), numbers in _changes(pruning).items():
        sizes.add_row(name, numbers_text(tuple(numbers)), str(before), str(after))
    if sizes.row_count:
        console.print(sizes)
    table = Table("model")
    for title in ("layers", "parameters", "active a token"):
        table.add_column(title, justify="right")
    for name, model in (("parent", parent), ("pruned", config)):
        counts = count_parameters(model)
        row = (str(len(layers(model))), f"{counts.total:,}", f"{counts.active:,}")
        table.add_row(name, *row)
    console.print(table)
    console.print(
        f"to write: {pruning.nbytes / _GIB:.2f} GiB; in memory beside Python and torch: blocks of "
        f"{BLOCK_BYTES >> 20} MiB a thread",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _changes(pruning: Pruning) -> dict[tuple[str, int, int], list[int]]:
    """Numbers of the parent's layers by size, what it was and what it is."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for each in pruning.kept:
        for name, value in each.sizes.items():
            before = getattr(each.parent.model, name)
            if before != value:
                found.setdefault((name, before, value), []).append(each.parent.number)
    return found
