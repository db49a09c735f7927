"""What is in a checkpoint, or how two of them differ: distributed, or in Hugging Face's format.

python tools/inspect_checkpoint.py runs/quickstart
python tools/inspect_checkpoint.py models/exported --tensors
python tools/inspect_checkpoint.py runs/a/checkpoints/iter_0000100 runs/b --values

With two, it ends with 0 if their tensors are the same and with 1 if not, as `diff` does.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from checkpoints_converter.inspection import (
    DISTRIBUTED,
    Contents,
    Opened,
    Stored,
    config_differences,
    open_any,
    tensor_differences,
)
from megatron_hybrid.config.pattern import KINDS
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import refusals_told
from megatron_hybrid.json_text import parse_json

FILE_WIDTH = 160  # of tables that go to a file or a pipe
# What nothing reads of one checkpoint, and of two.
UNREAD = {1: ("values",), 2: ("tensors", "json")}


def dtype_name(stored: Stored) -> str:
    """`bfloat16`, as torch calls it."""
    return str(stored.dtype).removeprefix("torch.")


def as_json(contents: Contents) -> dict[str, Any]:
    """Everything that is printed, and the config, as plain values."""
    plan = contents.plan
    return {
        "kind": contents.kind,
        "folder": str(contents.folder),
        "pattern": contents.pattern,
        "parts": {name: asdict(part) for name, part in contents.parts.items()},
        "layout": contents.layout,
        "progress": contents.progress,
        "plan": plan and parse_json(plan.to_json()),
        "config": contents.config,
        "tensors": {
            name: {"shape": list(stored.shape), "dtype": dtype_name(stored)}
            for name, stored in (contents.tensors | contents.optimizer).items()
        },
    }


def print_contents(contents: Contents, console: Console) -> None:
    """Kind, pattern, origin, progress and sizes."""
    console.print(Text(contents.kind, "bold"), contents.folder, highlight=False)
    console.print(f"pattern   {contents.pattern or 'no layers'}", highlight=False)
    if contents.kind == DISTRIBUTED:
        layout = contents.layout
        if layout is None:
            saved_by = "not recorded"
        else:
            sizes = " x ".join(f"{name}{size}" for name, size in layout.items())
            saved_by = sizes or "no model parallelism"
        console.print(f"saved by  {saved_by}", highlight=False)
        counts = ", ".join(f"{count:,} {name}" for name, count in contents.progress.items())
        console.print(f"progress  {counts or 'not recorded'}", highlight=False)
    else:
        named = (contents.config.get(name) for name in ("model_type", "dtype", "torch_dtype"))
        console.print(f"model     {', '.join(str(v) for v in named if v)}", highlight=False)
    print_parts(contents, console)
    print_plan(contents, console)


def print_parts(contents: Contents, console: Console) -> None:
    """A row for each kind of layer, what is outside the layers, and the optimizer's state."""
    table = Table("part")
    for title in ("layers", "tensors", "parameters", "MB"):
        table.add_column(title, justify="right")
    parts = contents.parts
    for name, part in parts.items():
        label = f"{KINDS[name]} ({name})" if name in KINDS else name
        layers = f"{part.layers:,}" if part.layers else ""
        table.add_row(
            label, layers, f"{part.tensors:,}", f"{part.parameters:,}", f"{part.bytes / 1e6:,.1f}"
        )
    table.add_section()
    table.add_row(
        Text("model", "bold"),
        f"{sum(part.layers for part in parts.values()):,}",
        f"{len(contents.tensors):,}",
        Text(f"{sum(part.parameters for part in parts.values()):,}", "bold"),
        f"{sum(part.bytes for part in parts.values()) / 1e6:,.1f}",
    )
    if contents.optimizer:
        states = contents.optimizer.values()
        size = sum(stored.elements * stored.dtype.itemsize for stored in states)
        numbers = sum(stored.elements for stored in states)
        table.add_row(
            "optimizer's state", "", f"{len(states):,}", f"{numbers:,}", f"{size / 1e6:,.1f}"
        )
    console.print(table)


def print_plan(contents: Contents, console: Console) -> None:
    """What the run has read of each source, of a run with a data plan."""
    if contents.plan is None:
        return
    plan, consumed = contents.plan.plan, contents.plan.consumed_samples
    table = Table("source", title=f"Data: {consumed:,} of {plan.samples:,} samples read")
    for title in ("samples", "tokens", "epochs"):
        table.add_column(title, justify="right")
    for use in plan.consumed(consumed):
        table.add_row(use.name, f"{use.samples:,}", f"{use.tokens:,}", f"{use.epochs:.2f}")
    console.print(table)
    phases = ", ".join(f"{phase.name} from {phase.start_tokens:,}" for phase in plan.phases)
    console.print(f"phases (tokens): {phases}", highlight=False)


def print_tensors(contents: Contents, optimizer: bool, console: Console) -> None:
    """Name, shape and dtype of every tensor."""
    table = Table(Column("tensor", overflow="fold"), "shape", "dtype")
    for name, stored in (contents.tensors | (contents.optimizer if optimizer else {})).items():
        table.add_row(name, str(list(stored.shape)), dtype_name(stored))
    console.print(table)


def print_differences(
    one: Opened, other: Opened, arguments: argparse.Namespace, console: Console
) -> bool:
    """Both tables of differences; whether the tensors differ."""
    names = Column("tensor", overflow="fold")
    table = Table(names, "differs in", "first, second", title="Tensors")
    for it in tensor_differences(
        one, other, values=arguments.values, optimizer=arguments.optimizer
    ):
        what = "values, at most" if it.what == "values" else it.what
        table.add_row(it.name, what, it.detail)
    if table.row_count:
        console.print(table)
    else:
        compared = "and values " if arguments.values else ""
        console.print(f"tensors: the same names, shapes, dtypes {compared}in both")
    fields = config_differences(one.contents, other.contents)
    if fields:
        columns = [Column(title, overflow="fold") for title in ("field", "first", "second")]
        config = Table(*columns, title="Config")
        for name, values in fields.items():
            config.add_row(name, *(str(value) for value in values))
        console.print(config)
    return table.row_count > 0


def main() -> int:
    """Parse the command line, print, say by the exit status whether two differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="+", type=Path,
        help="a run's folder, a checkpoint of it, or a Hugging Face folder; two are compared",
    )  # fmt: skip
    parser.add_argument("--tensors", action="store_true", help="list every tensor of the model")
    parser.add_argument("--optimizer", action="store_true", help="and of the optimizer's state")
    parser.add_argument("--values", action="store_true", help="compare the values of two as well")
    parser.add_argument("--json", action="store_true", help="print everything of one as JSON")
    arguments = parser.parse_args()
    if len(arguments.checkpoint) > 2:
        parser.error("give one checkpoint, or two to compare")
    for number, names in UNREAD.items():
        for name in names:
            if len(arguments.checkpoint) == number and getattr(arguments, name):
                parser.error(f"--{name} is for {3 - number} checkpoint{'s'[: 2 - number]}")
    if arguments.json and (arguments.tensors or arguments.optimizer):
        parser.error("--json has all tensors, the optimizer's too: no --tensors, no --optimizer")
    # Names of folders, sources and tensors are shown as they are, whatever brackets they hold.
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, markup=False)
    try:
        with refusals_told():
            opened = [open_any(path) for path in arguments.checkpoint]
            if len(opened) == 2:
                return int(print_differences(opened[0], opened[1], arguments, console))
            contents = opened[0].contents
            if arguments.json:
                print(json.dumps(as_json(contents), indent=1, default=str))
                return 0
            print_contents(contents, console)
            if arguments.tensors or arguments.optimizer:
                print_tensors(contents, arguments.optimizer, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
