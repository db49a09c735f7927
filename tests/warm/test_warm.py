"""A warm program is, for who starts it, a program like any other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import program_of, python

PROGRAM = """
import os, signal, sys, tempfile, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
print(sys.argv[1:], os.getcwd(), os.environ.get("WARM"), sys.stdin.read(), flush=True)
print(tempfile.gettempdir(), flush=True)
print("an error", file=sys.stderr)
if sys.argv[1] == "wait":
    time.sleep(60)
if sys.argv[1] == "fail":
    raise ValueError("wrong")
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("how", ["end", "fail", "kill"])
def test_streams_words_place_and_end(how: str, script: Path) -> None:
    """As those of Python itself, to the last byte."""
    own = {"WARM": "yes", "TMPDIR": str(script.parent), "PYTHONPATH": ""}
    cold, warm = (
        subprocess.run(
            [each, script, how, "a b", "\u00fc"], cwd=script.parent, input="given", text=True,
            env=os.environ | own, capture_output=True, check=False,
        )
        for each in (sys.executable, python())
    )  # fmt: skip
    assert warm.stdout == cold.stdout
    assert warm.returncode == cold.returncode
    assert warm.stderr.splitlines()[-1] == cold.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR1, 5), (signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)],
)
def test_signals(number: signal.Signals, code: int, script: Path) -> None:
    """They reach the program, whose end is the end of what was started."""
    process = start(script)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code


def test_kill(script: Path) -> None:
    """What is killed takes its program along."""
    process = start(script)
    program = program_of(process.pid)
    process.kill()
    process.communicate(timeout=30)  # to the end of the streams, which are the program's
    deadline = time.monotonic() + 30
    while Path(f"/proc/{program}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(script: Path) -> "subprocess.Popen[str]":
    """One that waits, and has said so."""
    process = subprocess.Popen(
        [python(), script, "wait"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stderr.readline()
    return process
