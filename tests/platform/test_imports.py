"""Packages that are installed and broken: found, named, and no harm where nothing uses them."""

import gc
import io
import re
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_hybrid.platform import imports
from megatron_hybrid.platform.imports import GPU_MODULES, import_errors
from megatron_hybrid.testing import run_distributed

BROKEN = "raise FileNotFoundError('Could not find shared object file')"
# For those that ask in the engine alone; others look for some of them too, in their own way.
BROKEN_FOR_THE_ENGINE = f"""
import sys
frame = sys._getframe(1)
while "importlib" in frame.f_code.co_filename:
    frame = frame.f_back
if frame.f_globals["__name__"].startswith("megatron."):
    {BROKEN}
raise ModuleNotFoundError(__name__)
"""
# Of what the engine imports if it is there: no kernels, and used without GPUs as well.
WANTED_ON_THE_CPU = {"multistorageclient", "nvidia_resiliency_ext", "wandb"}
ROOT = Path(__file__).parents[2]

ALL_THAT_IMPORTS_THE_ENGINE = """
import importlib, pathlib, sys
from megatron_hybrid.platform import initialize
initialize()
for path in sorted(pathlib.Path("megatron_hybrid").rglob("*.py")):
    if "from megatron.core" in path.read_text():
        importlib.import_module(".".join(path.with_suffix("").parts))
assert "torch._dynamo" not in sys.modules, "a rank starts with torch's compiler"
"""


def test_each_way_to_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of any kind, an end of the process, and those after it: all are told apart."""
    modules = {
        "torch": "",  # whose import takes seconds
        "whole": "print('a module that prints')",
        "broken": BROKEN,
        "ends": "import os; os._exit(3)",
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "exits": "import sys; sys.exit('no')",
        "last": "",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))  # before the installed torch
    assert import_errors([*modules, "absent"]) == {
        "broken": "FileNotFoundError: Could not find shared object file",
        "ends": "the import ended Python with code 3",
        "dies": "the import ended Python with signal 9",
        "exits": "SystemExit: no",
        "absent": "ModuleNotFoundError: No module named 'absent'",
    }


def test_importing_leaves_the_collector_as_it_was() -> None:
    """On again afterwards, after an error too; off where it was off."""
    with pytest.raises(ImportError), imports.importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with imports.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_broken_modules_of_gpus_do_not_matter_on_the_cpu(tmp_path: Path) -> None:
    """Whatever the engine would import for GPUs may be broken: all of ours that imports the engine
    can still be imported, without the seconds that torch's compiler takes.
    """
    text = "\n".join(
        path.read_text() for path in Path(str(resources.files("megatron.core"))).rglob("*.py")
    )
    named = set(re.findall(r"^\s*(?:from|import) ([a-zA-Z_]\w*)", text, re.MULTILINE))
    absent = {name for name in named - WANTED_ON_THE_CPU if find_spec(name) is None}
    assert {"transformer_engine", "apex"} <= absent | set(sys.modules)
    for name in {*absent, *GPU_MODULES}:
        (tmp_path / f"{name}.py").write_text(BROKEN_FOR_THE_ENGINE)
    done = subprocess.run(
        [sys.executable, "-c", ALL_THAT_IMPORTS_THE_ENGINE], cwd=ROOT, capture_output=True,
        text=True, check=False, env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_doctor_names_half_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose compiled part is missing is installed, and of no use; training is still
    possible without it, but not without one that is required.
    """
    from packaging.requirements import Requirement
    from rich.console import Console

    from megatron_hybrid import doctor

    for name in ("transformer_engine", "needed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(BROKEN)
        info = tmp_path / f"{name}-2.20.2.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n"
                                             "Version: 2.20.2\n")  # fmt: skip
        info.joinpath("top_level.txt").write_text(f"{name}\n")
    (tmp_path / "torch.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    only = {"transformer-engine": doctor.OPTIONAL["transformer-engine"]}
    monkeypatch.setattr(doctor, "OPTIONAL", only)
    errors = doctor._import_errors(["needed"])
    found = doctor._optional("transformer-engine", errors)
    assert (found.found, found.status) == ("2.20.2", "unusable")
    assert "FileNotFoundError: Could not find shared object file" in found.note
    console = Console(file=io.StringIO(), width=200)
    assert doctor.report([found], console)
    assert "ready to train, without transformer-engine" in console.file.getvalue()  # type: ignore[attr-defined]
    needed = doctor._required(Requirement("needed>=1"), errors)
    assert needed.status == "broken" and "FileNotFoundError" in needed.note
    assert not doctor.report([found, needed], console)


def test_modules_are_those_that_this_process_would_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started in a folder that holds sources of a module, the installed one is meant."""
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "__init__.py").write_text("raise RuntimeError('a checkout')")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "torch.py").write_text("")  # whose import takes seconds
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    monkeypatch.chdir(tmp_path)
    assert import_errors(["yaml"]) == {}
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_errors(["yaml"]) == {"yaml": "RuntimeError: a checkout"}


def wandb() -> tuple[bool, bool]:
    """On a rank: whether wandb is imported, and whether it can be found."""
    return "wandb" in sys.modules, find_spec("wandb") is not None


def test_a_start_does_not_import_wandb() -> None:
    """The engine would, a second a rank; whoever wants it later finds it."""
    assert run_distributed(wandb, 1) == [(False, True)]


def test_what_takes_too_long_is_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow file system says nothing of a package, a hanging one is still named."""
    monkeypatch.setattr(imports, "MOST_SECONDS", 0.01)
    found = import_errors(["yaml"])
    assert not imports.came_to_an_end(found["yaml"])
    assert imports.came_to_an_end("ImportError: no")
