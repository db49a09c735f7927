"""Where the ranks of a run that has stopped moving are: which of them the others wait for."""

import linecache
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

# Of frames between a collective and its caller.
_BETWEEN = ("c10d_logger.py", "contextlib.py", "typing_extensions.py")


@dataclass(frozen=True)
class Report:
    """Where a rank is.

    Attributes:
        collective: that it waits in, such as "all_reduce"; None: it is elsewhere.
        ranks: that take part in it; empty: unknown.
        place: file, line and function of the caller, or of what runs.
    """

    rank: int
    host: str
    iteration: int
    collective: str | None
    ranks: tuple[int, ...]
    place: str


def locate(frame: FrameType | None, rank: int, iteration: int) -> Report:
    """Where a thread is: the collective nearest to its innermost frame, and who called that."""
    collective: str | None = None
    ranks: tuple[int, ...] = ()
    caller = frame
    inner = frame
    while inner is not None:
        name = Path(inner.f_code.co_filename).name
        if name == "distributed_c10d.py":
            # Such as all_reduce, _all_gather_base, and _coalescing_manager around several.
            collective, ranks = inner.f_code.co_name.strip("_"), _ranks(inner.f_locals.get("group"))
            caller = inner.f_back
        elif collective is not None and name not in _BETWEEN:
            caller = inner
            break
        elif collective is None and _waits(inner):
            collective, caller = "the end of an asynchronous collective", inner
            break
        inner = inner.f_back
    return Report(rank, socket.gethostname(), iteration, collective, ranks, _place(caller))


def _ranks(group: Any) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    except (ValueError, KeyError, RuntimeError):
        return ()


def _waits(frame: FrameType) -> bool:
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return ".wait()" in line and "torch" not in Path(frame.f_code.co_filename).parts


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "nowhere"
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"


def explain(reports: Mapping[int, Report], world_size: int, timeout_s: float, folder: Path) -> str:
    """Which ranks did not arrive where the others wait, in a few lines."""
    silent = [rank for rank in range(world_size) if rank not in reports]
    elsewhere = [report for report in reports.values() if report.collective is None]
    lines = [f"hang: nothing has moved for {timeout_s:g} s, "
             f"after step {max(report.iteration for report in reports.values())}"]  # fmt: skip
    if silent:
        lines.append(
            f"rank {_listed(silent)} did not arrive, and does not answer: stopped, swapping, or "
            "its node is gone"
        )
    for report in elsewhere:
        lines.append(f"rank {report.rank} on {report.host} did not arrive: it is in {report.place}")
    waiting: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for report in reports.values():
        if report.collective is not None:
            key = (report.collective, report.ranks, report.place)
            waiting.setdefault(key, []).append(report.rank)
    for (collective, ranks, place), who in sorted(waiting.items(), key=lambda item: item[1]):
        of = f" of ranks {_listed(list(ranks))}" if ranks else ""
        lines.append(f"rank {_listed(who)} waits in {collective}{of}, called by {place}")
    lines.append(f"stacks of all threads: {folder}/stacks_rank_*.txt")
    return "\n".join(lines)


def _listed(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
