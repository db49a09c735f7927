"""The log, for people and for machines."""

import ast
import json
import logging
import os
import subprocess
import warnings
from pathlib import Path

import pytest

import megatron_hybrid
from launchers.errors import POSITION
from megatron_hybrid import log
from megatron_hybrid.log import Level, show_log
from tests.warm import python

logger = logging.getLogger("megatron_hybrid.somewhere")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loggers and environment are as before, afterwards."""
    for name in (log.LEVEL, log.JSON):
        monkeypatch.setenv(name, "")
    for each in (logging.getLogger(), logging.getLogger(log.OURS)):
        monkeypatch.setattr(each, "handlers", [])
        monkeypatch.setattr(each, "level", logging.WARNING)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(POSITION, "iteration", None)


@pytest.mark.parametrize(
    ("rank", "level", "shown"),
    [
        ("0", Level.INFO, "a choice\na doubt\n"),
        ("0", Level.ERROR, ""),
        ("0", Level.DEBUG, "a detail\na choice\na doubt\n"),
        ("3", Level.INFO, "rank 3: a doubt\n"),
        ("3", Level.DEBUG, "rank 3: a detail\nrank 3: a choice\nrank 3: a doubt\n"),
    ],
)
def test_text(
    rank: str, level: Level, shown: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What each rank shows; asked for twice, it is shown once."""
    monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        show_log(level, as_json=False)
    logger.debug("a %s", "detail")
    logger.info("a %s", "choice")
    logger.warning("a doubt")
    assert capsys.readouterr().err == shown
    assert (os.environ[log.LEVEL], os.environ[log.JSON]) == (level, "0")


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An object a line with rank and step, others' warnings too."""
    monkeypatch.setenv("RANK", "2")
    show_log(Level.WARNING, as_json=True)
    logger.warning('"quoted"\nlines')
    POSITION.iteration = 7
    try:
        raise KeyError("wrong")
    except KeyError:
        logging.getLogger("engine").exception("failed")
    warnings.warn("old", FutureWarning, stacklevel=1)
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(each["level"], each["rank"], each["step"]) for each in found] == [
        ("warning", 2, None), ("error", 2, 7), ("warning", 2, 7),
    ]  # fmt: skip
    assert found[0]["logger"] == "megatron_hybrid.somewhere"
    assert found[0]["message"] == '"quoted"\nlines'
    assert found[1]["traceback"].endswith("KeyError: 'wrong'")
    assert "FutureWarning: old" in found[2]["message"]


def test_options() -> None:
    """Before the command; a level that there is not is refused."""
    command = [python(), "-m", "megatron_hybrid.cli", "--log-json", "--log-level"]
    words = ["pretrain", "tiny", "data.mock_data=true", "training.eval_interval=1000", "--dry-run"]
    done = subprocess.run([*command, "info", *words], capture_output=True, text=True, check=True)
    notes = [json.loads(line) for line in done.stderr.splitlines()]
    assert any("eval_interval" in note["message"] for note in notes)
    wrong = subprocess.run([*command, "loud", *words], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "debug" in wrong.stderr


def test_the_library_prints_nothing_by_itself() -> None:
    """What is for people goes through `say`, a console, or the log; commands may print."""
    root = Path(megatron_hybrid.__file__).parents[1]
    found = []
    for folder in ("megatron_hybrid", "launchers", "checkpoints_converter"):
        for file in sorted((root / folder).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if name.startswith(("megatron_hybrid/commands/", "megatron_hybrid/cli")):
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                if isinstance(called, ast.Name) and called.id == "print":
                    found.append(f"{name}:{called.lineno}")
    assert found == []
