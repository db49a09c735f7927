"""Runs the steps of a check on one GPU, each in a process of its own, and writes what they found.

`check.sh` starts it. Each finding is in the file at once: after a kill what was found stays. Of a
step's time what is left over is the next one's, and no step can take another's.
"""

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.fileio import write_atomic
from tests.gpu.findings import FAILED, OK, PROGRAM, SKIPPED, status_of
from tests.gpu.report import as_text

SUMMARY, TABLE, LOG = "summary.json", "summary.txt", "log.txt"
RUNNING, TIMED_OUT, STOPPED = "running", "timed out", "stopped"
MINUTES = 9.0
LAST_LINES = 15
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        work: `module:function`, called with a `Findings`.
        seconds: of the nine minutes.
        is_test: whether the program is right depends on it; else it measures.
    """

    name: str
    work: str
    seconds: float
    is_test: bool = True


# Of the nine minutes, so many are for the wheels.
WHEELS_S = 60.0
STEPS = (
    Step("versions", "tests.gpu.steps:versions", 25),
    Step("kernels", "tests.gpu.steps:kernels", 70),
    Step("layers", "tests.gpu.steps:layers", 45),
    Step("recipes", "tests.gpu.steps:recipes", 65),
    Step("resume", "tests.gpu.steps:resume", 70),
    Step("step_400m_bf16", "tests.gpu.speed:step_400m_bf16", 45, is_test=False),
    Step("step_400m_fp8", "tests.gpu.speed:step_400m_fp8", 35, is_test=False),
    Step("step_1200m_bf16", "tests.gpu.speed:step_1200m_bf16", 45, is_test=False),
    Step("step_1200m_fp8", "tests.gpu.speed:step_1200m_fp8", 40, is_test=False),
    Step("generation", "tests.gpu.speed:generation", 30),
    Step("plan", "tests.gpu.speed:plan", 10, is_test=False),
)


class Check:
    """A run of steps, and the file of what they found.

    Args:
        out: the folder of the files.
        work: for what steps leave, and for nobody else.
        minutes: for all of the steps, whose seconds are parts of `MINUTES`.
        toy: at toy size, with stand-ins for what a GPU has.
    """

    def __init__(
        self, steps: Sequence[Step], out: Path, work: Path, minutes: float, *, toy: bool
    ) -> None:
        self.steps, self.out, self.work, self.toy = steps, out, work, toy
        self.records: dict[str, dict[str, Any]] = {}
        self._scale = minutes / MINUTES
        self._began = time.monotonic()
        self._granted = 0.0

    def run(self, wheels: Path | None) -> int:
        """All steps; 0, or 1 where a test has failed, 2 where only a measurement has."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / LOG).write_bytes(b"")
        self._granted += WHEELS_S * self._scale
        if wheels is not None:
            self._record("wheels", self._install(wheels))
        for step in self.steps:
            self._granted += step.seconds * self._scale
            self._run(step, self._began + self._granted)
        self._write(complete=True)
        tests = {step.name for step in self.steps if step.is_test} | {"wheels"}
        bad = [name for name, it in self.records.items() if it["status"] in (FAILED, TIMED_OUT)]
        return 0 if not bad else 1 if tests & set(bad) else 2

    def _run(self, step: Step, deadline: float) -> None:
        """One step, in a process of its own."""
        started = time.monotonic()
        parts: list[dict[str, Any]] = []

        def record(status: str, why: str = "") -> None:
            seconds = time.monotonic() - started
            self._record(
                step.name, {"status": status, "why": why, "seconds": seconds, "parts": parts}
            )

        record(RUNNING)
        with (self.out / LOG).open("ab", buffering=0) as log:
            log.write(f"\n=== {step.name}\n".encode())
            begin = log.tell()
            process, reader = self._start(step, log)
            try:
                for line in _lines(reader, deadline):
                    parts.append(json.loads(line, parse_constant=str))  # NaN is no JSON
                    record(RUNNING)
                code = process.wait(max(0.0, deadline - time.monotonic()))
                why = "" if code == 0 else f"ended with {code}"
                status = FAILED if why else status_of(parts)
            except (TimeoutError, subprocess.TimeoutExpired):
                status, why = TIMED_OUT, f"not done after {time.monotonic() - started:.0f} s"
            except BaseException:
                record(STOPPED)
                raise
            finally:
                os.close(reader)
                _end(process)
        if why:
            said = (self.out / LOG).read_bytes()[begin:].decode(errors="replace").splitlines()
            why = "\n".join([why, *said[-LAST_LINES:]])
        record(status, why)

    def _start(self, step: Step, log: BinaryIO) -> tuple["subprocess.Popen[bytes]", int]:
        """Its process, and the pipe on which that tells its parts, a line each."""
        reader, writer = os.pipe()
        command = [
            sys.executable, "-P", "-c", PROGRAM, step.work, str(writer), str(self.work),
            str(self.out / SUMMARY), *(["--toy"] if self.toy else []),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writer,),
            start_new_session=True, env=os.environ | {"TMPDIR": str(self.work)},
            preexec_fn=_end_with_parent,
        )  # fmt: skip
        os.close(writer)
        return process, reader

    def _install(self, wheels: Path) -> dict[str, Any]:
        """Put all wheels of a folder beside what this Python has; nothing is fetched."""
        started, site = time.monotonic(), self.work / "site"
        files = sorted(map(str, wheels.glob("*.whl")))
        command = [
            sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile",
            "--disable-pip-version-check", "--quiet", "--target", str(site), *files,
        ]  # fmt: skip
        why = "" if files else f"there is no wheel in {wheels}"
        if files:
            try:
                with (self.out / LOG).open("ab") as log:
                    subprocess.run(
                        command, stdout=log, stderr=log, check=True,
                        timeout=WHEELS_S * self._scale,
                    )  # fmt: skip
            except subprocess.SubprocessError as error:
                why = f"{error}: see {LOG}"
        os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{site}"
        return {
            "status": FAILED if why else OK, "why": why, "seconds": time.monotonic() - started,
            "parts": [{"name": Path(file).name, "status": OK} for file in files],
        }  # fmt: skip

    def _record(self, name: str, record: dict[str, Any]) -> None:
        self.records[name] = record
        if record["status"] != RUNNING:
            print(f"{name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
        self._write(complete=False)

    def _write(self, *, complete: bool) -> None:
        content = {
            "complete": complete, "toy": self.toy, "seconds": time.monotonic() - self._began,
            "steps": self.records,
        }  # fmt: skip
        write_atomic(self.out / SUMMARY, json.dumps(content, indent=1) + "\n")
        write_atomic(self.out / TABLE, as_text(self.records) + "\n")


def _lines(reader: int, deadline: float) -> Any:
    """Whole lines of a pipe, until its other end is closed.

    Raises:
        TimeoutError: the deadline (of `time.monotonic`) has passed.
    """
    rest = b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        data = os.read(reader, 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def _end_with_parent() -> None:
    """In a new process: it is killed if this one is (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a step, with the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _conclusion(check: Check) -> str:
    of_status: dict[str, list[str]] = {}
    for name, record in check.records.items():
        of_status.setdefault(record["status"], []).append(name)
    bad = [*of_status.get(FAILED, ()), *of_status.get(TIMED_OUT, ())]
    said = [f"not right: {', '.join(bad)}" if bad else "nothing failed"]
    if skipped := of_status.get(SKIPPED):
        said.append(f"skipped: {', '.join(skipped)}")
    if check.toy:
        said.append("a toy, whose times say nothing of GPUs")
    return "; ".join(said)


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(prog="check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="install all wheels of this folder, offline")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="of the results")
    parser.add_argument("--minutes", type=float, help=f"{MINUTES:g} in all; a toy's are 40")
    parser.add_argument("--toy", action="store_true", help="without a GPU: small, with stand-ins")
    names = [step.name for step in steps]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="only these")
    args = parser.parse_args(argv)
    minutes = args.minutes or (40.0 if args.toy else MINUTES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # found once, for all steps
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        chosen = [step for step in steps if step.name in args.steps]
        check = Check(chosen, args.out.absolute(), Path(work), minutes, toy=args.toy)
        code = check.run(args.wheels)
    print(f"\n{as_text(check.records)}\n\n{_conclusion(check)}; {check.out / SUMMARY}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
