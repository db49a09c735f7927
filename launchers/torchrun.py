"""Ranks that torchrun started, or anything else that sets torch's own variables."""

from collections.abc import Mapping

from launchers import slurm
from launchers.environment import MOST_PORT, whole_number
from launchers.place import ATTEMPT, Place
from megatron_hybrid.errors import UserError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started(environment: Mapping[str, str]) -> bool:
    """Whether torch's variables are there (WORLD_SIZE alone is a size to check a config for)."""
    return "RANK" in environment


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that the variables tell.

    Raises:
        UserError: some are missing, or no numbers.
    """
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        raise UserError(
            f"{', '.join(n for n in _NEEDED if n in environment)} is set, and {', '.join(missing)} "
            f"is not: a rank needs {', '.join(_NEEDED)} (and LOCAL_RANK with several ranks a node)"
        )
    numbers = {}
    for name, default in {
        "RANK": None, "WORLD_SIZE": None, "MASTER_PORT": None, "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0,
    }.items():  # fmt: skip
        most = {"most": MOST_PORT} if name == "MASTER_PORT" else {}
        numbers[name] = whole_number(environment, name, default, **most)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(f"RANK={numbers['RANK']} must be below WORLD_SIZE={numbers['WORLD_SIZE']}")
    return Place(
        launcher="torchrun",
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world_size=max(1, numbers["LOCAL_WORLD_SIZE"]),
        node_rank=numbers["GROUP_RANK"],
        master_addr=environment["MASTER_ADDR"],
        master_port=numbers["MASTER_PORT"],
        attempt=environment.get(ATTEMPT) or _attempt(environment),
        own_console=True,  # torchrun has --redirects and --tee
    )


def _attempt(environment: Mapping[str, str]) -> str:
    run = environment.get("TORCHELASTIC_RUN_ID", "none")
    restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    job = slurm.job_name(environment) or environment["MASTER_PORT"]
    return f"torchrun-{job if run == 'none' else run}.{restart}"
