"""What a submitted run leaves in its folder: `jobs/DATE/` with config, code and script."""

import contextlib
import itertools
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import megatron_hybrid
from launchers.sbatch import (
    Job,
    NoAnswerError,
    render,
    signal_problem,
    submit_job,
    time_problems,
)
from launchers.slurm_text import module_path
from megatron_hybrid.config import RunConfig, load_config
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.fileio import file_errors, write_atomic
from megatron_hybrid.preflight.files import check_files
from megatron_hybrid.training.attempts import append
from megatron_hybrid.training.run_time import JOBS_FILE

JOBS = "jobs"
CONFIG_FILE = "config.yaml"  # of an array's task N: config.yaml.N
CHECKSUM_S = 20.0  # for the checksums of the data
CODE = ("megatron_hybrid", "launchers", "checkpoints_converter", "slurm", "tools", "setup.py")


@dataclass(frozen=True)
class Prepared:
    """A checked submission.

    Attributes:
        folder: `RUN/jobs/DATE`.
        text: of the script to be, in it.
        configs: one a task of an array, else one.
        notes: of them, which hold, but the user should know.
    """

    job: Job
    folder: Path
    text: str
    configs: tuple[RunConfig, ...]
    notes: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        """The filled-in script."""
        return self.folder / "pretrain.sbatch"

    def queue(self) -> Iterator[str]:
        """Keep config, code and script, and queue the job, or the jobs of a chain; their ids.

        Where none is queued, nothing of it is left behind.

        Raises:
            UserError: the folder cannot be written, or Slurm refuses the job.
        """
        with file_errors(self.folder):
            made = [each for each in self.folder.parents if not each.exists()]
            self.folder.mkdir(parents=True)
        queued: list[str] = []
        try:
            self._keep()
            for _ in range(self.job.chain):
                identity = submit_job(self.script, after=queued[-1] if queued else None)
                queued.append(identity)
                self._note(identity)
                yield identity
        except NoAnswerError:
            raise
        except UserError as error:
            if queued:
                raise UserError(f"{error}\n{', '.join(queued)} is queued, and stays so") from error
            self._discard(made)
            raise
        except BaseException:
            if not queued:
                self._discard(made)
            raise

    def _keep(self) -> None:
        """Write config, code and script."""
        tree = source_tree()
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        with file_errors(self.folder):
            for number, config in enumerate(self.configs):
                task = "" if self.job.array_size is None else f".{number}"
                write_atomic(self.folder / f"{CONFIG_FILE}{task}", config.to_yaml())
            for name in CODE:
                source, target = tree / name, self.folder / "code" / name
                if source.is_dir():
                    shutil.copytree(source, target, ignore=ignored)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, target)
            write_atomic(self.script, self.text)

    def _discard(self, made: Sequence[Path]) -> None:
        """Remove the folder, and those above it that were made for it and have nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()

    def _note(self, identity: str) -> None:
        """Remember a job that was queued, for `status`; of an array, each run its own task."""
        record = {"time": time.time(), "folder": str(self.folder)}
        for number, config in enumerate(self.configs):
            job = identity if self.job.array_size is None else f"{identity}_{number}"
            with file_errors(config.run_dir):
                where = {"run_dir": str(config.run_dir.resolve())}
                append(config.run_dir / JOBS_FILE, {"job": job} | record | where)

    def output(self, identity: str) -> Path:
        """Where the job's output will be."""
        task = "_0" if self.job.array_size is not None else ""
        return self.folder / f"{identity}{task}.out"


def source_tree() -> Path:
    """The folder that holds the packages and `slurm/`.

    Raises:
        UserError: the package was installed without it.
    """
    tree = Path(megatron_hybrid.__file__).resolve().parent.parent
    if not (tree / "slurm" / "pretrain.sbatch").is_file():
        raise UserError(
            f"{tree} has no slurm/pretrain.sbatch: submit from a source tree "
            "(pip install --editable, or `python -m megatron_hybrid.cli` in it)"
        )
    return tree


def not_kept(config: RunConfig) -> list[str]:
    """What to say of classes of the user's own: only the code of ours is kept for later starts."""
    kept = [source_tree() / name for name in CODE]
    notes = []
    for word in (config.training.objective, *config.training.callbacks):
        module = sys.modules.get(word.partition(":")[0]) if ":" in word else None
        file = Path(module.__file__).resolve() if module and module.__file__ else None
        if file is not None and not any(file.is_relative_to(each) for each in kept):
            notes.append(
                f"{word} is not kept with the code: every start of the run, after a requeue too, "
                f"takes it from {file}, as it is then"
            )
    return notes


def prepare(args: Sequence[str], job: Job, array: Sequence[str], script: Path) -> Prepared:
    """Check a run as far as files tell, and fill in what the job leaves open.

    Raises:
        UserError: the config, its data or its checkpoint cannot be used, for an array of the first
            run of which that is so; or the job asks Slurm for what excludes itself, or cannot be
            said to it.
    """
    if not script.is_file():
        raise UserError(f"--template {script} does not exist")
    world_size = job.nodes * job.ranks_per_node
    configs: list[RunConfig] = []
    notes: list[str] = []
    for words in combinations(array):
        words = [*args, *words]
        if array:
            try:
                run_dir = load_config(words, which=()).run_dir.resolve()
            except ConfigError:
                _checked(words, world_size, job, 0, notes)  # says that, and all else
                raise
            words.append(f"run_dir={run_dir / _name(words[len(args) :])}")
        # The runs of an array read the same data.
        configs.append(_checked(words, world_size, job, 0 if configs else CHECKSUM_S, notes))
    _refuse_shared(configs)
    base = configs[0].run_dir.resolve()
    base = base.parent if array else base
    folder = base / JOBS / time.strftime("%Y%m%d-%H%M%S")
    job = replace(
        job, gpus_per_node=_gpus(job, configs[0].backend), name=job.name or base.name or "pretrain",
        array_size=len(configs) if array else None,
        folder=folder, output="%A_%a.out" if array else "%j.out",
    )  # fmt: skip
    variables = {
        "CONFIG": str(folder / CONFIG_FILE),
        "RUN_DIR": str(base),
        "CODE": module_path(str(folder / "code")),
        "REQUEUE": "yes" if job.comes_back else "no",
    }
    text = render(script.read_text(encoding="utf-8"), job, variables)
    problems = [
        problem
        for config in configs
        for problem in time_problems(text, config.training.exit_duration_in_mins)
    ]
    asked = [each.partition("=")[2] for each in job.options if each.startswith("--signal=")]
    problems += [problem for each in asked if (problem := signal_problem(text, each))]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return Prepared(job, folder, text, tuple(configs), tuple(dict.fromkeys(notes)))


def _gpus(job: Job, backend: str) -> int:
    """GPUs that are asked for on a node."""
    if job.gpus_per_node is not None:
        return job.gpus_per_node
    return 0 if backend == "torch" else job.ranks_per_node


def _checked(
    words: Sequence[str], world_size: int, job: Job, checksum_s: float, notes: list[str]
) -> RunConfig:
    """The config of a run that the files of a preflight find nothing against.

    Args:
        notes: gets what they say of it.

    Raises:
        UserError: with everything that they find, and what the GPUs of the job cannot run.
    """
    try:
        gpus = _gpus(job, load_config(words, which=()).backend)
    except ConfigError:  # which is told below, with all that the rules find
        gpus = 0
    has_cuda = True if gpus else None  # this machine is not one of the job's
    config, checks = check_files(words, world_size, checksum_s, has_cuda=has_cuda)
    problems = [f"  - {problem}" for check in checks for problem in check.problems]
    if problems or config is None:
        raise UserError("\n".join(["this run would fail:", *problems]))
    notes += [note for check in checks for note in check.notes]
    return config


def _refuse_shared(configs: Sequence[RunConfig]) -> None:
    """Two runs of an array cannot both write one folder of checkpoints."""
    saves = [str(config.checkpoint.save and config.checkpoint.save.resolve()) for config in configs]
    if twice := [save for save in saves if saves.count(save) > 1]:
        raise UserError(
            f"checkpoint.save={twice[0]} would be the folder of {saves.count(twice[0])} runs of "
            "--array; allowed: null, which is a folder in each run_dir"
        )


def combinations(array: Sequence[str]) -> list[list[str]]:
    """`["a.b=1,2", "c.d=x"]` -> [["a.b=1", "c.d=x"], ["a.b=2", "c.d=x"]].

    Commas in brackets or quotes part no values, and quotes around a whole value are no part of it.

    Raises:
        UserError: a text is not like that, or two runs would be the same, or in one folder.
    """
    axes: list[list[str]] = []
    fields: list[str] = []
    for text in array:
        field, _, values = text.partition("=")
        found = _values(values)
        if not field or not found or "" in found:
            raise UserError(
                f"--array {text!r} must be like optimizer.lr=1e-3,2e-3; values with commas are "
                '[0,1],[2] or "1,2","3"'
            )
        if field == "run_dir":
            raise UserError(f"--array {text!r}: the runs of an array are folders of one run_dir")
        if field in fields:
            raise UserError(f"--array {text!r}: {field} is given twice; allowed: once")
        fields.append(field)
        axes.append([f"{field}={value}" for value in found])
    runs = [list(words) for words in itertools.product(*axes)]
    names = [_name(words) for words in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--array {' '.join(array)}: two runs would be in the folder {twice[0]!r}")
    return runs


_VALUE = re.compile(r"""(?:[^,\[\](){}"']|"[^"]*"|'[^']*')+""")


def _values(text: str) -> list[str]:
    """Values between commas; none where a bracket or a quote is not closed."""
    found, depth, at = [""], 0, 0
    while at < len(text):
        match = _VALUE.match(text, at)
        part = text[at] if match is None else match[0]
        at += len(part)
        depth += (part in "([{") - (part in ")]}")
        if part in "\"'" or depth < 0:
            return []
        if part == "," and depth == 0:
            found.append("")
        else:
            found[-1] += part
    if depth:
        return []
    return [value[1:-1] if re.fullmatch(r'"[^"]*"|\'[^\']*\'', value) else value for value in found]


def _name(words: Sequence[str]) -> str:
    """A folder's name for one run of an array: `lr=1e-3,seed=1`."""
    return ",".join(word.partition("=")[0].rpartition(".")[2] + "=" + word.partition("=")[2]
                    for word in words).replace("/", "_")  # fmt: skip
