"""No test goes by the clock: its outcome is the same on a machine that is ten times slower."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
CLOCKS = {
    f"{module}.{name}{suffix}"
    for module in ("time", "timeit", "datetime", "date")
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time", "now",
                 "utcnow", "today", "default_timer")
    for suffix in ("", "_ns")
}  # fmt: skip
LIMIT = "deadline"  # up to which something is waited for; its length decides nothing
LONG_S = 60  # a stand-in for a process that works until it is ended
# Which files look at a clock in another way, and why that decides no outcome.
OTHERS = {
    "gpu/check.py": "the seconds of steps on a GPU, which it prints, and their limits",
    "gpu/speed.py": "how fast a GPU generates, which it prints",
    "gpu_on_cpu/kernels_interpreted.py": "how long its many cases take, which it prints",
    "launchers/test_local.py": "a made-up clock, which must not race through its looks",
    "mutations/__main__.py": "how long its many cases will take yet, which it prints",
    "slurm/pace.py": "a run that is hit by what comes from outside, and waits for it",
    "slurm/test_surviving.py": "the moment up to which a run's times are added up",
    "training/runs.py": "when a run started, which its Trainer asks for",
}


def programs(text: str) -> Iterator[ast.Module]:
    """A source, and the programs that stand in it as text."""
    tree = ast.parse(text)
    yield tree
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(each.value) if isinstance(each, ast.Constant) else "0" for each in parts
                       if isinstance(each, ast.Constant | ast.FormattedValue))  # fmt: skip
        if text not in docs and ("time" in text or "sleep" in text):
            try:
                yield ast.parse(inspect.cleandoc(text))
            except SyntaxError:
                continue


def looks(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls in `tree` that look at a clock, or sleep, and not in order to wait for something."""
    waiting = set()
    for node in ast.walk(tree):
        limit = isinstance(node, ast.Compare | ast.Assign) and LIMIT in {
            each.id for each in ast.walk(node) if isinstance(each, ast.Name)
        }
        if limit or isinstance(node, ast.For | ast.While):
            waiting |= {id(each) for each in ast.walk(node) if limit or _sleeps(each)}
    for node in ast.walk(tree):
        call = isinstance(node, ast.Call) and id(node) not in waiting
        if call and (ast.unparse(node.func) in CLOCKS or _sleeps(node)):
            yield node


def _sleeps(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("time.sleep", "sleep"):
        return False
    seconds = node.args[0]
    return not (isinstance(seconds, ast.Constant) and seconds.value >= LONG_S)


def test_no_test_goes_by_the_clock() -> None:
    """Clocks are looked at to give up waiting, and sleeps are between two looks at what is waited
    for. What takes time is counted instead: calls, passes, bytes, or what a made-up clock says.
    """
    found = {}
    for path in sorted({*ROOT.rglob("*.py")} - {Path(__file__)}):
        calls = [ast.unparse(call) for tree in programs(path.read_text()) for call in looks(tree)]
        if calls:
            found[str(path.relative_to(ROOT))] = calls
    assert {name: calls for name, calls in found.items() if name not in OTHERS} == {}
    assert OTHERS.keys() <= found.keys()


@pytest.mark.parametrize(
    ("program", "seen"),
    [
        ("began = time.monotonic()\nwork()\nassert time.monotonic() - began < 4", 2),
        ("time.sleep(1.0)\nassert done()", 1),
        ("code = 'import time; a = time.perf_counter(); print(time.perf_counter() - a)'", 2),
        ("f'''\n    {x}\n    time.sleep({y})\n'''", 1),
        ("deadline = time.monotonic() + 9\nwhile time.monotonic() < deadline:\n  time.sleep(1)", 0),
        ("time.sleep(600)", 0),
    ],
)
def test_what_is_seen(program: str, seen: int) -> None:
    """The look of tests that did, and of those that wait."""
    assert sum(len(list(looks(tree))) for tree in programs(program)) == seen
