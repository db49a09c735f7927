"""How a rank finds its place: torchrun's, Slurm's and MPI's variables."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import launchers
from launchers import mpi, slurm, torchrun
from launchers.environment import own_code
from launchers.place import ATTEMPT, join
from megatron_hybrid import cli
from megatron_hybrid.errors import UserError

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_RESTART_COUNT": "1", "SLURM_CPUS_PER_TASK": "12",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("a[08-10],b,c[1,3-4]", ["a08", "a09", "a10", "b", "c1", "c3", "c4"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("gpu-[1-2].site", ["gpu-1.site", "gpu-2.site"]),
    ],
)
def test_lists_of_hosts(text: str, names: list[str]) -> None:
    """As `scontrol show hostnames` reads them."""
    assert slurm.hostnames(text) == names


def test_tasks_per_node() -> None:
    """Slurm's short form, and what is none."""
    assert slurm.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="is not like"):
        slurm.tasks_per_node("2(x)")


def may_use(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)))


def test_a_task_of_a_step_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static places: nothing is agreed on over the network; threads as Slurm gives them."""
    may_use(monkeypatch, 24)
    environment = dict(STEP)
    place = join(environment)
    assert place is not None and not place.own_console
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1",
    }  # fmt: skip
    assert environment["MASTER_ADDR"] == "gpu08"
    assert environment["MASTER_PORT"] == str(slurm.default_port(4711, 3))
    assert environment["OMP_NUM_THREADS"] == "12"
    assert environment[ATTEMPT] == place.attempt == "4711.1.3"
    given = STEP | {"MASTER_ADDR": "ib-gpu08", "MASTER_PORT": "29400", "OMP_NUM_THREADS": "1"}
    join(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("ib-gpu08", "29400")
    assert given["OMP_NUM_THREADS"] == "1"


def test_no_more_threads_than_cpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An srun that was not told --cpus-per-task gives a task one CPU, though the environment has
    the job's number; rank 0 says so.
    """
    may_use(monkeypatch, 1)
    for rank in ("0", "5"):
        environment = STEP | {"SLURM_PROCID": rank}
        join(environment)
        assert environment["OMP_NUM_THREADS"] == "1"
    assert capsys.readouterr().err == (
        "warning: SLURM_CPUS_PER_TASK=12, and rank 0 may use 1 CPUs: start the ranks with "
        "srun --cpus-per-task=12\n"
    )


def test_a_task_of_an_array_names_itself() -> None:
    """The last one's SLURM_JOB_ID is the array's: two tasks never have one name."""
    last = STEP | {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"}
    other = last | {"SLURM_JOB_ID": "4713", "SLURM_ARRAY_TASK_ID": "1"}
    assert [slurm.job_name(each) for each in (STEP, last, other)] == ["4711", "4711_2", "4711_1"]
    assert slurm.attempt(last) == "4711_2.1.3"
    assert slurm.start_name(last) == "4711_2.1"
    assert slurm.job_name({"SLURM_ARRAY_TASK_ID": "2"}) is None  # an array's script, by hand
    assert slurm.job_name({}) is None and slurm.start_name({}) is None


def test_one_task_is_alone() -> None:
    """A step of one task, and a batch script itself, are no ranks."""
    environment = STEP | {"SLURM_STEP_NUM_TASKS": "1"}
    assert join(environment) is None
    assert "RANK" not in environment and environment[ATTEMPT] == "4711.1.3"
    assert join({"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


def test_a_step_that_does_not_tell_is_refused() -> None:
    """One message with what is missing, before any work."""
    environment = {name: value for name, value in STEP.items() if name != "SLURM_LOCALID"}
    with pytest.raises(UserError, match=r"KeyError\('SLURM_LOCALID'\)"):
        join(environment)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"RANK": "0"}, "RANK is set, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment must be a whole number"),
    ],
)
def test_torchs_variables(more: dict[str, str], problem: str) -> None:
    """Half of them, or nonsense, is an error and not a run of its own."""
    address = {"MASTER_ADDR": "here", "MASTER_PORT": "1"} if "WORLD_SIZE" in more else {}
    with pytest.raises(UserError, match=problem):
        join(address | more)


def test_srun_with_pmi_is_srun() -> None:
    """`srun --mpi=pmi2` sets MPI's variables too; MPI's own proxies in a step are MPI."""
    assert not mpi.started(STEP | {"PMI_SIZE": "6"})
    assert mpi.started(STEP | {"PMI_SIZE": "12"})
    assert mpi.started({"OMPI_COMM_WORLD_SIZE": "4"})
    assert not mpi.started({"PMI_SIZE": "1"})


def test_torchrun_goes_first() -> None:
    """One torchrun a node, started by srun: its ranks are torchrun's."""
    environment = STEP | {
        "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1",
        "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    }  # fmt: skip
    assert torchrun.started(environment)
    place = join(environment)
    assert place is not None
    assert (place.launcher, place.rank, place.node_rank) == ("torchrun", 3, 1)
    assert place.own_console


# Every variable that a launcher's module reads as a number, and what makes it read them.
STARTS: list[dict[str, str]] = [
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1",
     "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"},
    STEP | {"MASTER_PORT": "29400"},
    {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"},
]  # fmt: skip


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "1e3", "²", " ", "9" * 5000, "99999999999"])
def test_a_number_that_is_none_is_refused_by_name(text: str) -> None:
    """Whatever somebody has exported: one message that names the variable, or it is not read."""
    refused = set()
    for environment in STARTS:
        for name in environment:
            try:
                join(environment | {name: text})
            except UserError as error:
                assert len(str(error)) < 400
                assert name in str(error)
                refused.add(name)
    numbers = {name for environment in STARTS for name in environment} - {
        "MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_RESTART_COUNT",
        "SLURM_JOB_ID", "SLURM_STEP_ID",  # of any size: of what is theirs only a port is made
    }  # fmt: skip
    assert numbers <= refused


@pytest.mark.parametrize("start", STARTS[:2], ids=["torchrun", "slurm"])
def test_a_port_that_no_machine_has(start: dict[str, str]) -> None:
    """It would be told of by a socket, on every rank, after the wait for the others."""
    with pytest.raises(UserError, match=r"MASTER_PORT='65536' .* from 0 to 65535"):
        join(start | {"MASTER_PORT": "65536"})


def test_all_numbers_are_read_in_one_place() -> None:
    """No module of the launchers takes a variable for a number by itself; Slurm's places are
    refused together.
    """
    folder = Path(launchers.__file__).parent
    found = {
        (path.name, line.strip())
        for path in folder.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bint\(.*environ", line)
    }
    assert {name for name, _ in found} <= {"slurm.py", "errors.py"}


@pytest.mark.parametrize("size", ["x", "0", "-1", "9" * 5000])
def test_a_world_size_to_check_a_config_for(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone in the environment it is the number of ranks, which is one or more."""
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr("sys.argv", ["megatron-hybrid", "pretrain", "tiny", "--dry-run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "WORLD_SIZE" in capsys.readouterr().err


def test_processes_run_the_code_of_the_one_that_starts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another source tree is the current folder; elsewhere Python finds it as we did."""
    tree = Path(launchers.__file__).parents[1]
    for folder in (tmp_path, tree):
        monkeypatch.chdir(folder)
        assert own_code({"PYTHONPATH": "more"}) == {}
    (tmp_path / "megatron_hybrid").mkdir()
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers" / "__init__.py").write_text("raise SystemExit('another')")
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-m", "launchers.no_such"]
    environment = os.environ | own_code({"PYTHONPATH": "more"})
    assert environment["PYTHONPATH"] == f"{tree}{os.pathsep}more"
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert "No module named launchers.no_such" in done.stderr
