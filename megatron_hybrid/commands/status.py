"""`megatron-hybrid status`: how a run stands, and where its time went."""

import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_hybrid.training.run_time import RunTime


def status(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
) -> None:
    """State of a run's jobs, last step, tokens, loss, speed, and time lost by cause."""
    from rich.console import Console

    from megatron_hybrid.errors import UserError
    from megatron_hybrid.training.run_time import read_jobs, run_time

    if not run.is_dir():
        raise UserError(f"{run} is not the folder of a run")
    now = time.time()
    found = run_time(run, now)
    jobs = [str(job["job"]) for job in read_jobs(run)]
    if not found.attempts and not jobs:
        raise UserError(
            f"{run} has neither attempts.jsonl nor jobs.jsonl of its own: no run was started there"
        )
    facts = _facts(run, now, found, jobs)
    if as_json:
        lost = {span.cause: round(found.seconds(span.cause), 3) for span in found.spans}
        print(json.dumps(facts | {"seconds": lost, "goodput": round(found.goodput, 4)}, indent=1))
        return
    _print(facts, found, Console())


def _facts(run: Path, now: float, found: "RunTime", jobs: list[str]) -> dict[str, Any]:
    from megatron_hybrid.small_files import naming
    from megatron_hybrid.training.metrics import METRICS_FILE
    from megatron_hybrid.training.run_time import last_steps

    steps = last_steps(run)
    facts: dict[str, Any] = {
        "jobs": {job: _slurm_state(job) for job in jobs},
        "starts": found.attempts,
        "failures": found.failures,
        "ended": found.ended,
        "last_sign_s": None if found.last_sign is None else round(now - found.last_sign, 1),
    }
    if steps:
        with naming(run / METRICS_FILE):
            facts |= _last_step(steps)
    return facts


def _last_step(steps: list[dict[str, Any]]) -> dict[str, Any]:
    last = steps[-1]
    tokens = sum(s["tokens_per_s"] * s["step_ms"] for s in steps)
    return {
        "step": last["iteration"],
        "tokens": int(last["consumed_tokens"]),
        "loss": None if last["loss"] is None else float(last["loss"]),
        "tokens_per_s": round(tokens / sum(s["step_ms"] for s in steps), 1),
        "eta_s": last["eta_s"],
    }


def _slurm_state(job: str) -> str:
    """What Slurm says of a job; "unknown" where there is no Slurm or it has forgotten it."""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no answer from squeue)"
    lines = done.stdout.split("\n")
    return (
        lines[0].removesuffix(" None").strip() if done.returncode == 0 and lines[0] else "unknown"
    )


def _print(facts: dict[str, Any], found: "RunTime", console: "Console") -> None:
    from rich.table import Table

    from megatron_hybrid.human import human_count, human_duration
    from megatron_hybrid.training.run_time import CAUSES

    def line(name: str, text: str) -> None:
        console.print(f"{name:10}{text}", highlight=False, markup=False, soft_wrap=True)

    for job, state in facts["jobs"].items():
        line("job", f"{job}: {state}")
    line("starts", f"{facts['starts']}, {facts['failures']} of them ended by an error")
    line("ended", facts["ended"] or "no")
    if "step" in facts:
        loss = "not finite" if facts["loss"] is None else f"{facts['loss']:.4f}"
        parts = (
            f"{facts['step']:,}", f"tokens {human_count(facts['tokens'])}", f"loss {loss}",
            f"{human_count(facts['tokens_per_s'])} tokens/s",
        )  # fmt: skip
        line("step", " | ".join(parts))
    if facts["last_sign_s"] is not None:
        line("seen", f"{human_duration(facts['last_sign_s'])} ago")
    table = Table("time", "share", "what it went for", title=None)
    for cause, meaning in CAUSES.items():
        seconds = found.seconds(cause)
        if seconds:
            table.add_row(
                human_duration(seconds), f"{seconds / found.total:.1%}", f"{cause}: {meaning}"
            )
    console.print(table)
    line("goodput", f"{found.goodput:.1%} of {human_duration(found.total)}")
