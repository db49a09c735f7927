"""Fill in a batch script of `slurm/` and hand it to Slurm."""

import os
import re
import shlex
import signal as signals
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launchers.slurm_text import (
    directive,
    duration_s,
    file_pattern,
    header_length,
    notice_s,
    read_options,
)
from megatron_hybrid.errors import UserError

# At which ranks save and end.
_SAVES_AT = ("USR1", "TERM", "INT")
# What sbatch has another way to say, which `submit` must know: `--option` is not for these.
_SAID_BY = {
    "nodes": "--nodes", "ntasks": "--nodes and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node", "gpus-per-node": "--gpus-per-node", "time": "--time",
    "job-name": "--job-name", "partition": "--partition", "account": "--account",
    "array": "--array", "chdir": "the folder in which you submit", "output": "run_dir",
}  # fmt: skip
# With these sbatch queues nothing, or answers when the job has ended, or not with its id.
_ANSWERS = ("help", "quiet", "test-only", "usage", "version", "wait", "wrap")
# sbatch's variables that are not named as their options are.
_VARIABLES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE"}
EARLY_S = 60  # before the notice, Slurm may tell a job to end


class NoAnswerError(UserError):
    """Slurm did not say whether it took the job."""


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm.

    Attributes:
        gpus_per_node: 0: none are asked for.
        chain: jobs, each of which waits for the one before.
        array_size: tasks of an array; None: no array.
        output: Slurm's pattern of the file for the job's output, in `folder`.
        options: more options of sbatch, such as `--qos=high`.
    """

    nodes: int
    ranks_per_node: int
    gpus_per_node: int | None
    time_limit: str
    name: str | None = None
    partition: str | None = None
    account: str | None = None
    chain: int = 1
    array_size: int | None = None
    folder: Path | None = None
    output: str | None = None
    options: tuple[str, ...] = ()

    def sbatch_options(self) -> dict[str, str | None]:
        """Options by name; None: one that the script has and this job does not want.

        Raises:
            UserError: one of `options` is none, or says what another option says.
        """
        gpus = str(self.gpus_per_node) if self.gpus_per_node else None
        found: dict[str, str | None] = {
            "nodes": str(self.nodes),
            "ntasks": None,  # follows from the two around it
            "ntasks-per-node": str(self.ranks_per_node),
            "gpus-per-node": gpus,
            "time": self.time_limit,
            "chdir": str(Path.cwd()),  # what the config's relative paths start from
        }
        output = None if self.output is None else file_pattern(f"{self.folder}/") + self.output
        given = {
            "job-name": self.name, "partition": self.partition, "account": self.account,
            "output": output,
            "array": None if self.array_size is None else f"0-{self.array_size - 1}",
        }  # fmt: skip
        found |= {name: value for name, value in given.items() if value is not None}
        if empty := [name for name, value in found.items() if value == ""]:
            raise UserError(f"--{empty[0]}='' must have a value; allowed: a name, or no option")
        return found | self._more_options()

    def _more_options(self) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for option in self.options:
            match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", option, re.DOTALL)
            if match is None:
                raise UserError(f"--option {option!r} must be like --qos=high or --exclusive=user")
            name = match[1]
            if name in found:
                raise UserError(f"--option {option!r}: --{name} is given twice; allowed: once")
            if name in _SAID_BY:
                raise UserError(f"--option {option!r} must be said by {_SAID_BY[name]}")
            if name in _ANSWERS:
                raise UserError(f"--option {option!r}: with it sbatch does not say which job it is")
            if match[2] == "":
                raise UserError(f"--option {option!r} must have a value, or no '='")
            found[name] = match[2] or ""
        if "no-requeue" in found:
            if "requeue" in found:
                raise UserError("--option --requeue excludes --no-requeue; allowed: one of them")
            found["requeue"] = None
        if self.chain > 1 and "?" in (found.get("dependency") or ""):
            raise UserError(
                f"--option --dependency={found['dependency']} excludes --chain {self.chain}: Slurm "
                "takes no '?' beside the job that each waits for; allowed: ',' between conditions"
            )
        return found

    @property
    def comes_back(self) -> bool:
        """Whether the job is to start again where it was told to end."""
        return self.chain == 1 and "--no-requeue" not in self.options


def render(script: str, job: Job, variables: Mapping[str, str]) -> str:
    """A batch script with a job's options in its #SBATCH lines and with variables set.

    Args:
        variables: shell variables by name, set in the place of the script's own `NAME=...` lines.

    Raises:
        UserError: the script has no line for one of the variables, or one line for several options,
            or an option has a value that no script can hold.
    """
    lines = script.removesuffix("\n").split("\n")
    for name, value in job.sbatch_options().items():
        _set_option(lines, name, value)
    for name, value in variables.items():
        places = [number for number, line in enumerate(lines) if line.startswith(f"{name}=")]
        if not places:
            raise UserError(f"the batch script sets no {name}; it must have a line {name}=...")
        lines[places[0]] = f"{name}={shlex.quote(value)}"
    return "\n".join(lines) + "\n"


def _set_option(lines: list[str], name: str, value: str | None) -> None:
    """Say an option in the lines of a script once, or not at all."""
    said = [option for option in read_options(lines) if option.name == name]
    for option in said:
        if not option.alone:
            raise UserError(
                f"line {option.line + 1} of the batch script, {lines[option.line]!r}, says "
                f"--{name} and more; allowed: a line for each option"
            )
    header = range(header_length(lines))
    off = re.compile(rf"##+SBATCH --{re.escape(name)}(=.*)?")
    places = [option.line for option in said] or [n for n in header if off.fullmatch(lines[n])][:1]
    if not places:
        places = [1 + max((n for n in header if lines[n].startswith("#SBATCH")), default=0)]
        lines.insert(places[0], "")
    for place in reversed(places[1:]):
        del lines[place]
    lines[places[0] : places[0] + 1] = [] if value is None else [directive(name, value)]


def time_problems(script: str, exit_duration_in_mins: float | None) -> list[str]:
    """What a filled-in script's time limit, its notice and the run's own time exclude.

    Raises:
        UserError: it has a time limit or a notice that cannot be read.
    """
    options = {option.name: option.value for option in read_options(script.split("\n"))}
    limit = duration_s(options["time"]) if "time" in options else float("inf")
    notice = notice_s(options["signal"]) if "signal" in options else 0
    for name in ("time", "time-min"):  # Slurm may shorten a job down to the second
        least = duration_s(options[name]) if name in options else float("inf")
        if "signal" in options and least <= notice + EARLY_S:
            less = f", or a notice of less than {least - EARLY_S:.0f} s" if least > EARLY_S else ""
            return [
                f"--{name}={options[name]} is {least:.0f} s, and --signal={options['signal']} "
                f"tells the job to end {notice} s before that, or up to {EARLY_S} s earlier: at "
                "its start, again and again; allowed: a time limit of more than "
                f"{notice + EARLY_S} s{less}"
            ]
    if exit_duration_in_mins is not None and 60 * exit_duration_in_mins >= limit - notice:
        return [
            f"training.exit_duration_in_mins={exit_duration_in_mins:g} never comes: --time="
            f"{options['time']} lets "
            f"the run train for {(limit - notice) / 60:.0f} minutes at most; allowed: less, or null"
        ]
    return []


def signal_problem(script: str, signal: str) -> str | None:
    """Why a run would not save at the notice that `--option --signal=...` asks for; None: it would.

    With `B:` it goes to the batch script, else to the ranks.
    """
    target, _, name = signal.partition("@")[0].rpartition(":")
    name = name.upper().removeprefix("SIG")
    if name.isdecimal() and int(name) in set(signals.Signals):
        name = signals.Signals(int(name)).name.removeprefix("SIG")
    if "B" in target:
        traps = re.findall(r"^[^#\n]*\btrap\b.*$", script, re.MULTILINE)
        heard = any(re.search(rf"\b(SIG)?{name}\b", line.rpartition("'")[2]) for line in traps)
        who = f"the batch script has no trap for {name}"
    else:
        heard, who = name in _SAVES_AT, f"the ranks save at {', '.join(_SAVES_AT)}"
    return None if heard else f"--signal={signal} ends the run without a checkpoint: {who}"


def hang_note(script: str, hang_timeout_s: float | None) -> str | None:
    """What to say where the time limit comes before a hang is noticed; None: nothing."""
    options = {option.name: option.value for option in read_options(script.split("\n"))}
    limit = duration_s(options["time"]) if "time" in options else float("inf")
    if hang_timeout_s is None or hang_timeout_s < limit:
        return None
    return (
        f"training.hang_timeout_s={hang_timeout_s:g} is not below --time={options['time']}: a run "
        "that hangs ends at the time limit, after which Slurm does not start it again"
    )


def submit_job(script: Path, after: str | None = None) -> str:
    """Queue a script; its job id.

    Args:
        after: the job to wait for, however it ends.

    Raises:
        UserError: Slurm is not here, or refuses it; with what it says.
        NoAnswerError: it may be queued or not.
    """
    said = {
        option.name: option.value
        for option in read_options(script.read_text(encoding="utf-8").split("\n"))
    }
    words = ["sbatch", "--parsable"]
    if after is not None:
        given = said.get("dependency")
        words.append(f"--dependency=afterany:{after}" + (f",{given}" if given else ""))
    try:
        done = subprocess.run(
            [*words, script.name], cwd=script.parent, env=_environment(os.environ, list(said)),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError("sbatch is not here: submit from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(
            "sbatch did not answer for 120 s: is the controller up? squeue says whether the job "
            f"was queued all the same; it is kept in {script.parent}"
        ) from None
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _environment(environment: Mapping[str, str], said: list[str]) -> dict[str, str]:
    """Of a call of sbatch that queues what the script says.

    Without sbatch's own variables for what the script says, which would overrule it, and without
    what a job in which we are has: the new one would take it for its own.
    """
    overruling = {
        f"SBATCH_{_VARIABLES.get(name, name.replace('-', '_').upper())}" for name in said
    } | {"SBATCH_WAIT"}  # fmt: skip
    if "requeue" in said:
        overruling.add("SBATCH_NO_REQUEUE")
    inside = "SLURM_JOB_ID" in environment
    return {
        name: value
        for name, value in environment.items()
        if name not in overruling
        and not (inside and name.startswith("SLURM_") and name not in _CLIENTS)
    }


# Variables of Slurm's programs rather than of a job.
_CLIENTS = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
