"""Where the time of a run went, from its files."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.commands.status import status
from megatron_hybrid.errors import UserError
from megatron_hybrid.training.attempts import AttemptLog, append, read_attempts
from megatron_hybrid.training.plot_time import draw_run_time
from megatron_hybrid.training.run_time import read_jobs, run_time


def write(run_dir: Path, *events: dict[str, Any], sign: float | None = None) -> None:
    append(run_dir / "jobs.jsonl", {"job": "1", "time": 100.0, "folder": ""})
    for event in events:
        append(run_dir / "attempts.jsonl", {"attempt": "a"} | event)
    if sign is not None:
        path = run_dir / "metrics.jsonl"
        path.write_text(json.dumps({"kind": "train", "iteration": 1, "step_ms": 1.0}) + "\n")
        os.utime(path, (sign, sign))


def start(launched: float, training: float, **more: Any) -> list[dict[str, Any]]:
    return [
        {"event": "start", "time": launched + 2, "launched": launched},
        {"event": "training", "time": training, "iteration": 0, "rewound_steps": 0,
         "active_until": None} | more,
    ]  # fmt: skip


def seconds(run_dir: Path, now: float) -> dict[str, float]:
    found = run_time(run_dir, now)
    for before, after in zip(found.spans, found.spans[1:], strict=False):
        assert before.end == pytest.approx(after.start)
    return {cause: round(found.seconds(cause), 3) for cause in {s.cause for s in found.spans}}


def test_a_run_that_was_interrupted_and_failed(tmp_path: Path) -> None:
    """Each second from the submission to the end is counted once, under its cause."""
    write(
        tmp_path,
        *start(110, 120),
        {"event": "checkpoint", "time": 150, "iteration": 10, "stall_s": 3},
        {"event": "end", "time": 150.5, "iteration": 10, "reason": "SIGUSR1"},
        # Its last metrics were written before that.
        *start(160, 165, iteration=10, active_until=146.0),
        {"event": "checkpoint", "time": 188, "iteration": 12, "stall_s": 2},
        # Its last step ends at 200; 20 s pass until that is noticed.
        {"event": "failure", "time": 220, "iteration": 15, "error": "x", "exit_code": 1},
        *start(230, 236, iteration=12, rewound_steps=3, active_until=200.0),
        {"event": "end", "time": 300, "iteration": 20, "reason": "finished"},
    )
    assert seconds(tmp_path, 1000) == {
        "queue": 10 + 9.5 + 10, "start-up": 10 + 5 + 6, "training": 27.5 + 21 + 64,
        "checkpoint": 3 + 2, "rewound": 12, "down": 20,
    }  # fmt: skip
    found = run_time(tmp_path, 1000)
    assert (found.attempts, found.failures, found.ended) == (3, 1, "finished")
    assert found.goodput == pytest.approx(112.5 / 200)
    draw_run_time(tmp_path, tmp_path / "time.png")
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


def test_cut_off_without_a_word(tmp_path: Path) -> None:
    """A lost node writes no end: the next start that trains knows its last sign of life, whatever
    of its steps were recorded."""
    write(
        tmp_path, *start(110, 120),
        {"event": "checkpoint", "time": 170, "iteration": 10, "stall_s": 0},
        {"event": "start", "time": 202, "launched": 200},  # which did not come so far
        *start(300, 305, iteration=10, rewound_steps=0, active_until=180.0),
        {"event": "end", "time": 400, "iteration": 20, "reason": "finished"},
    )  # fmt: skip
    assert seconds(tmp_path, 1000) == {
        "queue": 10 + 20 + 100, "start-up": 10 + 5, "training": 50 + 95, "rewound": 10,
    }  # fmt: skip


def test_steps_that_are_done_again_twice(tmp_path: Path) -> None:
    """From a checkpoint of two starts ago: the time since then is lost in both."""
    write(
        tmp_path, *start(110, 120),
        {"event": "checkpoint", "time": 130, "iteration": 10, "stall_s": 1},
        {"event": "checkpoint", "time": 140, "iteration": 20, "stall_s": 1},
        {"event": "end", "time": 140, "iteration": 20, "reason": "SIGTERM"},
        *start(140, 150, iteration=20), *start(180, 190, iteration=10, active_until=175.0),
        {"event": "end", "time": 200, "iteration": 20, "reason": "finished"},
    )  # fmt: skip
    assert seconds(tmp_path, 1000) == {
        "queue": 10 + 5, "start-up": 10 + 10 + 10, "training": 9 + 10, "checkpoint": 1,
        "rewound": 10 + 25,
    }  # fmt: skip


def test_the_folder_of_a_copied_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Starts and jobs of the run that it was copied from are not its own; of a moved one, they
    are."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    log = AttemptLog(run)
    append(run / "jobs.jsonl", {"job": "1", "time": 1.8e9, "run_dir": str(run)})
    log.start(1)
    log.training(0, 0, None)
    log.end(5, "finished")
    shutil.copytree(run, copy)
    append(run / "attempts.jsonl", {"event": "start", "time": 1.8e9})
    with pytest.raises(UserError, match="no run was started there"):
        status(copy)
    AttemptLog(copy).start(1)
    append(copy / "jobs.jsonl", {"job": "2", "time": 1.8e9, "run_dir": str(copy)})
    assert [event["event"] for event in read_attempts(copy)] == ["start"]
    assert [job["job"] for job in read_jobs(copy)] == ["2"]
    copy.rename(tmp_path / "moved")
    assert len(read_attempts(tmp_path / "moved")) == 1
    shutil.rmtree(run)
    assert len(read_attempts(tmp_path / "moved")) == 4
    capsys.readouterr()


@pytest.mark.parametrize(
    ("last", "ended", "expected"),
    [
        ([], None, {"queue": 10, "start-up": 10, "training": 80}),
        ([{"event": "end", "time": 150, "iteration": 9, "reason": "SIGTERM"}], None,
         {"queue": 60, "start-up": 10, "training": 30}),
        ([{"event": "failure", "time": 160, "iteration": 9, "error": "x", "exit_code": 1},
          {"event": "stop", "time": 161, "text": "three times"}], "stopped: three times",
         {"queue": 10, "start-up": 10, "training": 30, "down": 10}),
    ],
)  # fmt: skip
def test_the_last_attempt(
    last: list[dict[str, Any]], ended: str | None, expected: dict[str, float], tmp_path: Path
) -> None:
    """It runs, waits to go on, or was stopped for good, after which no time is lost."""
    write(tmp_path, *start(110, 120), *last, sign=150.0)
    assert seconds(tmp_path, 200) == expected
    assert run_time(tmp_path, 200).ended == ended


def test_queued_only(tmp_path: Path) -> None:
    """A job that has not begun is all waiting."""
    write(tmp_path)
    assert seconds(tmp_path, 130) == {"queue": 30}


WHOLE: dict[str, list[dict[str, Any]]] = {
    "jobs.jsonl": [{"job": "1", "time": 100.0, "folder": ""}],
    "attempts.jsonl": [
        *start(110, 120),
        {"event": "checkpoint", "time": 150, "iteration": 10, "stall_s": 3},
        {"event": "failure", "time": 160, "iteration": 10, "error": "x", "exit_code": 1},
        *start(170, 180, iteration=10, rewound_steps=3, active_until=155.0),
        {"event": "end", "time": 190, "iteration": 20, "reason": "finished"},
    ],
    "metrics.jsonl": [
        {"kind": "train", "iteration": 20, "consumed_tokens": 64, "loss": 1.0, "step_ms": 2.0,
         "tokens_per_s": 3.0, "eta_s": 0.0},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_records_that_lack_something(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any field of any line that is gone, or another kind of value: the status of the run, or one
    message with the file's name.
    """
    for line, record in enumerate(WHOLE[name]):
        for field in record:
            for change in ({}, {field: "x"}, {field: [1]}, {field: None}, {field: True}):
                for file, records in WHOLE.items():
                    lines = list(records)
                    if file == name:
                        lines[line] = {k: v for k, v in record.items() if k != field} | change
                    text = "".join(json.dumps(each) + "\n" for each in lines)
                    (tmp_path / file).write_text(text)
                try:
                    status(tmp_path, as_json=False)
                except UserError as error:
                    assert str(error).startswith(str(tmp_path / name)), (field, change)
    capsys.readouterr()
    (tmp_path / name).write_text("[]\n3\n")
    with pytest.raises(UserError, match=name) if name != "attempts.jsonl" else nullcontext():
        status(tmp_path, as_json=False)
