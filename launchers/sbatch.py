"""Fill in a batch script of `slurm/` and hand it to Slurm."""

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.errors import UserError


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm.

    Attributes:
        gpus_per_node: 0: none are asked for.
        chain: jobs of the same name, of which only one runs at a time.
        array_size: tasks of an array; None: no array.
        output: Slurm's pattern of the file for the job's output.
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
    output: str | None = None
    options: tuple[str, ...] = ()

    def sbatch_options(self) -> dict[str, str | None]:
        """Options by name; None: one that the script has and this job does not want."""
        gpus = str(self.gpus_per_node) if self.gpus_per_node else None
        found: dict[str, str | None] = {
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.ranks_per_node),
            "gpus-per-node": gpus,
            "time": self.time_limit,
            "chdir": str(Path.cwd()),  # what the config's relative paths start from
        }
        given = {
            "job-name": self.name, "partition": self.partition, "account": self.account,
            "output": self.output, "dependency": "singleton" if self.chain > 1 else None,
            "array": None if self.array_size is None else f"0-{self.array_size - 1}",
        }  # fmt: skip
        found |= {name: value for name, value in given.items() if value is not None}
        for option in self.options:
            match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", option)
            if match is None:
                raise UserError(f"--option {option!r} must be like --qos=high or --exclusive=user")
            found[match[1]] = match[2] or ""
        return found


def render(script: str, job: Job, variables: Mapping[str, str]) -> str:
    """A batch script with a job's options in its #SBATCH lines and with variables set.

    Args:
        variables: shell variables by name, set in the place of the script's own `NAME=...` lines.

    Raises:
        UserError: the script has no line for one of the variables.
    """
    lines = script.splitlines()
    for name, value in job.sbatch_options().items():
        pattern = re.compile(rf"#+SBATCH --{re.escape(name)}(=.*)?$")
        places = [number for number, line in enumerate(lines) if pattern.fullmatch(line)]
        new = [] if value is None else [f"#SBATCH --{name}" + (f"={value}" if value else "")]
        if places:
            lines[places[0] : places[0] + 1] = new
        else:
            last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
            lines[last + 1 : last + 1] = new
    for name, value in variables.items():
        places = [number for number, line in enumerate(lines) if line.startswith(f"{name}=")]
        if not places:
            raise UserError(f"the batch script sets no {name}; it must have a line {name}=...")
        lines[places[0]] = f"{name}={shlex.quote(value)}"
    return "\n".join(lines) + "\n"


def submit_job(script: Path) -> str:
    """Queue a script; its job id.

    Raises:
        UserError: Slurm is not here, or refuses it; with what it says.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", script.name],
            cwd=script.parent, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError("sbatch is not here: submit from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError("sbatch did not answer for 120 s: is the controller up?") from None
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
