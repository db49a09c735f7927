"""What is submitted, up to the call of sbatch; tests/slurm goes on from there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.sbatch import Job
from launchers.slurm_text import read_options
from megatron_hybrid.errors import UserError
from megatron_hybrid.submission import Prepared, combinations, not_kept, prepare
from tests.training.runs import words

SCRIPT = Path(__file__).parents[1] / "slurm" / "pretrain.sbatch"
JOB = Job(nodes=1, ranks_per_node=1, gpus_per_node=None, time_limit="04:00:00")


def prepared(run_dir: Path, *more: str, job: Job = JOB, array: tuple[str, ...] = ()) -> Prepared:
    return prepare([*words(run_dir, "backend=torch"), *more], job, array, SCRIPT)


def test_a_refused_job_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its folder nor those above it that were made for it; what was there stays."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "old" / "jobs").mkdir(parents=True)
    for run_dir in (tmp_path / "new" / "my run", tmp_path / "old"):
        with pytest.raises(UserError, match="sbatch is not here"):
            list(prepared(run_dir).queue())
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "old", tmp_path / "old" / "jobs"]


@pytest.mark.parametrize(
    ("name", "more", "job", "problem"),
    [
        (
            "run",
            (),
            {"time_limit": "00:03:00"},
            "--time=00:03:00 is 180 s, and --signal=B:USR1@300",
        ),
        ("run", (), {"time_limit": "3h"}, "--time=3h is no time limit"),
        ("run", (), {"options": ("--comment=a\nb",)}, r"allowed: text without '\\n'"),
        ("run", (), {"options": ("--time=1",)}, "must be said by --time"),
        ("run", (), {"options": ("--signal=B:USR1@14400",)}, "a notice of less than 14340 s"),
        ("a\nb", (), {}, r"allowed: text without '\\n'"),
        ("a\\b", (), {}, "a backslash there means something else"),
        ("a:b", (), {}, "PYTHONPATH parts folders at ':'"),
        ("run", (), {"options": ("--signal=B:USR2@300",)}, "has no trap for USR2"),
        ("run", ("training.exit_duration_in_mins=240",), {}, "exit_duration_in_mins=240 never"),
    ],
)
def test_what_excludes_itself_is_refused_before_anything(
    name: str, more: tuple[str, ...], job: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    """The settings of job and run against each other, and what no script can say."""
    with pytest.raises(UserError, match=problem):
        prepared(tmp_path / name, *more, job=replace(JOB, **job))
    assert not list(tmp_path.iterdir())


def test_code_that_is_not_kept(tmp_path: Path) -> None:
    """A class of one's own may be another one when the run starts again."""
    own = "tests.objectives.own"
    line = [f"training.objective={own}:NextByHidden",
            "training.callbacks=['tests.training.own_callbacks:Seen']"]  # fmt: skip
    [config] = prepared(tmp_path / "run", *line).configs
    told = not_kept(config)
    assert [note.partition(" is not kept")[0] for note in told] == [
        f"{own}:NextByHidden", "tests.training.own_callbacks:Seen",
    ]  # fmt: skip
    assert told[0].endswith("/tests/objectives/own.py, as it is then")
    [ours] = prepared(tmp_path / "run").configs
    assert not_kept(ours) == []


def test_what_is_said_of_a_config(tmp_path: Path) -> None:
    """As by preflight and pretrain, and of every run of an array."""
    more = ["checkpoint.keep_last=2", "optimizer.min_lr=1e-5"]
    made = prepared(tmp_path / "run", *more, array=("training.eval_iters=2,3",))
    assert [note.partition(" has")[0] for note in made.notes if "has no effect" in note] == [
        "training.eval_iters=2", "optimizer.min_lr=1e-05", "training.eval_iters=3",
    ]  # fmt: skip


def test_every_problem_of_a_config_at_once(tmp_path: Path) -> None:
    """Of fields and of rules, though the backend is asked for before the rules are applied."""
    more = ["optimizer.lr=null", "training.train_iters=null", "training.objective=sfft"]
    for array in ((), ("training.seed=1,2",)):
        with pytest.raises(UserError, match="this run would fail:") as told:
            prepared(tmp_path / "run", *more, array=array)
        for problem in ("optimizer.lr", "the length of the run is not set", "objective=sfft is"):
            assert problem in str(told.value)


def test_what_gpus_cannot_run_is_refused_for_a_job_that_asks_for_them(tmp_path: Path) -> None:
    """Not in the first minute of the job; without GPUs the same run is one for the CPU."""
    more = ("parallel.context_parallel_size=2", "data.packed_documents=true", "backend=auto")
    job = replace(JOB, ranks_per_node=2, gpus_per_node=0)
    assert prepared(tmp_path / "cpu", *more, job=job).job.gpus_per_node == 0
    with pytest.raises(UserError, match="packed_documents=true is not supported on GPUs"):
        prepared(tmp_path / "gpu", *more, job=replace(job, gpus_per_node=2))


def test_each_run_of_an_array_is_the_one_that_was_checked(tmp_path: Path) -> None:
    """Its config is kept whole: what follows from a value follows from its own."""
    made = prepared(tmp_path / "sweep", array=("model.hidden_size=32,64", "training.seed=1"))
    assert [config.model.ffn_hidden_size for config in made.configs] == [128, 256]
    names = ["hidden_size=32,seed=1", "hidden_size=64,seed=1"]
    assert [config.run_dir for config in made.configs] == [tmp_path / "sweep" / n for n in names]
    options = {option.name: option.value for option in read_options(made.text.split("\n"))}
    assert options["array"] == "0-1"
    assert options["output"] == str(made.folder / "%A_%a.out")
    assert f"\nRUN_DIR={tmp_path}/sweep\n" in made.text


def test_runs_of_an_array_in_one_folder_of_checkpoints(tmp_path: Path) -> None:
    """Whoever of them begins second would be refused by the first, node by node, hours later."""
    with pytest.raises(UserError, match="would be the folder of 2 runs of --array"):
        prepared(tmp_path / "a", f"checkpoint.save={tmp_path}/b", array=("training.seed=1,2",))


def test_a_job_that_is_not_to_come_back(tmp_path: Path) -> None:
    """`--no-requeue` is said once, and the script knows."""
    job = replace(JOB, options=("--no-requeue",))
    lines = prepared(tmp_path / "run", job=job).text.split("\n")
    assert "#SBATCH --no-requeue" in lines and "#SBATCH --requeue" not in lines
    assert "REQUEUE=no" in lines


@pytest.mark.parametrize(
    ("array", "runs"),
    [
        (["a.b=1,2", "c=x"], [["a.b=1", "c=x"], ["a.b=2", "c=x"]]),
        (["a=[0,1],[2]"], [["a=[0,1]"], ["a=[2]"]]),
        (['a="969,30,1","900,100,0"'], [["a=969,30,1"], ["a=900,100,0"]]),
        (["a={x: [1,2], y: 'p,q'},null"], [["a={x: [1,2], y: 'p,q'}"], ["a=null"]]),
        (["a=x=1,y=2"], [["a=x=1"], ["a=y=2"]]),
    ],
)
def test_values_of_an_array(array: list[str], runs: list[list[str]]) -> None:
    """A comma in brackets or quotes is the value's own."""
    assert combinations(array) == runs


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (["a"], "must be like"), (["a="], "must be like"), (["a=1,"], "must be like"),
        (["a=[1,2"], "must be like"), (["a=1]"], "must be like"), (["a='1,2"], "must be like"),
        (["a=1,1"], "two runs would be in the folder 'a=1'"),
        (["a.b=x/y,x_y"], "two runs would be in the folder 'b=x_y'"),
        (["run_dir=a,b"], "folders of one run_dir"),
        (["a.b=1", "a.b=2,3"], "a.b is given twice"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be(array: list[str], problem: str) -> None:
    """Half a value, and two runs in one folder."""
    with pytest.raises(UserError, match=problem):
        combinations(array)
