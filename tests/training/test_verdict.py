"""What is made of how the ranks of a job ended: done, again, or stop."""

from pathlib import Path
from typing import Any

import pytest

from launchers.errors import RankError
from megatron_hybrid.training.attempts import append, read_attempts
from megatron_hybrid.training.verdict import AGAIN, DONE, STOP, failure, judge

TRAINING = {"event": "training", "iteration": 0}
CLOSED = "Traceback (most recent call last):\n  ...\nRuntimeError: closed by 10.0.0.7:3741"


def failed(text: str | None = CLOSED, iteration: int | None = 7, code: int = 1) -> dict[str, Any]:
    error = None if text is None else RankError(1.0, 3, "node2", iteration, text)
    return {"event": "failure"} | failure("17.0.0", code, error)


@pytest.mark.parametrize(
    ("reason", "action"),
    [("finished", DONE), ("exit_interval", DONE), ("SIGUSR1", AGAIN), ("SIGTERM", AGAIN),
     ("signal to another rank", AGAIN), ("exit_duration_in_mins", AGAIN)],
)  # fmt: skip
def test_ranks_that_saved(reason: str, action: str) -> None:
    """Asked to end by the scheduler it goes on later; at its end it is done."""
    assert judge([TRAINING, {"event": "end", "iteration": 9, "reason": reason}]).action == action


def test_the_same_failure_three_times_stops() -> None:
    """In the same step with the same error, whatever the ports; starts in between do not count."""
    other = failed(CLOSED.replace("10.0.0.7:3741", "10.0.0.9:12"))
    assert judge([failed()]).action == AGAIN
    assert judge([failed(), TRAINING, other]).action == AGAIN
    found = judge([failed(), TRAINING, other, TRAINING, failed()])
    assert found.action == STOP
    assert "3 times in a row the ranks failed after step 7: RuntimeError: closed" in found.text


@pytest.mark.parametrize(
    "between",
    [failed(iteration=8), failed("Traceback ...\nValueError: other"), failed(None, code=137),
     {"event": "end", "iteration": 7, "reason": "SIGUSR1"}],
)  # fmt: skip
def test_other_failures_do_not_count(between: dict[str, Any]) -> None:
    """Progress, another error or an orderly end between two failures: no loop."""
    assert judge([failed(), between, failed()]).action == AGAIN
    assert judge([failed(), failed(), between, failed()]).action == AGAIN


def test_killed_without_a_word() -> None:
    """A killed rank leaves no error; three times so is a loop as well."""
    killed = failed(None, code=137)
    assert judge([killed]).text.endswith("the ranks ended by signal 9 without a message")
    assert judge([killed, killed, killed]).action == STOP


def test_what_a_user_must_mend_is_not_tried_again() -> None:
    """A wrong config stays wrong; an unsound step may have been a GPU's doing."""
    assert judge([failed("error: data.seq_length=3 must be", None)]).action == STOP
    unsound = failed("unsound: step 7: loss=nan")
    assert judge([unsound]).action == AGAIN
    assert judge([unsound, unsound, unsound]).action == STOP


def test_the_log_survives_a_torn_line(tmp_path: Path) -> None:
    """A writer killed in the middle of a line costs that line and none after it."""
    path = tmp_path / "attempts.jsonl"
    append(path, {"event": "start"})
    with path.open("ab") as file:
        file.write(b'{"event": "tr')
    append(path, {"event": "end", "reason": "finished", "iteration": 1})
    assert [event["event"] for event in read_attempts(tmp_path)] == ["start", "end"]
