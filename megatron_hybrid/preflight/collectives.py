"""A collective of each kind on each group of the layout: whether it is right, and how fast."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hybrid.preflight.checks import Check

NUMBERS = 1 << 20  # fp32, of each rank: 4 MiB
ROUNDS = 3


@dataclass(frozen=True)
class Outcome:
    """Of one collective on one group: GB/s of a rank's own data, or what went wrong."""

    group: str
    kind: str
    gb_per_s: float = 0.0
    problem: str = ""


def groups() -> dict[str, dist.ProcessGroup]:
    """The layout's groups of this rank that have more than one member."""
    found = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "world": dist.group.WORLD,
    }
    return {
        name: group for name, group in found.items() if group and dist.get_world_size(group) > 1
    }


def run_all(device: torch.device) -> list[Outcome]:
    """Every kind on every group. All ranks call it together."""
    outcomes = []
    for name, group in groups().items():
        for kind, collective in _KINDS.items():
            outcomes.append(_run(name, kind, collective, group, device))
    return outcomes


def _run(
    name: str,
    kind: str,
    collective: Callable[[Tensor, dist.ProcessGroup], bool],
    group: dist.ProcessGroup,
    device: torch.device,
) -> Outcome:
    own = torch.full((NUMBERS,), float(dist.get_rank(group) + 1), device=device)
    try:
        right = collective(own.clone(), group)  # the first time connects
        started = time.perf_counter()
        for _ in range(ROUNDS):
            right = collective(own.clone(), group) and right
        seconds = (time.perf_counter() - started) / ROUNDS
    except (RuntimeError, ValueError) as error:
        return Outcome(name, kind, problem=str(error).splitlines()[0][:200])
    problem = "" if right else "the result is wrong"
    return Outcome(name, kind, own.numel() * own.element_size() / seconds / 1e9, problem)


def _all_reduce(value: Tensor, group: dist.ProcessGroup) -> bool:
    size = dist.get_world_size(group)
    dist.all_reduce(value, group=group)
    return bool((value == size * (size + 1) / 2).all())


def _expected(group: dist.ProcessGroup, each: int, device: torch.device) -> Tensor:
    ranks = torch.arange(1, dist.get_world_size(group) + 1, device=device, dtype=torch.float32)
    return ranks.repeat_interleave(each)


def _all_gather(value: Tensor, group: dist.ProcessGroup) -> bool:
    size = dist.get_world_size(group)
    gathered = torch.empty(size * value.numel(), device=value.device)
    dist.all_gather_into_tensor(gathered, value, group=group)
    return torch.equal(gathered, _expected(group, value.numel(), value.device))


def _reduce_scatter(value: Tensor, group: dist.ProcessGroup) -> bool:
    size = dist.get_world_size(group)
    share = value.numel() // size
    own = torch.empty(share, device=value.device)
    dist.reduce_scatter_tensor(own, value[: share * size], group=group)
    return bool((own == size * (size + 1) / 2).all())


def _broadcast(value: Tensor, group: dist.ProcessGroup) -> bool:
    dist.broadcast(value, src=dist.get_process_group_ranks(group)[0], group=group)
    return bool((value == 1).all())


def _all_to_all(value: Tensor, group: dist.ProcessGroup) -> bool:
    share = value.numel() // dist.get_world_size(group)
    sent = value[: share * dist.get_world_size(group)]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.equal(received, _expected(group, share, value.device))


def _ring(value: Tensor, group: dist.ProcessGroup) -> bool:
    """Each rank sends to the next one and receives from the one before."""
    ranks, place = dist.get_process_group_ranks(group), dist.get_rank(group)
    received = torch.empty_like(value)
    operations = [
        dist.P2POp(dist.isend, value, ranks[(place + 1) % len(ranks)], group),
        dist.P2POp(dist.irecv, received, ranks[place - 1], group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return bool((received == (place - 1) % len(ranks) + 1).all())


_KINDS: dict[str, Callable[[Tensor, dist.ProcessGroup], bool]] = {
    "all-reduce": _all_reduce, "all-gather": _all_gather, "reduce-scatter": _reduce_scatter,
    "broadcast": _broadcast, "all-to-all": _all_to_all, "send and receive": _ring,
}  # fmt: skip


def checks(outcomes: list[list[Outcome]], hosts: list[str]) -> list[Check]:
    """A check for each group: its slowest rank's bandwidths, and what went wrong where.

    Args:
        outcomes: of each rank.
        hosts: of each rank.
    """
    found = []
    names = dict.fromkeys(each.group for of_rank in outcomes for each in of_rank)
    for name in names:
        slowest: dict[str, float] = {}
        problems = []
        for rank, of_rank in enumerate(outcomes):
            for each in of_rank:
                if each.group == name:
                    slowest[each.kind] = min(slowest.get(each.kind, each.gb_per_s), each.gb_per_s)
                    if each.problem:
                        problems.append(
                            f"{each.kind} in the {name} group fails on rank {rank} "
                            f"({hosts[rank]}): {each.problem}"
                        )
        speeds = ", ".join(f"{kind} {speed:.2f}" for kind, speed in slowest.items())
        found.append(Check(f"{name} group", f"GB/s: {speeds}", tuple(problems)))
    return found
