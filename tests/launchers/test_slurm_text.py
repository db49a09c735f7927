"""What Slurm reads from text: said so that it reads back, or refused by name."""

import re
import shlex
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launchers.sbatch import (
    _SAID_BY,
    Job,
    _environment,
    hang_note,
    render,
    signal_problem,
    time_problems,
)
from launchers.slurm_text import (
    directive,
    duration_s,
    file_pattern,
    module_path,
    notice_s,
    read_options,
)
from megatron_hybrid.errors import UserError

FOLDER = Path(__file__).parents[2] / "slurm"
PRETRAIN = (FOLDER / "pretrain.sbatch").read_text()
# Every character of ASCII that a file's name may have, but for those that a path cannot be said
# with (a colon, a backslash), some of others, and what the patterns of Slurm begin with.
ASCII = "".join(map(chr, range(32, 127))).translate(str.maketrans("", "", "\\:/"))
AWKWARD = f"{ASCII} 100%a %% %5j äß€ x"
JOB = Job(nodes=1, ranks_per_node=2, gpus_per_node=0, time_limit="1:00:00", output="%j.out")


def said(script: str) -> dict[str, str]:
    """What sbatch takes from a script."""
    return {option.name: option.value for option in read_options(script.split("\n"))}


def test_every_character_is_said_or_refused() -> None:
    """A directive reads back to its value, whatever that is, or the character is named."""
    for code in [*range(0x180), 0x2028, 0xFEFF, 0xD800, 0x1F600]:
        value = f"a{chr(code)}b"
        try:
            line = directive("comment", value)
        except UserError as error:
            assert "--comment=" in str(error) and f"allowed: text without {chr(code)!r}" in str(
                error
            )
            assert not chr(code).isprintable()
        else:
            assert said(line) == {"comment": value}
            assert len(line.splitlines()) == 1
    assert said(directive("comment", AWKWARD + "\t\\:/")) == {"comment": AWKWARD + "\t\\:/"}
    with pytest.raises(UserError, match="allowed: 8000 bytes"):
        directive("comment", "ü" * 4001)


@pytest.mark.parametrize("name", [field.name for field in fields(Job)])
def test_each_text_of_a_job_is_said(name: str, tmp_path: Path) -> None:
    """Whatever text a job has, the filled-in script says it: each field that holds text."""
    kind = next(str(field.type) for field in fields(Job) if field.name == name)
    if name == "time_limit" or ("str" not in kind and "Path" not in kind):
        return
    value: Any = AWKWARD
    if "Path" in kind:
        value = tmp_path / AWKWARD
    elif "tuple" in kind:
        value = (f"--comment={AWKWARD}",)
    changed: dict[str, Any] = {"folder": tmp_path, name: value}
    found = said(render(PRETRAIN, replace(JOB, **changed), {}))
    escaped = AWKWARD.replace("%", "%%")
    wanted = {
        "name": ("job-name", AWKWARD), "partition": ("partition", AWKWARD),
        "account": ("account", AWKWARD), "options": ("comment", AWKWARD),
        "folder": ("output", f"{tmp_path}/{escaped}/%j.out"),
        "output": ("output", f"{tmp_path}/{AWKWARD}"),  # a pattern by itself
    }[name]  # fmt: skip
    assert found[wanted[0]] == wanted[1]


def test_paths_that_cannot_be_said() -> None:
    """A backslash ends the patterns of a file's name, a colon a folder of PYTHONPATH."""
    assert file_pattern("/a b/100%a") == "/a b/100%%a"
    with pytest.raises(UserError, match="a backslash there means something else"):
        file_pattern("/a\\b")
    with pytest.raises(UserError, match="PYTHONPATH parts folders at ':'"):
        module_path("/a:b")


def test_variables_are_quoted_for_bash() -> None:
    """The script's variable is the text, to the byte."""
    text = AWKWARD + "\n\t\\:/"
    script = render("#!/bin/bash\n#SBATCH -J x\nCONFIG=none\n", JOB_ALONE, {"CONFIG": text})
    shown = subprocess.run(
        ["bash"], input=script + 'printf %s "$CONFIG"', text=True, capture_output=True, check=True
    )
    assert shown.stdout == text
    assert shlex.quote(text) in script


JOB_ALONE = replace(JOB, output=None)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("#SBATCH -N 4 -t01:00:00", {"nodes": "4", "time": "01:00:00"}),
        ("#SBATCH --time 3 --exclusive -H", {"time": "3", "exclusive": "", "hold": ""}),
        ("#SBATCH --comment='a # b' # note", {"comment": "a # b"}),
        ("#SBATCH --comment=a#b -J c", {"comment": "a"}),
        ("#SBATCH --time=1\n\n # note\n#SBATCH --time=2", {"time": "2"}),
        ("#SBATCH --time=1\nset -e\n#SBATCH --time=2", {"time": "1"}),
        ("##SBATCH --time=1", {}),
    ],
)
def test_directives_are_read_as_sbatch_does(lines: str, found: dict[str, str]) -> None:
    """Short options, blanks for '=', several in a line, comments, and only before a command."""
    assert said(f"#!/bin/bash\n{lines}\n") == found


@pytest.mark.parametrize(
    "line", ["#SBATCH --comment='a", "#SBATCH a", "#SBATCH -Z", "#SBATCH --a b c"]
)
def test_directives_that_sbatch_cannot_read(line: str) -> None:
    """They are refused with the line."""
    with pytest.raises(UserError, match=re.escape(line)):
        read_options([line])


@pytest.mark.parametrize(
    "template",
    [
        "#SBATCH --time=9\n#SBATCH -t 8\n#SBATCH --gpus-per-node=8\n#SBATCH -n 16",
        "##SBATCH --time=9\n##SBATCH --gpus-per-node=1",
        "",
        "true\n#SBATCH --time=9",
    ],
)
def test_templates_of_others(template: str) -> None:
    """However a template says it, or whether: the filled-in script says what the job is, once."""
    script = render(f"#!/bin/bash\n{template}\ntrue\n", JOB_ALONE, {})
    options = read_options(script.split("\n"))
    assert {option.name: option.value for option in options} == {
        "nodes": "1", "ntasks-per-node": "2", "time": "1:00:00", "chdir": str(Path.cwd()),
    }  # fmt: skip
    assert len(options) == 4
    assert script.startswith("#!/bin/bash\n")


def test_a_line_of_several_options_is_refused() -> None:
    """One of them alone cannot be replaced."""
    with pytest.raises(UserError, match=r"line 2 of the batch script, .* says --nodes and more"):
        render("#!/bin/bash\n#SBATCH -N2 --time=9\n", JOB_ALONE, {})


def test_options_that_submit_says_are_no_options() -> None:
    """Given a second time by `--option`, each would overrule what was checked."""
    full = replace(JOB, name="a", partition="b", account="c", array_size=2, folder=Path("/a"))
    assert full.sbatch_options().keys() == _SAID_BY.keys()
    for name in _SAID_BY:
        with pytest.raises(UserError, match=f"'--{name}=1' must be said by "):
            replace(JOB, options=(f"--{name}=1",)).sbatch_options()
    with pytest.raises(UserError, match="--qos is given twice"):
        replace(JOB, options=("--qos=a", "--qos=b")).sbatch_options()
    with pytest.raises(UserError, match="must be like"):
        replace(JOB, options=("-q a",)).sbatch_options()


def test_what_the_script_says_is_not_overruled() -> None:
    """sbatch takes its variables before a script's lines; and a job in which we are has others."""
    of_shell = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_QOS": "low"}
    overruling = {
        "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0", "SBATCH_PARTITION": "x",
        "SBATCH_WAIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_OPEN_MODE": "t",
    }  # fmt: skip
    inside = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "2"}
    names = ["time", "array", "partition", "requeue", "open-mode"]
    assert _environment(of_shell | overruling | inside, names) == of_shell
    assert _environment(overruling, []) == {
        name: value for name, value in overruling.items() if name != "SBATCH_WAIT"
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300), ("5:00", 300), ("4:30", 300), ("01:00:00", 3600), ("1-0", 86400),
        ("1-1:30", 91800), ("1-00:00:30", 86460), ("0", float("inf")),
        ("00:00:00", float("inf")), ("UNLIMITED", float("inf")), ("365-0", 31_536_000),
    ],
)  # fmt: skip
def test_time_limits(text: str, seconds: float) -> None:
    """Every form of sbatch's manual, in whole minutes."""
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "1-", "-5", "1.5", "٣"])
def test_what_is_no_time_limit(text: str) -> None:
    """It is refused with the forms that there are."""
    with pytest.raises(UserError, match="is no time limit; allowed: minutes, MM:SS"):
        duration_s(text)


def test_a_time_limit_has_an_end() -> None:
    """Slurm counts minutes in 32 bits."""
    with pytest.raises(UserError, match="allowed: up to 31 years, or UNLIMITED"):
        duration_s("9" * 20)


def test_options_without_an_answer_or_a_value() -> None:
    """With some, sbatch queues nothing or says no id; some exclude each other."""
    for options, problem in (
        (("--wait",), "with it sbatch does not say which job it is"),
        (("--test-only",), "with it sbatch does not say which job it is"),
        (("--wrap=true",), "with it sbatch does not say which job it is"),
        (("--comment=",), "must have a value, or no '='"),
        (("--requeue", "--no-requeue"), "--requeue excludes --no-requeue"),
    ):
        with pytest.raises(UserError, match=problem):
            replace(JOB, options=options).sbatch_options()
    for empty in ("name", "partition", "account", "time_limit"):
        with pytest.raises(UserError, match="='' must have a value"):
            replace(JOB, **{empty: ""}).sbatch_options()  # type: ignore[arg-type]
    several = replace(JOB, chain=2, options=("--dependency=afterok:5?afterok:6",))
    with pytest.raises(UserError, match=r"excludes --chain 2: .* no '\?'"):
        several.sbatch_options()
    assert replace(several, chain=1).sbatch_options()["dependency"] == "afterok:5?afterok:6"


@pytest.mark.parametrize(
    ("signal", "heard"),
    [
        ("B:USR1@300", True), ("B:SIGTERM@300", True), ("B:10@300", True), ("USR1", True),
        ("R:INT@60", True), ("B:USR2@300", False), ("B:12", False), ("USR2@60", False),
        ("HUP", False),
    ],
)  # fmt: skip
def test_a_notice_must_be_one_at_which_a_run_saves(signal: str, heard: bool) -> None:
    """Another ends the batch script, or the ranks, at once: the work since the last checkpoint."""
    problem = signal_problem(PRETRAIN, signal)
    assert (problem is None) == heard
    assert heard or f"--signal={signal} ends the run without a checkpoint" in str(problem)


def test_a_limit_must_leave_time_before_the_notice() -> None:
    """Told to end at its start, a job would come back for ever; both numbers are said."""
    script = "#!/bin/bash\n#SBATCH --time={}\n#SBATCH --signal={}\n"
    (problem,) = time_problems(script.format("00:03:00", "B:USR1@300"), None)
    assert "--time=00:03:00 is 180 s, and --signal=B:USR1@300" in problem
    assert "more than 360 s, or a notice of less than 120 s" in problem
    assert time_problems(script.format("6", "B:USR1@300"), None)
    assert not time_problems(script.format("7", "B:USR1@300"), None)
    assert time_problems(script.format("2", "USR1"), None)  # a minute before, where it says none
    assert not time_problems("#!/bin/bash\n#SBATCH --time=1\n", None)
    assert not time_problems(script.format("0", "B:USR1@300"), None)
    shorter = script.format("60", "B:USR1@300\n#SBATCH --time-min=2")
    (problem,) = time_problems(shorter, None)
    assert problem.startswith("--time-min=2 is 120 s, and --signal=B:USR1@300")
    with pytest.raises(UserError, match="must be like B:USR1@300"):
        notice_s("B:USR1@soon")


def test_a_runs_own_times_must_come_before_the_limit() -> None:
    """Minutes after which it ends are refused, a hang that would not be noticed is said."""
    script = "#!/bin/bash\n#SBATCH --time=01:00:00\n#SBATCH --signal=B:USR1@300\n"
    (problem,) = time_problems(script, 55.0)
    assert "exit_duration_in_mins=55 never comes: --time=01:00:00" in problem
    assert "train for 55 minutes at most" in problem
    assert not time_problems(script, 54.0)
    assert hang_note(script, None) is None and hang_note(script, 3599.0) is None
    note = hang_note(script, 3600.0)
    assert note is not None and "training.hang_timeout_s=3600 is not below --time=01:00:00" in note


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_of_ours(script: Path) -> None:
    """Their times fit, and each learns from job.sh what the job is called, before it starts any
    rank, and nowhere else.
    """
    text = script.read_text()
    assert not time_problems(text, None)
    assert "SLURM_JOB_ID" not in text and "SLURM_JOBID" not in text
    assert "--export" not in text  # which has no quotes: the variables go by the environment
    assert text.index('source "$CODE/slurm/job.sh"') < text.index("\nsrun ")


def test_one_place_names_a_job() -> None:
    """In Python launchers/slurm.py, in the scripts job.sh: nobody else asks for the job's id, which
    in the last task of an array is that of all.
    """
    root = FOLDER.parent
    files = [*FOLDER.glob("*"), *root.glob("launchers/*.py"), *root.glob("megatron_hybrid/**/*.py")]
    asking = {
        path.relative_to(root).as_posix()
        for path in files
        if re.search("SLURM_JOB_?ID", path.read_text())
    }
    assert asking == {"slurm/job.sh", "launchers/slurm.py", "launchers/sbatch.py"}
