"""What to do when the ranks of a job have ended: done, start again, or stop and say why."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launchers.errors import RankError

# A job whose ranks fail in the same step with the same error so often is not started again.
SAME_FAILURES = 3
# Reasons of a run to end that are not its end: the scheduler wants the nodes back.
INTERRUPTIONS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT", "signal to another rank",
                 "exit_duration_in_mins")  # fmt: skip
DONE, AGAIN, STOP = "done", "again", "stop"


@dataclass(frozen=True)
class Verdict:
    """Attributes: `action`, one of DONE, AGAIN and STOP; `text`, why."""

    action: str
    text: str


def failure(attempt: str, exit_code: int, error: RankError | None) -> dict[str, Any]:
    """The event of an attempt whose ranks failed, without time and kind."""
    return {
        "attempt": attempt,
        "exit_code": exit_code,
        "iteration": None if error is None else error.iteration,
        "rank": None if error is None else error.rank,
        "error": _unsaid(exit_code) if error is None else error.summary,
    }


def _unsaid(exit_code: int) -> str:
    how = f"signal {exit_code - 128}" if exit_code > 128 else f"exit code {exit_code}"
    return f"the ranks ended by {how} without a message"


def judge(events: Sequence[Mapping[str, Any]]) -> Verdict:
    """Decide by a run's events, of which the last tells how the ranks ended.

    A step that fails in the same way again and again fails for a reason that a restart does not
    mend; so does an error that a user has to mend. Anything else may be a node, or the weather.
    """
    last = events[-1] if events else {}
    if last.get("event") == "end":
        reason = str(last.get("reason"))
        action = AGAIN if reason in INTERRUPTIONS else DONE
        return Verdict(action, f"{reason} at step {last.get('iteration')}")
    if last.get("event") != "failure":
        return Verdict(AGAIN, "the ranks ended without a word")
    error, step = str(last.get("error")), last.get("iteration")
    where = "before the first step" if step is None else f"after step {step}"
    if error.startswith("error:"):
        return Verdict(STOP, f"{error} (a restart would not mend it)")
    times = _same_failures(events)
    if times >= SAME_FAILURES:
        return Verdict(STOP, f"{times} times in a row the ranks failed {where}: {error}")
    return Verdict(AGAIN, f"failed {where} ({times} of {SAME_FAILURES} times): {error}")


def _same_failures(events: Sequence[Mapping[str, Any]]) -> int:
    """How many of the last attempts failed in the same step with the same error."""
    last, times = _key(events[-1]), 0
    for event in reversed(events):
        if event["event"] in ("end", "stop") or (
            event["event"] == "failure" and _key(event) != last
        ):
            break
        times += event["event"] == "failure"
    return times


def _key(event: Mapping[str, Any]) -> tuple[object, str]:
    """Step and error; numbers in the error, such as ports and addresses, do not count."""
    return event.get("iteration"), re.sub(r"0x[0-9a-f]+|\d+", "#", str(event.get("error")))
