"""run_distributed: results by rank, failures by name, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.testing import RankError, init_model_parallel, run_distributed
from tests.training.runs import MOE, outcomes, words
from tests.warm import python


class UnpicklableError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def describe(scale: float, *, offset: float = 0.0) -> tuple[int, int, float, int]:
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    result = total.item() * scale + offset
    return dist.get_rank(), dist.get_world_size(), result, torch.get_num_threads()


def test_results_come_in_the_order_of_the_ranks() -> None:
    """Each rank has its number, a working group, the arguments, and one thread."""
    assert run_distributed(describe, 3, 2.0, offset=1.0) == [(r, 3, 13.0, 1) for r in range(3)]


def double(tensor: torch.Tensor) -> torch.Tensor:
    dist.barrier()
    return tensor.mul_(2)


def test_tensors_are_copied_to_each_rank() -> None:
    """A rank that writes to an argument changes neither the caller's nor another rank's."""
    mine = torch.ones(3)
    results = run_distributed(double, 2, mine)
    assert [result.tolist() for result in results] == [[2.0] * 3] * 2
    assert mine.tolist() == [1.0] * 3


def surroundings() -> tuple[str | None, str, str]:
    return os.environ.get("RANKS_TEST"), os.environ["RANK"], str(Path.cwd())


def test_environment_and_folder_are_the_callers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are those of the call, not of the moment when the server of the ranks started."""
    monkeypatch.setenv("RANKS_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    assert run_distributed(surroundings, 2) == [("yes", str(r), str(tmp_path)) for r in (0, 1)]


def tensor_parallel_rank() -> tuple[int, int]:
    init_model_parallel(seed=5, tensor_model_parallel_size=2)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        drawn = torch.rand(()).item()
    return parallel_state.get_tensor_model_parallel_rank(), hash(drawn)


def test_model_parallel_groups_and_seeds() -> None:
    """init_model_parallel makes the engine's groups and seeds each tensor rank on its own."""
    (rank0, drawn0), (rank1, drawn1) = run_distributed(tensor_parallel_rank, 2)
    assert (rank0, rank1) == (0, 1)
    assert drawn0 != drawn1
    assert run_distributed(tensor_parallel_rank, 2) == [(0, drawn0), (1, drawn1)]


def chatter() -> None:
    print(f"from {dist.get_rank()}")


def test_output_of_ranks_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """What ranks print comes out of the caller, marked with the rank."""
    run_distributed(chatter, 2)
    assert capsys.readouterr().out == "[rank 0] from 0\n[rank 1] from 1\n"


def fail_on_rank_1(error: str) -> None:
    print("before it failed")
    if dist.get_rank() == 1:
        if error == "unpicklable":
            raise UnpicklableError("this", "that")
        raise ZeroDivisionError("seven")
    dist.barrier()


def test_failure_names_the_rank_and_shows_where() -> None:
    """The other rank, which fails for want of the first, is not the one named."""
    with pytest.raises(RankError, match="rank 1 of 2 failed: ZeroDivisionError: seven") as caught:
        run_distributed(fail_on_rank_1, 2, "plain")
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "in fail_on_rank_1" in str(caught.value)
    assert "[rank 1] before it failed" in str(caught.value)


def test_an_exception_that_cannot_travel_is_shown_in_words() -> None:
    """Its text and traceback arrive although the exception itself does not."""
    with pytest.raises(RankError, match="this and that") as caught:
        run_distributed(fail_on_rank_1, 2, "unpicklable")
    assert caught.value.__cause__ is None
    assert "in fail_on_rank_1" in str(caught.value)


def die_on_rank_1(signal_number: int) -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal_number)
    dist.barrier()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_death_by_signal_is_named(name: str) -> None:
    """The rank that died is named, not the one that lost its connection; a crash says where."""
    with pytest.raises(RankError, match=f"rank 1 of 2 ended by {name}") as caught:
        run_distributed(die_on_rank_1, 2, signal.Signals[name].value)
    if name == "SIGSEGV":
        assert "in die_on_rank_1" in str(caught.value)


def exit_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


def test_exit_is_not_success() -> None:
    """A rank that leaves without a result is an error."""
    with pytest.raises(RankError, match="rank 0 of 2 ended with exit status 3"):
        run_distributed(exit_on_rank_0, 2)


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_hang_is_ended_and_says_where() -> None:
    """Past the time limit the error names the rank that hangs and the line it is at.

    On a busy machine the ranks may not get as far within the limit; then with a longer one.
    """
    for timeout_s in (2, 16, 128):
        with pytest.raises(RankError, match=rf"of 2 not finished after {timeout_s} s") as caught:
            run_distributed(hang_on_rank_1, 2, timeout_s=timeout_s)
        text = str(caught.value)
        if "in hang_on_rank_1" in text and text.startswith("rank 1 of 2"):
            break
    assert text.startswith("rank 1 of 2 not finished")
    assert "in hang_on_rank_1" in text
    assert "[rank 0]" not in text


def start_a_child(folder: str, then_fail: bool) -> None:
    child = subprocess.Popen(["sleep", "600"])
    Path(folder, f"{dist.get_rank()}").write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    if then_fail:
        raise ValueError("on purpose")


def living(folder: Path, count: int) -> list[int]:
    """Which of the processes whose ids are in `folder` still run."""
    pids = [int(pid) for file in folder.iterdir() for pid in file.read_text().split()]
    assert len(pids) == count
    return [pid for pid in pids if running(pid)]


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("then_fail", [False, True])
def test_no_process_is_left(tmp_path: Path, then_fail: bool) -> None:
    """Ranks and what they started are gone when the call returns, and when it raises."""
    if then_fail:
        with pytest.raises(RankError, match="on purpose"):
            run_distributed(start_a_child, 2, str(tmp_path), then_fail)
    else:
        run_distributed(start_a_child, 2, str(tmp_path), then_fail)
    assert wait_until_gone(tmp_path, 4)


def wait_until_gone(folder: Path, count: int) -> bool:
    deadline = time.monotonic() + 10
    while living(folder, count) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not living(folder, count)


def start_and_wait(folder: str) -> None:
    start_a_child(folder, then_fail=False)
    Path(folder, f"{dist.get_rank()}.ready").touch()
    time.sleep(600)


def test_ranks_end_with_a_killed_parent(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Killing the test run, which then cannot clean up, leaves no rank behind either."""
    # Of short names: what remains is a socket, whose path has room for a hundred letters.
    pids, remains = tmp_path_factory.mktemp("pids"), tmp_path_factory.mktemp("remains")
    code = f"from {__name__} import *; run_distributed(start_and_wait, 2, {str(pids)!r})"
    parent = subprocess.Popen(
        [python(), "-c", code], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(remains)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while len(list(pids.glob("*.ready"))) < 2:
            assert parent.poll() is None, parent.stderr and parent.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    for ready in pids.glob("*.ready"):
        ready.unlink()
    assert wait_until_gone(pids, 4)


def test_world_size_is_checked() -> None:
    """A world of no ranks is refused with its value."""
    with pytest.raises(ValueError, match="world_size=0 must be at least 1"):
        run_distributed(chatter, 0)


def imported_by_runs(lines: Sequence[Sequence[str]]) -> list[str]:
    before = set(sys.modules)
    assert outcomes(lines) == ["finished"] * len(lines)
    return sorted(name for name in sys.modules if name not in before)


def test_ranks_that_train_import_nothing(tmp_path: Path) -> None:
    """What every rank needs is imported once, before the fork, of which a machine has eight."""
    more = "checkpoint.save_interval=2", "training.eval_interval=2", "training.eval_iters=1"
    lines = [words(tmp_path / "dense", *more), words(tmp_path / "moe", *MOE, *more)]
    lines += [[*lines[0], "training.train_iters=6"]]  # goes on from a checkpoint
    [found] = run_distributed(imported_by_runs, 1, lines)
    assert [name for name in found if not name.startswith("torch.profiler.")] == []
