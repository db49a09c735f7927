"""What a submitted run leaves in its folder: `jobs/DATE/` with config, code and script."""

import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import megatron_hybrid
from launchers.sbatch import Job
from megatron_hybrid.config import RunConfig, load_config
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import file_errors, write_atomic
from megatron_hybrid.preflight.files import check_files
from megatron_hybrid.training.attempts import append
from megatron_hybrid.training.run_time import JOBS_FILE

JOBS = "jobs"
CHECKSUM_S = 20.0  # for the checksums of the data
CODE = ("megatron_hybrid", "launchers", "checkpoints_converter", "slurm", "tools", "setup.py")


@dataclass(frozen=True)
class Prepared:
    """A checked submission.

    Attributes:
        folder: `RUN/jobs/DATE`.
        script: to be, in it.
        variables: of the script.
        configs: one a task of an array, else one; each with its words.
    """

    job: Job
    folder: Path
    variables: dict[str, str]
    configs: tuple[tuple[RunConfig, list[str]], ...]

    @property
    def script(self) -> Path:
        """The filled-in script."""
        return self.folder / "pretrain.sbatch"

    def keep(self, script: str) -> None:
        """Write config, code and script.

        Raises:
            UserError: the folder cannot be written.
        """
        tree = source_tree()
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        with file_errors(self.folder):
            self.folder.mkdir(parents=True)
            write_atomic(self.folder / "config.yaml", self.configs[0][0].to_yaml())
            for number, (_, words) in enumerate(self.configs):
                if self.job.array_size is not None:
                    text = "".join(f"{word}\n" for word in words)
                    write_atomic(self.folder / f"words_{number}.txt", text)
            for name in CODE:
                source, target = tree / name, self.folder / "code" / name
                if source.is_dir():
                    shutil.copytree(source, target, ignore=ignored)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, target)
            write_atomic(self.script, script)

    def note(self, identity: str) -> None:
        """Remember a job that was queued, for `status`; of an array, each run its own task."""
        record = {"time": time.time(), "folder": str(self.folder)}
        for number, (config, _) in enumerate(self.configs):
            job = identity if self.job.array_size is None else f"{identity}_{number}"
            append(config.run_dir / JOBS_FILE, {"job": job} | record)

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


def prepare(args: Sequence[str], job: Job, array: Sequence[str], script: Path) -> Prepared:
    """Check a run as far as files tell, and fill in what the job leaves open.

    Raises:
        UserError: the config, its data or its checkpoint cannot be used; for an array, of the first
            run of which that is so.
    """
    if not script.is_file():
        raise UserError(f"--template {script} does not exist")
    world_size = job.nodes * job.ranks_per_node
    sweep = _combinations(array)
    configs: list[tuple[RunConfig, list[str]]] = []
    for words in sweep:
        config = load_config([*args, *words], world_size=world_size)
        if array:
            own = [*words, f"run_dir={config.run_dir.resolve() / _name(words)}"]
            words = own
        # The runs of an array read the same data.
        config = _checked([*args, *words], world_size, 0 if configs else CHECKSUM_S)
        configs.append((config, words))
    base = configs[0][0].run_dir.resolve()
    base = base.parent if array else base
    folder = base / JOBS / time.strftime("%Y%m%d-%H%M%S")
    gpus = job.gpus_per_node
    if gpus is None:
        gpus = 0 if configs[0][0].backend == "torch" else job.ranks_per_node
    job = replace(
        job, gpus_per_node=gpus, name=job.name or base.name,
        array_size=len(configs) if array else None,
        output=str(folder / ("%A_%a.out" if array else "%j.out")),
    )  # fmt: skip
    variables = {
        "CONFIG": str(folder / "config.yaml"),
        "RUN_DIR": "" if array else str(base),
        "WORDS_FILE": str(folder / "words_%a.txt") if array else "",
        "CODE": str(folder / "code"),
        "REQUEUE": "no" if job.chain > 1 else "yes",
    }
    return Prepared(job, folder, variables, tuple(configs))


def _checked(words: Sequence[str], world_size: int, checksum_s: float) -> RunConfig:
    """The config of a run that the files of a preflight find nothing against.

    Raises:
        UserError: with everything that they find.
    """
    config, checks = check_files(words, world_size, checksum_s)
    problems = [f"  - {problem}" for check in checks for problem in check.problems]
    if problems or config is None:
        raise UserError("\n".join(["this run would fail:", *problems]))
    return config


def _combinations(array: Sequence[str]) -> list[list[str]]:
    """`["a.b=1,2", "c.d=x"]` -> [["a.b=1", "c.d=x"], ["a.b=2", "c.d=x"]]."""
    axes = []
    for text in array:
        field, sign, values = text.partition("=")
        if not sign or not values:
            raise UserError(f"--array {text!r} must be like optimizer.lr=1e-3,2e-3")
        axes.append([f"{field}={value}" for value in values.split(",")])
    return [list(words) for words in itertools.product(*axes)]


def _name(words: Sequence[str]) -> str:
    """A folder's name for one run of an array: `lr=1e-3,seed=1`."""
    return ",".join(word.partition("=")[0].rpartition(".")[2] + "=" + word.partition("=")[2]
                    for word in words).replace("/", "_")  # fmt: skip
