"""A step that is not finite, start after start: the rank whose doing it is gets found.

The faults are planted in one rank's model, where a device that computes wrongly would have them.
"""

import math
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_hybrid.errors import UserError
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.attempts import ATTEMPTS_FILE, append, read_attempts
from megatron_hybrid.training.findings import Finding, acquit, diagnose
from tests.training.runs import (
    losses,
    records,
    same_tensors,
    tensors_of_all,
    trainer,
    words,
)

STEP = 3


class Start(NamedTuple):
    """One start of a run: on which node, and what is wrong there.

    Attributes:
        fault: "layer" (its output is NaN), "gradient" (Inf) or "" (all is well).
        times: how often in this start it happens, at most.
    """

    node: str
    fault: str = ""
    times: int = 1000


def plant(run: Any, start: Start, rank: int, layer: int) -> None:
    """On a rank: the fault, in step STEP and only on `rank`."""
    left = start.times

    def happens() -> bool:
        nonlocal left
        if run.progress.iteration + 1 != STEP or left == 0:
            return False
        left -= 1
        return True

    def on_output(module: Any, inputs: Any, output: Any) -> Any:
        if module.layer_number != layer or not happens():
            return output
        return output * math.nan if torch.is_tensor(output) else (output[0] * math.nan, *output[1:])

    if torch.distributed.get_rank() != rank or not start.fault:
        return
    if start.fault == "gradient":
        weight = next(run.model[0].parameters())
        weight.register_hook(lambda grad: grad * math.inf if happens() else grad)
        return
    for module in run.model[0].modules():
        if hasattr(module, "layer_number") and type(module).__name__.endswith("Layer"):
            module.register_forward_hook(on_output)


def starts(line: list[str], all_starts: list[Start], rank: int, layer: int = 2) -> list[str]:
    """On a rank: how each start of the same run ends: its reason, or "label: error"."""
    found, gethostname = [], socket.gethostname
    for start in all_starts:
        socket.gethostname = lambda node=start.node: node  # type: ignore[misc]
        try:
            with trainer(line) as run:
                plant(run, start, rank, layer)
                found.append(run.run())
        except UserError as error:
            found.append(f"{error.label}: {error}")
        finally:
            socket.gethostname = gethostname
    return found


def saving(run_dir: Path, *more: str) -> list[str]:
    return words(run_dir, "checkpoint.save_interval=1", *more)


def final_state(*run_dirs: Path) -> list[dict[str, torch.Tensor]]:
    folders = [run_dir / "checkpoints" / "iter_0000004" for run_dir in run_dirs]
    return run_distributed(tensors_of_all, 1, folders)[0]


def test_a_device_that_computes_wrongly(tmp_path: Path) -> None:
    """Seen on the rank where it is, the same when run again; finite elsewhere, with the same bits.

    The first start says only that the step is not finite, the second names rank, node and layer,
    the third, on another node, goes on and names the node that was wrong. Looking at layers, loss
    and gradients changes no bit of the result.
    """
    sick, well = tmp_path / "sick", tmp_path / "well"
    bad = Start("node1", "layer")
    found = run_distributed(starts, 2, saving(sick), [bad, bad, Start("node2")], rank=1)
    assert found[0] == found[1]
    first, second, third = found[0]
    head = f"unsound: step {STEP}: the loss or the gradient is not finite"
    assert first.startswith(head)
    assert "rank" not in first
    assert second.startswith(head)
    assert "first not finite: the output of layer 2 (*), on rank 1 (node1). " in second
    assert "so again when the step was run again in place" in second
    assert third == "finished"
    events = [r for r in records(sick, "event") if r["name"] == "watched"]
    assert [event["message"] for event in events] == [
        f"step {STEP}: finite on other hardware. It was not, twice over, on node1: that computes "
        "wrongly"
    ]
    run_distributed(starts, 2, saving(well), [Start("node1")], rank=1)
    assert losses(sick)[-2:] == losses(well)[-2:]
    assert same_tensors(*final_state(sick, well))


def test_the_run_itself(tmp_path: Path) -> None:
    """The same on two nodes is the run's own doing: an error that no restart would mend."""
    lines = [Start(node, "layer") for node in ("node1", "node1", "node2")]
    *_, last = run_distributed(starts, 2, saving(tmp_path), lines, rank=0)[0]
    assert last.startswith(f"error: step {STEP}: ")
    assert "So it was on other hardware (node1): it is the run's own doing." in last


def test_a_passing_error(tmp_path: Path) -> None:
    """What is finite when the step is run again is called so, also where it hit a gradient only."""
    once = Start("node1", "gradient", times=1)
    found = run_distributed(starts, 2, saving(tmp_path), [once, once, Start("node1")], rank=1)
    assert found[0] == found[1]
    _, second, third = found[0]
    assert "first not finite: the gradients, on rank 1 (node1). " in second
    assert "Run again in place, it was finite" in second
    assert third == "finished"
    [event] = [r for r in records(tmp_path, "event") if r["name"] == "watched"]
    assert event["message"].startswith(f"step {STEP}: finite this time")
    kinds = [event["event"] for event in read_attempts(tmp_path)]
    assert kinds.count("unsound") == 2


def test_steps_that_are_passed_over(tmp_path: Path) -> None:
    """A run that is told to skip such steps does so, also where one stopped it before."""
    append(tmp_path / ATTEMPTS_FILE, {"event": "unsound", "iteration": STEP + 1, "found": []})
    skipping = saving(tmp_path, "training.nonfinite_action=skip")
    bad = Start("node1", "layer")
    assert run_distributed(starts, 2, skipping, [bad], rank=1)[0] == ["finished"]
    assert [step["skipped"] for step in records(tmp_path)] == [False, False, True, False]


def test_stages_and_tensor_parallel_ranks(tmp_path: Path) -> None:
    """TP2 x PP2 x VPP2: all ranks come to see a NaN; the one that had it first is named alone."""
    line = saving(
        tmp_path, "model.hybrid_layer_pattern=M*-M|-M*-",
        "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
        "model.num_query_groups=2",
    )  # fmt: skip
    bad = Start("node1", "layer")
    found = run_distributed(starts, 4, line, [bad, bad], rank=1, layer=3)
    assert len({tuple(each) for each in found}) == 1
    assert "the output of layer 3 (-), on rank 1 (node1). " in found[0][1]
    [_, event] = [e for e in read_attempts(tmp_path) if e["event"] == "unsound"]
    assert {finding["rank"] for finding in event["found"]} == {0, 1, 2, 3}


def finding(rank: int, host: str, order: tuple[int, int], *, again: bool) -> Finding:
    return Finding(rank, host, 3, order, f"value {order}", again)


def test_what_findings_say() -> None:
    """Only a repeated wrong number of the same rank, on other hardware, clears the hardware."""
    early, late = finding(5, "a", (0, 7), again=True), finding(2, "b", (1, 0), again=True)
    said = diagnose([late, early], [])
    assert "value (0, 7), on rank 5 (a, GPU 3)" in said.text
    assert not said.final
    same_place, passing = early, finding(5, "c", (0, 7), again=False)
    other_rank, other_place = (
        finding(6, "c", (0, 7), again=True),
        finding(5, "c", (0, 7), again=True),
    )
    assert not diagnose([early], [[same_place], [passing], [other_rank]]).final
    assert diagnose([early], [[same_place], [other_place]]).final
    assert "computes wrongly" in acquit({5: ("z", 0)}, [[], [early, late]])
    assert "has passed" in acquit({5: ("a", 3)}, [[], [early, late]])
    assert "has passed" in acquit({5: ("z", 0)}, [[passing]])
