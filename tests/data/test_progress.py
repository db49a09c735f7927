"""What is shown while large files are worked on: lines in a log, a bar at a terminal."""

import re

import pytest

from megatron_hybrid.data import progress
from megatron_hybrid.data.progress import show_progress


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: plain lines with the share, MB/s and the time left, for each stage."""
    with show_progress("tokenise", log_every_s=0) as report:
        for stage, total in (("tokenise", 8_000_000), ("shuffle", 4_000_000)):
            for done in (0, 1_000_000, total):
                report(stage, done, total)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "tokenise:  12% of 8 MB",
        "tokenise: 100% of 8 MB",
        "shuffle:  25% of 4 MB",
        "shuffle: 100% of 4 MB",
    ]
    assert all(re.search(r"[\d.]+ MB/s, \d+ s left$", line) for line in lines)


def test_a_bar_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a terminal: a bar a stage, with the share and the speed."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    assert progress.Console(stderr=True).is_terminal
    with show_progress("tokenise") as report:
        report("tokenise", 50, 100)
        report("tokenise", 100, 100)
        report("shuffle", 25, 100)
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"tokenise .*100%", shown)
    assert re.search(r"shuffle .*25%", shown)
