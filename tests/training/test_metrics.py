"""The metrics of a run: what is in the files after a kill and a resume, and on the console."""

import json
import math
import os
import pty
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from megatron_hybrid.errors import UserError
from megatron_hybrid.training.console import (
    RunConsole,
    human_count,
    human_duration,
    step_line,
)
from megatron_hybrid.training.metrics import (
    METRICS_FILE,
    peak_memory_gib,
    read_records,
)
from megatron_hybrid.training.step_metrics import TIMING_FIELDS, StepMetrics
from tests.training.reports import Reports, reports


def step(iteration: int, step_ms: float = 812.0) -> StepMetrics:
    return StepMetrics(
        iteration=iteration,
        consumed_samples=16 * iteration,
        consumed_tokens=16384 * iteration,
        loss=7.8123456789012345 / iteration,
        learning_rate=3e-4 / 3,
        grad_norm=1.2341,
        tokens_per_s=12345.6,
        model_tflops_per_rank=0.1234,
        step_ms=step_ms,
        peak_memory_gib=1.234,
        eta_s=192.4,
        phase="broad",
        source_tokens={"web": 12288 * iteration, "code": 4096 * iteration},
        source_epochs={"web": 0.1 * iteration, "code": 0.3 * iteration},
        extra={"load_balancing_loss": 0.1 + 0.2},
    )


def open_writer(
    folder: Path, resume_iteration: int = 0, **options: bool
) -> AbstractContextManager[Reports]:
    return reports(folder, resume_iteration=resume_iteration, total_iterations=200, **options)


def write_run(folder: Path, first: int, last: int, step_ms: float = 812.0) -> None:
    """Steps `first` to `last`, with a validation every second step."""
    with open_writer(folder, resume_iteration=first - 1) as writer:
        for iteration in range(first, last + 1):
            writer.train(step(iteration, step_ms))
            if iteration % 2 == 0:
                writer.validation(iteration, 16 * iteration, 16384 * iteration, 5 / iteration)


def without_timing(folder: Path) -> list[dict[str, object]]:
    records = read_records(folder / METRICS_FILE)
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records]


@pytest.mark.parametrize("torn", [b"", b'{"kind":"train","iterat', b"\x00\x00\x00"])
def test_resumed_file_equals_the_uninterrupted_one(tmp_path: Path, torn: bytes) -> None:
    """Steps beyond the checkpoint and half a line at the end are gone after the resume."""
    write_run(tmp_path / "whole", 1, 10)
    write_run(tmp_path / "killed", 1, 8, step_ms=700.0)
    with (tmp_path / "killed" / METRICS_FILE).open("ab") as file:
        file.write(torn)
    write_run(tmp_path / "killed", 7, 10, step_ms=900.0)

    assert without_timing(tmp_path / "killed") == without_timing(tmp_path / "whole")
    assert len(without_timing(tmp_path / "whole")) == 10 + 5
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {METRICS_FILE, "metrics_rewound.jsonl"}  # the steps that were done again


def test_fresh_run_forgets_the_steps_of_one_that_never_saved(tmp_path: Path) -> None:
    """Resuming at step 0 leaves nothing of the earlier attempt."""
    write_run(tmp_path, 1, 3)
    write_run(tmp_path, 1, 2)
    assert [r["iteration"] for r in read_records(tmp_path / METRICS_FILE)] == [1, 2, 2]


def test_damage_before_the_last_line_is_named_and_nothing_is_removed(tmp_path: Path) -> None:
    """A broken line amid the file is an error with its number, not a silent loss of the rest."""
    write_run(tmp_path, 1, 3)
    path = tmp_path / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"[1, 2]\n" + lines[1])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a metrics record: '\[1, 2\]'"):
        open_writer(tmp_path, resume_iteration=1).__enter__()
    assert path.read_bytes() == before


def test_floats_keep_every_bit_and_lines_are_strict_json(tmp_path: Path) -> None:
    """What is read back is the float that was written; NaN is null, as JSON has no NaN."""
    written = step(3)
    with open_writer(tmp_path) as writer:
        writer.train(written)
        writer.train(replace(written, iteration=4, loss=math.nan, grad_norm=math.inf, skipped=True))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first.pop("kind") == "train"
    assert StepMetrics(**first) == written
    assert (second["loss"], second["grad_norm"], second["skipped"]) == (None, None, True)


def test_a_line_is_in_the_file_as_soon_as_it_is_reported(tmp_path: Path) -> None:
    """A run killed with -9 loses no step: nothing waits in a buffer."""
    with open_writer(tmp_path) as writer:
        writer.train(step(1))
        writer.event(1, "checkpoint", "saved")
        last = read_records(tmp_path / METRICS_FILE)[-1]
    assert last == {
        "kind": "event",
        "iteration": 1,
        "name": "checkpoint",
        "message": "saved",
    }


def test_a_rank_that_does_not_report_writes_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks other than the reporting one neither touch the folder nor truncate its file."""
    with open_writer(tmp_path / "run", enabled=False, tensorboard=True) as writer:
        writer.train(step(1))
        writer.validation(1, 16, 16384, 5.0)
        writer.event(1, "checkpoint", "saved")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    """TensorBoard's own reader finds the scalars, and of repeated steps only the newer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, step_ms in ((1, 4, 700.0), (3, 5, 900.0)):
        with open_writer(tmp_path, resume_iteration=first - 1, tensorboard=True) as writer:
            for iteration in range(first, last + 1):
                writer.train(step(iteration, step_ms))
            writer.validation(last, 0, 0, 4.5)

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    step_ms = [(e.step, e.value) for e in events.Scalars("throughput/step_ms")]
    assert step_ms == [(1, 700.0), (2, 700.0), (3, 900.0), (4, 900.0), (5, 900.0)]
    assert events.Scalars("train/loss")[4].value == pytest.approx(step(5).loss, rel=1e-6)
    assert events.Scalars("train/load_balancing_loss")[0].value == pytest.approx(0.3)
    assert [e.value for e in events.Scalars("data/tokens/code")][-1] == 5 * 4096
    assert events.Scalars("data/epochs/web")[1].value == pytest.approx(0.2)
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(5, 4.5)]


def test_console_line_has_every_figure_with_its_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On plain output each report is exactly one line, without colours or bars."""
    with open_writer(tmp_path) as writer:
        writer.train(step(12))
        writer.validation(12, 192, 196608, 5.0)
        writer.event(12, "checkpoint", "checkpoint [bold]saved[/bold]")
    assert capsys.readouterr().out.splitlines() == [
        "step 12/200 | tokens 196.6K | phase broad | loss 0.6510 | lr 1.0e-04 | grad norm 1.234 | "
        "12.3K tokens/s | 0.12 TFLOP/s/rank | 812 ms | 1.23 GiB | ETA 00:03:12",
        "step 12/200 | tokens 196.6K | validation loss 5.0000 | perplexity 148.41",
        "checkpoint [bold]saved[/bold]",
    ]


def test_skipped_update_is_said_on_the_line() -> None:
    """A step whose update was not applied does not look like any other."""
    line = step_line(replace(step(2), skipped=True, nonfinite=True, loss=math.nan), 200)
    assert "loss nan" in line
    assert line.endswith("| update skipped")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (812.4, "812"), (999.99, "1.0K"), (12345, "12.3K"), (999_960, "1.0M"),
     (8_100_852_736, "8.1B"), (20e12, "20.0T")],
)  # fmt: skip
def test_counts_are_rounded_with_their_unit(value: float, text: str) -> None:
    """Rounding never prints four digits before the point below a trillion."""
    assert human_count(value) == text


def test_durations_read_as_a_clock() -> None:
    """Days come before the clock; a duration that is not known is not a number."""
    assert human_duration(192.4) == "00:03:12"
    assert human_duration(2 * 86400 + 59.6) == "2d 00:01:00"
    assert human_duration(math.inf) == "unknown"


def test_terminal_gets_the_lines_and_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pseudo terminal the same line appears whole, and below it the progress bar."""
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        console = RunConsole(200, completed=11)
        console.step(step(12))
        console.line("checkpoint [bold]saved[/bold]")
        console.close()
        monkeypatch.undo()
    shown = b""
    while chunk := _read_or_end(ours):
        shown += chunk
    os.close(ours)
    text = shown.decode()
    assert step_line(step(12), 200) in text
    assert text.index("checkpoint [bold]saved[/bold]") < text.rindex("step 12/200")
    assert "━" in text
    assert "6% | loss 0.6510" in text


def _read_or_end(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux reports that the other side of a pseudo terminal was closed
        return b""


def test_peak_memory_on_the_cpu_is_of_this_process() -> None:
    """Touching 256 MiB beyond the earlier peak raises the peak by 0.25 GiB."""
    before = peak_memory_gib(torch.device("cpu"))
    below_peak = int(before * 2**30) - psutil.Process().memory_info().rss
    block = b"x" * (below_peak + 256 * 2**20)
    after = peak_memory_gib(torch.device("cpu"))
    del block
    assert after - before == pytest.approx(0.25, abs=0.05)
