"""What `verify` finds, as values, as JSON and as tables."""

import json
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Judgement:
    """How far the sides are from the arbiter at one place, in deviations, over all prompts.

    Attributes:
        sides: name of a side -> its distance.
        allowed: of each; at least what rounding to fp32 makes of this very model.
    """

    sides: dict[str, float]
    allowed: float

    @property
    def off(self) -> tuple[str, ...]:
        """Sides that are farther than rounding takes them; one that is no number is."""
        return tuple(name for name, distance in self.sides.items() if not distance <= self.allowed)


@dataclass(frozen=True)
class Row:
    """One place of the two models.

    Attributes:
        part: "layer 3", "logits", …; `kind` of layer(s).
        difference: largest absolute difference, over all prompts.
        relative: largest of a prompt's difference over its standard deviation there.
        allowed: of `relative`.
        judgement: the arbiter's; None where it was left out.
    """

    part: str
    kind: str
    difference: float
    relative: float
    allowed: float
    judgement: Judgement | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed, or is what rounding makes of this model.

        One that is no number is not.
        """
        if self.relative <= self.allowed:
            return True
        return self.judgement is not None and not self.judgement.off

    @property
    def verdict(self) -> str:
        """In a few words: "ok", "rounding", or "differs" and whose fault it is."""
        if self.passed:
            return "ok" if self.relative <= self.allowed else "rounding"
        if self.judgement is None:
            return "differs"
        return f"{' and '.join(self.judgement.off)} off"


@dataclass(frozen=True)
class Text:
    """One continuation.

    Attributes:
        verdict: "same"; "tie", where the two likeliest tokens, or two experts before them, are
            closer than the tolerance; "different".
        differs_at: number of the first token that differs.
    """

    prompt: str
    prompt_tokens: int
    ours: str
    theirs: str
    verdict: str
    differs_at: int | None = None


@dataclass
class Report:
    """What `verify` found."""

    checkpoint: str
    export: str
    transformers: str
    rows: list[Row] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    arbiter_left_out: str | None = None

    @property
    def first_difference(self) -> str | None:
        """The first place that differs, in the order in which a model computes."""
        return next((f"{row.part} ({row.kind})" for row in self.rows if not row.passed), None)

    @property
    def blame(self) -> str | None:
        """Which side is off where the first difference is, and how far each is from the arbiter."""
        row = next((row for row in self.rows if not row.passed), None)
        if row is None or row.judgement is None:
            return None
        distances = ", ".join(f"{name} {far:.1e}" for name, far in row.judgement.sides.items())
        return f"{row.verdict} (deviations from float64: {distances})"

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        texts = all(text.verdict != "different" for text in self.texts)
        return self.first_difference is None and texts and not self.problems

    def to_json(self) -> str:
        """Everything, as text."""
        outcome = {"passed": self.passed, "first_difference": self.first_difference,
                   "blame": self.blame}  # fmt: skip
        rows = [asdict(row) | {"passed": row.passed, "verdict": row.verdict} for row in self.rows]
        return json.dumps(outcome | asdict(self) | {"rows": rows}, indent=1)


def print_report(report: Report, console: Console) -> None:
    """Tables of places and of texts, and the outcome in a line."""
    table = Table("where", "kind", title=f"transformers {report.transformers}, fp32 arithmetic")
    for title in ("largest difference", "of the deviation", "allowed", ""):
        table.add_column(title, justify="right")
    for row in report.rows:
        mark = f"[{'green' if row.passed else 'red'}]{row.verdict}[/]"
        table.add_row(
            row.part, row.kind, f"{row.difference:.2e}", f"{row.relative:.2e}",
            f"{row.allowed:.1e}", mark, end_section=row.part == "logits",
        )  # fmt: skip
    console.print(table)
    if report.arbiter_left_out is not None:
        left_out = f"without the arbiter: {report.arbiter_left_out}"
        console.print(left_out, highlight=False, markup=False)
    texts = Table("prompt", "tokens", "greedy continuation", "")
    for text in report.texts:
        both = text.ours if text.verdict == "same" else f"{text.ours}\n{text.theirs}"
        where = "" if text.differs_at is None else f" at token {text.differs_at}"
        texts.add_row(
            escape(text.prompt), str(text.prompt_tokens), escape(both), f"{text.verdict}{where}"
        )
    console.print(texts)
    for problem in report.problems:
        console.print(f"[red]{escape(problem)}[/]", highlight=False)
    if report.passed:
        console.print("[green]the same[/]")
    else:
        first = f": first {report.first_difference}" if report.first_difference else ""
        blame = f"; {report.blame}" if report.blame else ""
        console.print(f"[red]different[/]{first}{blame}")
