"""Ranks that `srun` started inside an allocation, one task a rank, at static places.

The nodes need nothing to agree on: the address is the step's first node, which has rank 0, and the
port follows from the numbers of job and step. `MASTER_ADDR` and `MASTER_PORT` overrule them.
"""

import re
from collections.abc import Mapping

from launchers.environment import MOST_PORT, whole_number
from launchers.place import Place
from megatron_hybrid.errors import UserError

# Below the ports that systems hand out by themselves.
_FIRST_PORT, _PORTS = 20000, 12000


def started(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a step."""
    return whole_number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that Slurm's variables tell.

    Raises:
        UserError: one of them is missing.
    """
    try:
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        node_rank = whole_number(environment, "SLURM_NODEID")
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        first_host = hostnames(environment["SLURM_STEP_NODELIST"])[0]
        place = Place(
            launcher="slurm",
            rank=whole_number(environment, "SLURM_PROCID"),
            world_size=whole_number(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=whole_number(environment, "SLURM_LOCALID"),
            local_world_size=tasks[node_rank],
            node_rank=node_rank,
            master_addr=environment.get("MASTER_ADDR", first_host),
            master_port=whole_number(
                environment, "MASTER_PORT", default_port(job, step), most=MOST_PORT
            ),
            attempt=attempt(environment),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"srun started this task, and its environment does not tell its place ({error!r}): "
            "SLURM_JOB_ID, SLURM_STEP_ID, SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, "
            "SLURM_STEP_NODELIST and SLURM_STEP_TASKS_PER_NODE must be as Slurm sets them"
        ) from error
    return place


def job_name(environment: Mapping[str, str]) -> str | None:
    """This job as Slurm's commands must be told of it, `17` or of an array `17_2`; None: no job.

    The last task of an array has the array's own id for its SLURM_JOB_ID: to name that is to name
    every task. `slurm/job.sh` takes away the variables that a job inherits from another's task.
    """
    task, array = environment.get("SLURM_ARRAY_TASK_ID"), environment.get("SLURM_ARRAY_JOB_ID")
    if task and array:  # the task alone is what one sets to try an array's script by hand
        return f"{array}_{task}"
    return environment.get("SLURM_JOB_ID")


def start_name(environment: Mapping[str, str]) -> str | None:
    """This start of a job, `JOB.RESTARTS`; None: no job."""
    job = job_name(environment)
    return None if job is None else f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}"


def attempt(environment: Mapping[str, str]) -> str:
    """The name of this start of a job's step, `JOB.RESTARTS.STEP`; empty outside of a step."""
    start = start_name(environment)
    if start is None or "SLURM_STEP_ID" not in environment:
        return ""
    return f"{start}.{environment['SLURM_STEP_ID']}"


def default_port(job: int, step: int) -> int:
    """A port that jobs, and steps of one job, that share a node do not share."""
    return _FIRST_PORT + (job * 8 + step) % _PORTS


def hostnames(text: str) -> list[str]:
    """`node[1-2,07],gpu3` -> node1, node2, node07, gpu3, as `scontrol show hostnames` has them.

    A container often has no scontrol.

    Raises:
        ValueError: the text is no list of hosts.
    """
    found: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            ends = [plain] if plain else [n for part in ranges.split(",") for n in _numbers(part)]
            names = [name + end for name in names for end in ends]
        found += names
    if not found:
        raise ValueError(f"no hosts in {text!r}")
    return found


def _numbers(text: str) -> list[str]:
    """`08-10` -> 08, 09, 10."""
    first, _, last = text.partition("-")
    return [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> 2, 2, 2, 1.

    Raises:
        ValueError: the text is not of that form.
    """
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise ValueError(f"{text!r} is not like 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found
