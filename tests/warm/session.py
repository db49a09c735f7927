"""The session's side: where the server is started, and ended with the session."""

import os
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).with_name("client.py")
ROOT = Path(__file__).parents[2]
_servers: list["Server"] = []


def python() -> str:
    """The path of a Python whose programs are forks; the server starts on the first use."""
    server = _servers[-1]
    server.start()
    return str(server.executable)


def program_of(pid: int) -> int:
    """The fork's number, of a process that was started as `python()`."""
    return int((_servers[-1].programs / str(pid)).read_text())


class Server:
    """The server of a session; in its `with` block `python` starts it when it is needed.

    Args:
        folder: for its socket and the executable.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.executable = folder / "python"
        self.programs = folder / "programs"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        _servers.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _servers.remove(self)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # by which it knows
            self._process.wait()

    def start(self) -> None:
        """Start it, if it does not run; returns when it listens."""
        if self._process is not None:
            return
        self.programs.mkdir()
        # A socket's path may have some 100 bytes: in the abstract namespace it needs no folder.
        name = f"\0megatron-hybrid-{os.getpid()}-{self._folder.name}"
        head = f"#!{sys.executable} -IS\nSOCKET = {name!r}\n"
        self.executable.write_text(head + CLIENT.read_text())
        self.executable.chmod(0o755)
        reader, writer = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", name[1:], str(writer), str(self.programs)],
            cwd=ROOT, stdin=subprocess.PIPE, pass_fds=[writer],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        os.close(writer)
        with os.fdopen(reader, "rb") as ready:
            assert ready.read() == b"listening", "the server of warm programs did not start"
