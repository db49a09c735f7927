"""Prints a plan: its phases, what each takes of every source, and every source over the run."""

from collections.abc import Sequence
from itertools import compress

from rich.console import Console
from rich.text import Text

from megatron_hybrid.data.plan_report import PhaseReport, PlanReport, SourceReport
from megatron_hybrid.data.run_plan import MANY_EPOCHS
from megatron_hybrid.human import human_count

Row = list[Text | str]


def print_plan(report: PlanReport, console: Console) -> None:
    """The totals and three tables; epochs above a cap are red, many without a cap yellow."""
    sources = {source.name: source for source in report.sources}
    steps = "steps to go" if report.consumed_samples else "steps"
    rows = [row for phase in report.phases for row in _blend(phase, sources)]
    text = Text("\n").join(
        [
            _summary(report),
            _table(
                "phases",
                1,
                (*_PHASE_COLUMNS, steps),
                [_phase(phase, report) for phase in report.phases],
            ),
            _table("blends", 2, _BLEND_COLUMNS, rows),
            _table(
                "sources over the whole run",
                1,
                _SOURCE_COLUMNS,
                [_source(source, report) for source in report.sources],
            ),
        ]
    )
    console.print(text, soft_wrap=True)


def _summary(report: PlanReport) -> Text:
    text = Text()
    if report.consumed_samples:
        text.append("goes on", "bold").append(
            f" after {_tokens(report.consumed_tokens)} tokens in {report.consumed_samples:,} "
            f"samples; {report.steps:,} steps to go\n"
        )
    text.append(f"{_tokens(report.tokens)} tokens", "bold")
    text.append(f" in {report.samples:,} samples")
    if not report.consumed_samples:
        text.append(f" and {report.steps:,} steps")
    if skipped := sum(source.skipped_tokens for source in report.sources):
        text.append(f"; {_tokens(skipped)} tokens passed over where the sequence length changes")
    return text.append("\n")


def _table(title: str, text_columns: int, head: Sequence[str], rows: Sequence[Row]) -> Text:
    """Columns as wide as what they hold, the first ones to the left, numbers to the right; columns
    that hold nothing are left out. rich's own tables take a second for the rows of 200 sources.
    """
    used = [any(map(len, column)) for column in zip(*rows, strict=True)]
    names: Row = [Text(name, "dim") for name in head]
    lines = [list(compress(row, used)) for row in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = Text.assemble((f"{title}\n", "bold"))
    for row in lines:
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - len(cell))
            table.append("  " if place else " ")
            table.append_text(Text(space) if place >= text_columns else Text())
            table.append_text(cell if isinstance(cell, Text) else Text(cell))
            table.append_text(Text(space) if place < text_columns else Text())
        table.append("\n")
    return table


_PHASE_COLUMNS = ("phase", "from", "to", "share", "sequence", "batch", "samples")


def _phase(phase: PhaseReport, report: PlanReport) -> Row:
    return [
        phase.name,
        _tokens(phase.start_tokens),
        _tokens(phase.end_tokens),
        f"{(phase.end_tokens - phase.start_tokens) / report.tokens:.2%}",
        f"{phase.seq_length:,}",
        " → ".join(f"{size:,}" for size in phase.batch_sizes),
        f"{phase.end_sample - phase.first_sample:,}",
        f"{phase.steps:,}",
    ]


_BLEND_COLUMNS = ("phase", "source", "weight", "samples", "tokens", "epochs so far")


def _blend(phase: PhaseReport, sources: dict[str, SourceReport]) -> list[Row]:
    return [
        [
            "" if number else phase.name,
            use.name,
            f"{phase.weights[use.name]:.2%}",
            f"{use.samples:,}",
            _tokens(use.tokens),
            _epochs(use.epochs, sources[use.name].max_epochs),
        ]
        for number, use in enumerate(phase.sources)
    ]


_SOURCE_COLUMNS = (
    *("source", "tokens", "held out", "left out", "an epoch", "consumed", "in the run", "share"),
    *("passed over", "epochs", "cap"),
)


def _source(source: SourceReport, report: PlanReport) -> Row:
    return [
        source.name,
        _tokens(source.tokens),
        _tokens(source.held_out),
        _tokens(source.left_out),
        _tokens(source.epoch_tokens),
        _tokens(source.consumed_tokens) if report.consumed_samples else "",
        _tokens(source.read_tokens),
        f"{source.read_tokens / report.tokens:.2%}",
        _tokens(source.skipped_tokens),
        _epochs(source.epochs, source.max_epochs),
        "" if source.max_epochs is None else f"{source.max_epochs:g}",
    ]


def _tokens(tokens: int) -> str:
    return human_count(tokens, decimals=2)


def _epochs(epochs: float, cap: float | None) -> Text:
    """Above a cap with a mark too, for where there are no colours."""
    if cap is not None and epochs > cap:
        return Text(f"{epochs:.2f} > {cap:g}", "bold red")
    return Text(f"{epochs:.2f}", "yellow" if cap is None and epochs > MANY_EPOCHS else "")
