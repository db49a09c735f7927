"""The local launcher, on real processes: environment, console, signals, failures."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers import local

ROOT = Path(__file__).parents[2]
# The launcher as a process of its own, so that it can be sent signals. Its clock goes by its looks
# at the ranks: how often it looks once there is a file `dead` is what it writes at its end.
LAUNCHER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from launchers import local
now, looks, folder = 0.0, 0, Path(sys.argv[-1])
def sleep(seconds):
    global now, looks
    now, looks = now + seconds, looks + (folder / "dead").exists()
    time.sleep(0.01)
local.time = SimpleNamespace(sleep=sleep, monotonic=lambda: now, strftime=time.strftime)
code = local.launch(sys.argv[2:], {n}, grace_s={grace_s}, forks={forks})
(folder / "looks").write_text(str(looks))
sys.exit(code)
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from launchers.errors import record_error
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
"""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=[False, True], ids=["started", "forked"])
def start(request: pytest.FixtureRequest) -> Start:
    """Starts a launcher: ranks are Pythons of their own, or forks of it."""

    def start(
        body: str, folder: Path, ranks: int = 2, grace_s: float = 1000
    ) -> "subprocess.Popen[str]":
        script = folder / "rank.py"
        script.write_text(RANK + body, encoding="utf-8")
        launcher = LAUNCHER.format(n=ranks, grace_s=grace_s, forks=request.param)
        return subprocess.Popen(
            [sys.executable, "-c", launcher, "--", str(script), str(folder)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def test_ranks_find_each_other_and_rank_0_has_the_console(start: Start, tmp_path: Path) -> None:
    """The environment is torchrun's; what other ranks print does not mix into the console."""
    body = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
print(*[os.environ[name] for name in names], flush=True)
(folder / f"port_{rank}").write_text(os.environ["MASTER_PORT"])
(folder / f"threads_{rank}").write_text(os.environ["OMP_NUM_THREADS"])
"""
    done = start(body, tmp_path, ranks=3)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out, err) == (0, "0 0 3 3 127.0.0.1\n", "")
    assert len({(tmp_path / f"port_{rank}").read_text() for rank in range(3)}) == 1
    assert all((tmp_path / f"threads_{rank}").read_text().isdigit() for rank in range(3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_is_waited_for(
    number: signal.Signals, start: Start, tmp_path: Path
) -> None:
    """Ranks get it exactly once, and the launcher ends after the slowest has saved: here, when the
    test says so.
    """
    body = f"""
got = []
signal.signal({int(number)}, lambda *_: got.append(1))
(folder / f"ready_{{rank}}").touch()
while not got:
    time.sleep(0.01)
(folder / f"got_{{rank}}").touch()
while not (folder / f"save_{{rank}}").exists():
    time.sleep(0.01)
(folder / f"saved_{{rank}}").write_text(str(len(got)))
"""
    launcher = start(body, tmp_path)
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    launcher.send_signal(number)
    wait_for(tmp_path / "got_0", tmp_path / "got_1")
    for rank in range(2):
        assert launcher.poll() is None
        (tmp_path / f"save_{rank}").touch()
        wait_for(tmp_path / f"saved_{rank}")
    launcher.communicate(timeout=60)
    assert launcher.returncode == 0
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_the_first_failure_is_seen_last(start: Start, tmp_path: Path) -> None:
    """Rank 1 fails, rank 0 then because of it and ends first: the error of rank 1 is the last on
    the screen.
    """
    body = """
if rank == 1:
    record_error("Traceback ...\\nValueError: the cause")
    (folder / "failed").touch()
    while not (folder / "pid").exists() or not gone(int((folder / "pid").read_text())):
        time.sleep(0.01)
    sys.exit(3)
while not (folder / "failed").exists():
    time.sleep(0.01)
(folder / "part").write_text(str(os.getpid()))
(folder / "part").rename(folder / "pid")
record_error("Traceback ...\\nConnectionError: a consequence")
sys.exit(1)
"""
    launcher = start(body, tmp_path)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 3
    assert err.splitlines()[-2:] == ["ValueError: the cause", "error: rank 1 of 2 failed first"]
    assert "consequence" not in err


def test_a_killed_rank_is_named_with_its_last_words(start: Start, tmp_path: Path) -> None:
    """A rank that dies without a word is reported with its signal and output; others are ended,
    after the grace.
    """
    body = """
if rank == 1:
    while not (folder / "pid").exists():
        time.sleep(0.01)
    print("last words", flush=True)
    (folder / "dead").touch()
    os.kill(os.getpid(), signal.SIGKILL)
(folder / "part").write_text(str(os.getpid()))
(folder / "part").rename(folder / "pid")
time.sleep(600)
"""
    launcher = start(body, tmp_path, grace_s=2)
    _, err = launcher.communicate(timeout=60)
    assert int((tmp_path / "looks").read_text()) >= 2 / local._POLL_S
    assert launcher.returncode == 128 + signal.SIGKILL
    assert err.splitlines()[-2:] == ["last words", "error: rank 1 of 2 ended by signal SIGKILL"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_ranks_do_not_outlive_a_killed_launcher(start: Start, tmp_path: Path) -> None:
    """If the launcher is killed, ranks get SIGTERM, on which training saves and exits."""
    body = """
signal.signal(signal.SIGTERM, lambda *_: (folder / f"told_{rank}").touch() or sys.exit())
(folder / f"ready_{rank}").touch()
time.sleep(600)
"""
    launcher = start(body, tmp_path)
    wait_for(tmp_path / "ready_0", tmp_path / "ready_1")
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_for(tmp_path / "told_0", tmp_path / "told_1")
