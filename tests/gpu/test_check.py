"""The check of a GPU: its list of steps, what it records, and what a kill leaves."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu import check
from tests.gpu.check import MINUTES, STEPS, SUMMARY, WHEELS_S, Step
from tests.gpu.findings import Findings, status_of

LIGHT = "tests.gpu.light_steps"


def light(*names: str, seconds: float = 60) -> tuple[Step, ...]:
    return tuple(Step(name, f"{LIGHT}:{name}", seconds) for name in names)


def run(steps: tuple[Step, ...], out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the summary."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # both are the process's
        patch.setenv("TRITON_CACHE_AUTOTUNING", "1")
        code = check.main(["--out", str(out), *words], steps)
    signal.signal(signal.SIGTERM, before)
    return code, json.loads((out / SUMMARY).read_text())


def test_steps() -> None:
    """The list is what was promised, in that order, in nine minutes; each step is there."""
    assert [step.name for step in STEPS] == [
        "versions", "kernels", "layers", "recipes", "resume", "step_400m_bf16", "step_400m_fp8",
        "step_1200m_bf16", "step_1200m_fp8", "generation", "plan",
    ]  # fmt: skip
    assert WHEELS_S + sum(step.seconds for step in STEPS) <= 60 * MINUTES
    for step in STEPS:
        module, _, name = step.work.partition(":")
        assert list(inspect.signature(getattr(import_module(module), name)).parameters) == [
            "findings"
        ]


def test_a_failure_stops_nothing(tmp_path: Path) -> None:
    """Each step has its record with all its parts, whatever became of the one before."""
    code, summary = run(light("broken", "dies", "whole"), tmp_path)
    broken, dies, whole = summary["steps"].values()
    assert code == 1 and summary["complete"]
    assert (broken["status"], dies["status"], whole["status"]) == ("failed", "failed", "ok")
    assert broken["parts"] == [
        {"name": "wrong", "status": "failed", "error": "NaN",
         "why": "AssertionError: y is off by 0.1"},
        {"name": "right", "status": "ok"},
    ]  # fmt: skip
    assert dies["parts"] == [{"name": "before", "status": "ok"}]
    assert dies["why"].splitlines() == ["ended with 7", "last words"]
    assert whole["parts"][1] == {"name": "part 2", "status": "ok", "figure": 1.0}
    table = (tmp_path / "summary.txt").read_text()
    assert re.search(r"wrong +failed +AssertionError: y is off by 0\.1, error NaN", table)
    assert re.search(r"mxfp8 +skipped +needs another GPU", table)


def test_a_hang_ends(tmp_path: Path) -> None:
    """A step that does not end is ended at its limit."""
    code, summary = run(light("hangs"), tmp_path, "--minutes", f"{MINUTES / 1000}")
    (record,) = summary["steps"].values()
    assert code == 1 and record["status"] == "timed out"


@pytest.mark.parametrize(("toy", "status"), [(True, "skipped"), (False, "failed")])
def test_what_needs_a_gpu(toy: bool, status: str, tmp_path: Path) -> None:
    """It is passed over by name in a toy, and a failure on a GPU."""
    reader, writer = os.pipe()
    findings = Findings(writer, tmp_path, tmp_path / SUMMARY, toy=toy)
    import_module(LIGHT).of_a_gpu(findings)
    os.close(writer)
    with os.fdopen(reader) as lines:
        parts = [json.loads(line) for line in lines]
    assert [(part["status"], part["why"]) for part in parts] == [
        (status, "mamba-ssm's scan needs a GPU"),
        (status, "NotImplementedError: transformer_engine_torch.quantize"),
    ]
    assert status_of(parts) == status


def test_some_steps(tmp_path: Path) -> None:
    """Those that are asked for run, in the order of the list."""
    code, summary = run(light("whole", "dies", "hangs"), tmp_path, "--steps", "dies", "whole")
    assert code == 1 and list(summary["steps"]) == ["whole", "dies"]


def test_wheels(tmp_path: Path) -> None:
    """All wheels of the folder are there for the steps, from nowhere else; without one it fails."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    code, summary = run((), tmp_path / "none", "--wheels", str(folder))
    assert code == 1
    assert summary["steps"]["wheels"]["why"] == f"there is no wheel in {folder}"
    with zipfile.ZipFile(folder / "gpu_light-1.0-py3-none-any.whl", "w") as wheel:
        info = "gpu_light-1.0.dist-info"
        wheel.writestr("gpu_light.py", "from tests.gpu.light_steps import whole")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gpu-light\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    step = Step("whole", "gpu_light:whole", 60)
    code, summary = run((step,), tmp_path / "one", "--wheels", str(folder))
    assert code == 0
    assert [part["name"] for part in summary["steps"]["wheels"]["parts"]] == [
        "gpu_light-1.0-py3-none-any.whl"
    ]
    assert summary["steps"]["whole"]["status"] == "ok"


def test_only_a_measurement_failed(tmp_path: Path) -> None:
    """It is told apart from a failed test by the exit code."""
    speed = Step("broken", f"{LIGHT}:broken", 60, is_test=False)
    assert run((*light("whole"), speed), tmp_path)[0] == 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_what_was_done(how: signal.Signals, tmp_path: Path) -> None:
    """The records of steps before it, and of the parts of the step that ran; and no process."""
    out, temp = tmp_path / "out", tmp_path / "temp"
    temp.mkdir()
    program = (
        "from tests.gpu.test_check import light; from tests.gpu.check import main;"
        f"main(['--out', {str(out)!r}], light('whole', 'hangs', 'broken'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program], env=os.environ | {"TMPDIR": str(temp)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        summary = wait_for(out / SUMMARY, "hangs")
    finally:
        process.send_signal(how)
    assert process.wait() == (-how if how == signal.SIGKILL else 128 + how)
    left = json.loads((out / SUMMARY).read_text())
    assert not left["complete"]
    assert list(left["steps"]) == ["whole", "hangs"]
    assert left["steps"]["whole"]["status"] == "ok"
    assert left["steps"]["hangs"]["status"] == ("running" if how == signal.SIGKILL else "stopped")
    (part,) = summary["steps"]["hangs"]["parts"]
    assert left["steps"]["hangs"]["parts"] == [part]
    while runs(part["pid"]):  # at most a moment later it does not
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(path: Path, step: str) -> dict[str, Any]:
    """The summary once a step has told a part."""
    while True:
        if path.exists():
            summary = json.loads(path.read_text())
            if summary["steps"].get(step, {}).get("parts"):
                return summary
        time.sleep(0.01)
