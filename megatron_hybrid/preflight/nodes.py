"""The half of a preflight that the ranks do together: what differs between their nodes.

Facts travel over a TCP store before any collective is tried, so that a node that cannot take part
in one is named all the same.
"""

import json
import os
import platform as python_platform
import socket
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hybrid import __version__
from megatron_hybrid.errors import UserError
from megatron_hybrid.platform.backend import probe
from megatron_hybrid.platform.imports import MOST_SECONDS
from megatron_hybrid.preflight.checks import Check

MOST_SKEW_S = 2.0
_DRIVER = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class NodeFacts:
    """What a rank sees of its node.

    Attributes:
        versions: by name, the GPU's model among them; "-" for what is missing.
        broken: what keeps the transformer_engine backend from running there, one phrase each.
        gpus: that it can use; `local_world_size` ranks share them.
        skew_s: its clock less rank 0's; None: not asked yet.
        sees_run_dir: whether a file that rank 0 has just written is there.
    """

    rank: int
    host: str
    versions: dict[str, str]
    gpus: int
    local_world_size: int
    skew_s: float | None = None
    sees_run_dir: bool = True
    broken: tuple[str, ...] = ()


def own_facts(rank: int) -> NodeFacts:
    """Those of this process."""
    found = probe()
    versions = {name: version or "-" for name, version in found.versions.items()}
    versions["GPU"] = found.cuda_device or "-"
    versions |= {"Python": python_platform.python_version(), "megatron-hybrid": __version__}
    versions["CUDA"] = torch.version.cuda or "-"
    versions["NVIDIA driver"] = _DRIVER.read_text().strip() if _DRIVER.is_file() else "-"
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    broken = found.missing if found.cuda_device else ()  # that it lacks GPUs is told of them
    return NodeFacts(rank, socket.gethostname(), versions, gpus, local, broken=broken)


def open_store(timeout_s: float) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 opens.

    Raises:
        UserError: it cannot be opened, or reached in time.
    """
    rank, address = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(
            address, port, world_size=int(os.environ["WORLD_SIZE"]), is_master=rank == 0,
            timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        done = "open" if rank == 0 else "reach"
        raise UserError(
            f"rank {rank} on {socket.gethostname()} could not {done} {address}:{port} within "
            f"{timeout_s:g} s: the port is blocked or taken, the name resolves elsewhere, or rank "
            f"0 did not start ({reason})"
        ) from error


def exchange(store: dist.Store, run_dir: Path, timeout_s: float) -> list[NodeFacts]:
    """The facts of every rank. All ranks call it together.

    Raises:
        UserError: ranks did not answer in time; names them.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"here/{rank}", "")
    if rank == 0:
        _wait_for_all(store, "here", world_size, timeout_s)
        store.set("all here", "")
    else:
        _wait_for_first(store, "all here", timeout_s)
    # The facts tell what can be imported, which is found out by importing it.
    most_s = timeout_s + MOST_SECONDS
    store.set(f"facts/{rank}", json.dumps(asdict(own_facts(rank))))
    mark = run_dir / ".preflight"
    if rank == 0:
        _wait_for_all(store, "facts", world_size, most_s)
        run_dir.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        mark.write_text(name)
        store.set("go", json.dumps({"time": time.time(), "mark": name}))
        skew = 0.0
    else:
        _wait_for_first(store, "go", most_s)
        go = json.loads(store.get("go"))
        skew = time.time() - go["time"]
        name = go["mark"]
    sees = _sees(mark, name)
    store.set(f"seen/{rank}", json.dumps({"skew_s": skew, "sees_run_dir": sees}))
    _wait_for_all(store, "seen", world_size, timeout_s)
    if rank == 0:
        mark.unlink(missing_ok=True)
    return [
        NodeFacts(**json.loads(store.get(f"facts/{n}")) | json.loads(store.get(f"seen/{n}")))
        for n in range(world_size)
    ]


def _sees(mark: Path, name: str) -> bool:
    """Whether a file is there; network file systems take a moment."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if mark.read_text() == name:
                return True
        except OSError:
            pass
        time.sleep(0.1)
    return False


def _wait_for_all(store: dist.Store, kind: str, world_size: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    left = list(range(world_size))
    while left:
        left = [rank for rank in left if not store.check([f"{kind}/{rank}"])]
        if left and time.monotonic() > deadline:
            raise UserError(
                f"ranks {', '.join(map(str, left))} of {world_size} did not answer within "
                f"{timeout_s:g} s: they did not start, or cannot reach "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            )
        time.sleep(0.05 if left else 0)


def _wait_for_first(store: dist.Store, key: str, timeout_s: float) -> None:
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise UserError(
            f"rank 0 did not answer within {timeout_s:g} s: it ended, or waits for other ranks"
        ) from error


def compare(facts: Sequence[NodeFacts], run_dir: Path, *, needs_gpus: bool) -> list[Check]:
    """What differs between nodes, and what they lack.

    Args:
        needs_gpus: the backend is one of GPUs.
    """
    first = facts[0]
    nodes = {fact.host: fact for fact in facts}
    differences = [
        f"{host} has {name} {fact.versions[name]}, {first.host} has {version}"
        for host, fact in nodes.items()
        for name, version in first.versions.items()
        if fact.versions.get(name) != version
    ]
    needs_gpus = needs_gpus or any(fact.gpus for fact in facts)
    # Not every launcher tells how many ranks a node has; then those that are there are counted.
    seen = Counter(fact.host for fact in facts)
    ranks_on = {host: max(fact.local_world_size, seen[host]) for host, fact in nodes.items()}
    too_few = [
        f"{host} shows {fact.gpus} GPUs to {ranks_on[host]} ranks; allowed: at most one rank a GPU"
        for host, fact in nodes.items()
        if needs_gpus and fact.gpus < ranks_on[host]
    ]
    broken = [
        f"{host}: the transformer_engine backend needs {phrase}"
        for host, fact in nodes.items()
        for phrase in fact.broken
        if needs_gpus
    ]
    skewed = {f.host: f.skew_s for f in facts if f.skew_s and abs(f.skew_s) > MOST_SKEW_S}
    skews = [
        f"the clock of {host} is {skew:+.1f} s off that of {first.host}; allowed: {MOST_SKEW_S:g} s"
        for host, skew in skewed.items()
    ]
    blind = sorted({fact.host for fact in facts if not fact.sees_run_dir})
    unseen = [f"run_dir={run_dir} of {first.host} is not what {host} sees there" for host in blind]
    gpus = sorted({fact.gpus for fact in facts})
    worst = max((abs(fact.skew_s or 0.0) for fact in facts), default=0.0)
    hosts = f"{len(nodes)} nodes, {len(facts)} ranks"
    return [
        Check("versions", f"{hosts}: torch {first.versions['torch']}", tuple(differences)),
        Check("GPUs", f"{', '.join(map(str, gpus))} a node", tuple(too_few)),
        Check("kernels", "can be imported" if needs_gpus else "torch's", tuple(broken)),
        Check("clocks", f"at most {worst:.2f} s apart", tuple(skews)),
        Check("shared folder", str(run_dir), tuple(unseen)),
    ]
