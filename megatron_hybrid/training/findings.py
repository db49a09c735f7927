"""What ranks saw of a step that was not finite, and what that says, over all starts of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Finding:
    """What one rank saw first that was not finite.

    Attributes:
        rank, host, device: whose it is; the device is None on a CPU.
        order: ranks hand wrong numbers on; the one with the least order had them first.
        what: the value, in words.
        again: whether it was so again when the step was run again.
    """

    rank: int
    host: str
    device: int | None
    order: tuple[int, int]
    what: str
    again: bool

    @property
    def place(self) -> tuple[str, int | None]:
        """The hardware."""
        return self.host, self.device

    @property
    def where(self) -> str:
        """The rank and its hardware, in words."""
        return f"rank {self.rank} ({_in_words(self.place)})"


class Diagnosis(NamedTuple):
    """Attributes: `text`, for people; `final`: starting again would not help or tell more."""

    text: str
    final: bool


def _in_words(place: tuple[str, int | None]) -> str:
    host, device = place
    return host if device is None else f"{host}, GPU {device}"


def _first(findings: Sequence[Finding]) -> list[Finding]:
    """Of all findings those of the ranks that had the wrong numbers first."""
    order = min(finding.order for finding in findings)
    return [finding for finding in findings if finding.order == order]


def diagnose(findings: Sequence[Finding], before: Sequence[Sequence[Finding]]) -> Diagnosis:
    """What the findings of a step say, together with those of earlier starts at the same step."""
    first = _first(findings)
    ranks = ", ".join(finding.where for finding in first)
    text = f"first not finite: {first[0].what}, on {ranks}. "
    if not all(finding.again for finding in first):
        return Diagnosis(text + "Run again in place, it was finite: a passing error there.", False)
    text += "It was so again when the step was run again in place. "
    for earlier in before:
        elsewhere = {
            old.place
            for old in _first(earlier)
            for new in first
            if old.again
            and old.rank == new.rank
            and old.what == new.what
            and old.place != new.place
        }
        if elsewhere:
            places = "; ".join(sorted(map(_in_words, elsewhere)))
            return Diagnosis(
                text + f"So it was on other hardware ({places}): it is the run's own doing.", True
            )
    return Diagnosis(
        text + "Whether that is the run's doing or the hardware's, a start on other nodes tells "
        "(sbatch --exclude).",
        False,
    )


def acquit(here: Mapping[int, tuple[str, int | None]], before: Sequence[Sequence[Finding]]) -> str:
    """What it says that the step was finite this time.

    Args:
        here: the hardware of each rank in this start.
        before: the findings of earlier starts at this step; they may be empty.
    """
    blamed = {
        _in_words(old.place)
        for earlier in before
        for old in (_first(earlier) if earlier else ())
        if old.again and here.get(old.rank) != old.place
    }
    if blamed:
        return (
            f"finite on other hardware. It was not, twice over, on {'; '.join(sorted(blamed))}: "
            "that computes wrongly"
        )
    return "finite this time: what it was not by in an earlier start has passed"


def unsound_steps(events: Sequence[Mapping[str, Any]]) -> dict[int, list[list[Finding]]]:
    """Steps that were not finite in earlier starts -> the findings of each such start.

    There are none in the first of them, which was not looking.

    Args:
        events: of the run, as `attempts.read_attempts` returns them.
    """
    steps: dict[int, list[list[Finding]]] = {}
    for event in events:
        if event["event"] == "unsound":
            found = [Finding(**each | {"order": tuple(each["order"])}) for each in event["found"]]
            steps.setdefault(event["iteration"], []).append(found)
    return steps
