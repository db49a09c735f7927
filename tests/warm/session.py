"""The session's side: where the server is started, and ended with the session."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CLIENT = Path(__file__).with_name("client.py")
ROOT = Path(__file__).parents[2]
_session: "Session"


class Session:
    """What `python` is in this session; processes that share its tests share the server.

    Args:
        folder: of the server that another process of the session has; None: this one has it, from
            `start` on.
    """

    def __init__(self, folder: Path | None = None) -> None:
        global _session
        _session = self
        self._process: subprocess.Popen[bytes] | None = None
        self._own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="warm-"))
        self.executable = self.folder / "python"
        self.programs = self.folder / "programs"
        if self._own:
            # A path may have some 100 bytes: in the abstract namespace it needs no folder.
            self._name = f"\0megatron-hybrid-{os.getpid()}-{self.folder.name}"
            self.programs.mkdir()
            head = f"#!{sys.executable} -IS\nSOCKET = {self._name!r}\n"
            self.executable.write_text(head + CLIENT.read_text())
            self.executable.chmod(0o755)

    def start(self) -> None:
        """Start the server, unless it runs; who connects from now on waits until it has loaded."""
        if not self._own or self._process is not None:
            return
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._name)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(listener.fileno()), str(self.programs)],
                cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[listener.fileno()],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def end(self) -> None:
        """End the server, and all programs with it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # by which it knows
            self._process.wait()
        if self._own:
            shutil.rmtree(self.folder)


def python() -> str:
    """The path of a Python whose programs are forks; the server starts on the first use."""
    _session.start()
    return str(_session.executable)


def fork_servers_too() -> None:
    """Let multiprocessing's own servers and spawned processes be forks of the server as well."""
    multiprocessing.set_executable(python())


def program_of(pid: int) -> int:
    """The fork's number, of a process that was started as `python()`."""
    return int((_session.programs / str(pid)).read_text())
