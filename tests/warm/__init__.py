"""A `python` for tests, whose programs are forks of a process that has everything imported.

What most tests look at is what a program does, not its start, and a start of Python with torch and
the engine takes seconds of a core. `[python(), "-m", "megatron_hybrid.cli", …]` is a program like
any other to who starts it: its pipes, files, environment, folder, signals and end are those of the
fork. Tests of the start itself, and of what is imported, say `sys.executable`.
"""

from tests.warm.session import Session, fork_servers_too, program_of, python

__all__ = ["Session", "fork_servers_too", "program_of", "python"]
