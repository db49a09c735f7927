"""Where a rank stands among the others, whoever started it: torchrun, Slurm's srun or MPI.

Each of `torchrun.py`, `slurm.py` and `mpi.py` knows the variables of its own launcher and gives a
`Place`; from then on a rank has torch's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...)
in its environment, and nobody asks again who set them.
"""

import os
import socket
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from launchers.environment import whole_number
from megatron_hybrid.human import say

LOGS = "logs"  # in the folder of a run
ATTEMPT = "MEGATRON_HYBRID_ATTEMPT"


@dataclass(frozen=True)
class Place:
    """One rank of a job.

    Attributes:
        launcher: "torchrun", "slurm" or "mpi".
        rank, world_size: among all ranks.
        local_rank, local_world_size: among those of this node.
        node_rank: of this node.
        master_addr, master_port: where rank 0 listens.
        attempt: names this start of the job: the same on all ranks, another after a requeue.
        own_console: whether something keeps the output of the ranks apart already.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    master_addr: str
    master_port: int
    attempt: str
    own_console: bool = False

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Set what torch.distributed and torch's kernels read; threads unless they are set.

        There are no more threads than CPUs that this process may use, whatever Slurm says.
        """
        environment.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            GROUP_RANK=str(self.node_rank),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )
        environment[ATTEMPT] = self.attempt
        usable = len(os.sched_getaffinity(0))
        told = whole_number(environment, "SLURM_CPUS_PER_TASK", 0)
        cores = min(told, usable) if told else usable // self.local_world_size
        if told > usable and self.rank == 0:
            # Since 22.05 srun does not take it from the job, whose variable is there all the same.
            say(
                f"warning: SLURM_CPUS_PER_TASK={told}, and rank 0 may use {usable} CPUs: "
                f"start the ranks with srun --cpus-per-task={told}",
                sys.stderr,
            )
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores)))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def log_folder(run_dir: Path) -> Path:
    """Where this start of a run keeps its ranks' output, errors and stacks."""
    return run_dir / LOGS / os.environ.get(ATTEMPT, "alone")


def join(environment: MutableMapping[str, str]) -> Place | None:
    """Find this process's place and export it; None: it was started alone.

    Raises:
        UserError: a launcher started it that leaves out what the ranks need to meet.
    """
    from launchers import mpi, slurm, torchrun

    for way in (torchrun, mpi, slurm):
        if way.started(environment):
            place = way.find_place(environment)
            place.export(environment)
            return place
    if name := slurm.attempt(environment):  # the only task of a step
        environment[ATTEMPT] = name
    return None
