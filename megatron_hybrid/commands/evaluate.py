"""`megatron-hybrid evaluate`: losses of a model on texts, token files, or its run's own data, and
what it makes of the tasks of lm-eval.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hybrid.bounds import MOST_COUNT, MOST_PROCESSES
from megatron_hybrid.commands.app import only_with
from megatron_hybrid.commands.generate import check_launcher, refuse_options, start_ranks
from megatron_hybrid.commands.options import ParseSpecialTokens, note_around_texts
from megatron_hybrid.log import unsaid
from megatron_hybrid.platform.threads import spin_before_sleeping

if TYPE_CHECKING:
    from megatron_hybrid.evaluation.run import Asked

# Of files, and of the run's own data.
_OF_LOSSES = ("inputs", "prefixes", "overlap")


@only_with("inputs", "json_key", "append_eod")
@only_with(
    "tasks", "include_path", "limit", "num_fewshot", "apply_chat_template", "system_instruction"
)
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="a run's folder, its checkpoints', or one of them")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="a text file or glob, as of `data tokenize`, of which each line is a document, or "
            "a .txt, which is one; may be repeated",
        ),
    ] = None,
    prefixes: Annotated[
        list[str] | None,
        typer.Option("--prefix", help="token files, by prefix or glob; may be repeated"),
    ] = None,
    json_key: Annotated[str, typer.Option(help="field, or column, of the text")] = "text",
    append_eod: Annotated[
        bool, typer.Option(help="end each text with the tokenizer's end token, which is counted")
    ] = True,
    parse_special_tokens: ParseSpecialTokens = False,
    overlap: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_COUNT,
            help="with --input or --prefix: tokens that a window has again from the one before it, "
            "as context alone",
        ),
    ] = 0,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_COUNT, help="windows, or texts of tasks, that a rank computes at once"
        ),
    ] = 8,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="instead of losses: tasks, groups and tags of lm-eval by name or pattern, and "
            "paths of a task's .yaml, with commas between them"
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(
            help="with --tasks: a folder of more of them, whose Python is run; may be repeated"
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_COUNT, help="with --tasks: only so many documents of each, its first"
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_COUNT,
            help="with --tasks: examples before each question, but where a task says 0",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="with --tasks: as messages, by the tokenizer's template"
        ),
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="with --tasks: a text before each prompt")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the record as JSON")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROCESSES, help="start this many ranks on this machine"),
    ] = None,
) -> None:
    """Loss and perplexity of a model, by source, or its answers to tasks.

    The losses are of files, or of what its run evaluates itself on.

    A document is read in windows of `data.seq_length` tokens, which do not overlap unless they are
    told to. Each of its tokens is counted once; the first, which nothing comes before, is not. Any
    layout gives the same: `parallel.context_parallel_size=2` and its like say how ranks divide
    model and sequences, and the rest of them divide what is evaluated. Tasks are those of lm-eval,
    by its own harness (pip install 'megatron-hybrid[eval]'); all ranks divide the model there.
    """
    refuse_options(context)
    names = _check_usage(context, tasks)
    check_launcher(nproc)
    from megatron_hybrid.checkpoint.files import find_checkpoint

    find_checkpoint(checkpoint)  # what is not there is said before torch is loaded
    spin_before_sleeping()
    if tasks is not None:
        from megatron_hybrid.commands.evaluate_tasks import evaluate_tasks
        from megatron_hybrid.evaluation.tasks import AskedTasks

        asked_tasks = AskedTasks(
            names, include_path or (), limit, num_fewshot, apply_chat_template,
            system_instruction, parse_special_tokens,
        )  # fmt: skip
        evaluate_tasks(
            checkpoint, asked_tasks, context.args, batch_size, nproc=nproc, as_json=as_json
        )
        return
    from megatron_hybrid.evaluation.run import Asked, open_evaluation

    asked = Asked(
        inputs or (), prefixes or (), json_key, append_eod, overlap, batch_size,
        parse_special_tokens,
    )  # fmt: skip
    if nproc is not None and nproc > 1:
        with unsaid():
            open_evaluation(checkpoint, asked, context.args, world_size=nproc)
        start_ranks(nproc)
    _evaluate(checkpoint, asked, context.args, as_json=as_json)


def _check_usage(context: typer.Context, tasks: str | None) -> list[str]:
    """What would be read, or not; gives the names of tasks."""
    names = [name for each in (tasks or "").split(",") if (name := each.strip())]
    if tasks is not None and not names:
        raise typer.BadParameter("it names none", param_hint="--tasks")
    given = {name for name, value in context.params.items() if value}
    files = given & {"inputs", "prefixes"}
    if tasks is not None and (losses := [name for name in _OF_LOSSES if name in given]):
        hints = {"inputs": "--input", "prefixes": "--prefix", "overlap": "--overlap"}
        raise typer.BadParameter("not with --tasks", param_hint=hints[losses[0]])
    if "overlap" in given and not files:
        raise typer.BadParameter("only with --input or --prefix", param_hint="--overlap")
    if "parse_special_tokens" in given and "inputs" not in given and tasks is None:
        raise typer.BadParameter(
            "only with --input or --tasks", param_hint="--parse-special-tokens"
        )
    return names


def _evaluate(checkpoint: Path, asked: "Asked", words: list[str], *, as_json: bool) -> None:
    from megatron_hybrid.evaluation.run import evaluate as run
    from megatron_hybrid.evaluation.run import open_evaluation
    from megatron_hybrid.training.distributed import is_rank_zero, launched_world_size

    ranks = launched_world_size()
    opened = open_evaluation(checkpoint, asked, words, world_size=ranks)
    if asked.inputs and is_rank_zero():
        note_around_texts(opened.tokenizer)
    with token_progress(opened.tokens, shown=is_rank_zero()) as told:
        record = run(opened, ranks=ranks, told=told)
    if is_rank_zero():
        report(record, opened.folder, None if as_json else _print_table)


def report(
    record: dict[str, Any], folder: Path, table: Callable[[Mapping[str, Any]], None] | None
) -> None:
    """Print a record, as JSON or by what prints its table, and keep it with its run.

    Args:
        folder: the checkpoint itself.
    """
    import orjson

    from megatron_hybrid.evaluation.run import keep, where_kept

    if table is None:
        print(orjson.dumps(record, option=orjson.OPT_INDENT_2).decode())
    else:
        table(record)
    print(where_kept(keep(record, folder)), file=sys.stderr)


@contextmanager
def token_progress(total: int | None, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Tokens that were read, how many a second, and where that is known the time left, on stderr.

    Args:
        total: tokens to be read; None: not known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    start, done = time.monotonic(), 0
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not shown, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("loading", total=total)

        def told(tokens: int) -> None:
            nonlocal done
            done += tokens
            speed = done / max(time.monotonic() - start, 1e-9)
            text = f"{done:,} tokens, {speed:,.0f} tokens/s"
            bar.update(task, completed=done, description=text)

        yield told


def _print_table(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{record['checkpoint']}, windows of {record['seq_length']} tokens")
    columns = ("loss", "perplexity", "tokens", "documents", "tokens_without_context")
    there = [each for each in columns if each in record["total"]]
    table.add_column("source", overflow="fold")
    for name in there:
        table.add_column(name.replace("_", " "), justify="right")
    rows = [*record["sources"].items()]
    for name, figures in [*rows, *([("total", record["total"])] if len(rows) > 1 else [])]:
        table.add_row(name, *(_shown(figures[each]) for each in there))
    console = Console(markup=False)  # of names of files
    console.width = max(console.width, 100)
    console.print(table)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
