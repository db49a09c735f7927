"""Ranks that `mpirun` or `mpiexec` started: MPI carries rank 0's address to the others.

Then MPI is shut down, so that it neither waits at the end for a rank that failed nor holds the
network beside gloo and NCCL.
"""

import socket
import time
from collections.abc import Mapping

from launchers.environment import MOST_PORT, whole_number
from launchers.place import Place, free_port
from megatron_hybrid.errors import UserError

# How Open MPI, and MPICH and Intel MPI by PMI, say how many ranks there are.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def started(environment: Mapping[str, str]) -> bool:
    """Whether MPI started several ranks; srun, which can look like it, is not MPI."""
    sizes = [whole_number(environment, name) for name in _SIZES if name in environment]
    by_srun = whole_number(environment, "SLURM_STEP_NUM_TASKS", 0) in sizes
    return any(size > 1 for size in sizes) and not by_srun


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that MPI tells. Every rank calls it.

    Raises:
        UserError: mpi4py is missing, or was built for another MPI than the one that started us.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"MPI started this rank, and mpi4py cannot be used ({error}): "
            "pip install 'megatron-hybrid[mpi]', or use torchrun, srun or --nproc"
        ) from error
    world = MPI.COMM_WORLD
    expected = max(whole_number(environment, n) for n in _SIZES if n in environment)
    if world.size != expected:
        raise UserError(
            f"MPI started {expected} ranks, and mpi4py sees {world.size}: it belongs to another "
            "MPI than the mpirun that was called"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    # Nodes in the order of their first ranks.
    leaders = sorted(set(world.allgather(node.bcast(world.rank))))
    node_rank = leaders.index(node.bcast(world.rank))
    address = (socket.gethostname(), free_port(), f"mpi-{time.strftime('%Y%m%d-%H%M%S')}")
    host, port, attempt = world.bcast(address)
    if node.size == world.size:
        host = "127.0.0.1"  # one's own name need not resolve
    place = Place(
        launcher="mpi",
        rank=world.rank,
        world_size=world.size,
        local_rank=node.rank,
        local_world_size=node.size,
        node_rank=node_rank,
        master_addr=environment.get("MASTER_ADDR", host),
        master_port=whole_number(environment, "MASTER_PORT", port, most=MOST_PORT),
        attempt=f"{attempt}-{port}",
    )
    node.Free()
    MPI.Finalize()
    return place
