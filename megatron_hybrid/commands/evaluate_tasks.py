"""`megatron-hybrid evaluate --tasks`: how far it is, and what came of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.commands.evaluate import report
from megatron_hybrid.commands.generate import start_ranks
from megatron_hybrid.commands.options import note_around_texts

if TYPE_CHECKING:
    from megatron_hybrid.evaluation.tasks import AskedTasks


def evaluate_tasks(
    checkpoint: Path,
    asked: "AskedTasks",
    words: Sequence[str],
    batch_size: int,
    *,
    nproc: int | None,
    as_json: bool,
) -> None:
    """Ask a checkpoint's model, on so many ranks, and print the record or a table of it."""
    from megatron_hybrid.evaluation.task_run import evaluate_tasks as run
    from megatron_hybrid.evaluation.task_run import open_model
    from megatron_hybrid.evaluation.tasks import Tasks
    from megatron_hybrid.training.distributed import is_rank_zero, launched_world_size

    if nproc is not None and nproc > 1:
        open_model(checkpoint, asked, words, world_size=nproc)
        start_ranks(nproc)
    ranks = launched_world_size()
    opened = open_model(checkpoint, asked, words, world_size=ranks)
    tasks = Tasks(asked) if is_rank_zero() else None
    if tasks is not None:
        tasks.check(opened.tokenizer, opened.max_length)
        note_around_texts(opened.tokenizer)
    with _progress(shown=tasks is not None) as told:
        record = run(opened, tasks, batch_size, ranks=ranks, told=told)
    if record is not None:
        report(record, opened.folder, None if as_json else _print_table)


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """On stderr: requests of each kind that are done, and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not shown, transient=True,
    ) as bar:  # fmt: skip
        bars: dict[tuple[str, int], Any] = {}

        def told(kind: str, done: int, total: int) -> None:
            # A kind is asked for more than once where tasks need windows of texts.
            task = bars.get((kind, total))
            if task is None:
                task = bars[kind, total] = bar.add_task(kind, total=total)
            bar.update(task, completed=done)

        yield told


def _print_table(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{record['checkpoint']}, texts of at most {record['max_length']} tokens"
    table = Table(title=title)
    table.add_column("task", overflow="fold")
    for name in ("metric", "value", "stderr", "few-shot", "samples"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, task in {**record["tasks"], **record["groups"]}.items():
        figures = task["metrics"]
        for metric, value in figures.items():
            if "_stderr" in metric:
                continue
            base, comma, rest = metric.partition(",")
            error = figures.get(f"{base}_stderr{comma}{rest}")
            counts = (task.get("num_fewshot"), task.get("samples"))
            cells = [name, metric, _shown(value), _shown(error), *map(_shown, counts)]
            table.add_row(*cells)
    console = Console(markup=False)
    console.width = max(console.width, 100)
    console.print(table)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
