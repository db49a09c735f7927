"""Train two configs, or two commits of this repository, for some steps, and say where they part.

python tools/compare_runs.py base.yaml other.yaml --steps 50
python tools/compare_runs.py HEAD~1 . --config tiny --steps 20 --nproc 2 data.mock_data=true
python tools/compare_runs.py runs/a runs/b

Two words that are files or presets are configs; two folders with metrics are runs that are there
already; else they are commits, `.` being this tree as it is, and --config says what they train.
Further words (section.field=value) are for both. Both start from the same seed, in the schedule
of the whole run. The pictures and metrics are left in the folder of --output.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_hybrid.config.load import load_config, presets
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import refusals_told
from megatron_hybrid.training.comparison import Comparison, compare, draw_comparison
from megatron_hybrid.training.metrics import METRICS_FILE

HERE = Path(__file__).resolve().parents[1]
PICTURE = "comparison.png"
STEPS = 20
# That are set for both, whatever their configs say.
OWN_FIELDS = {
    "run_dir": "", "training.log_interval": 1, "training.exit_interval": STEPS,
    "checkpoint.save_interval": "null",
}  # fmt: skip


def main() -> int:
    """Parse the command line, train, compare, draw. Exit code 1: an error; 2: too far apart."""
    parser = _Parser(
        description="Train two configs or two commits for some steps, and say where they part."
    )
    parser.add_argument("first", help="a config, a commit, or a run's folder")
    parser.add_argument("second", help="another")
    parser.add_argument("words", nargs="*", help="section.field=value, for both")
    parser.add_argument("--config", help="what two commits train: a preset or a file")
    parser.add_argument("--steps", type=_positive, default=STEPS, help="default: %(default)s")
    parser.add_argument("--nproc", type=_positive, default=1, help="ranks; default: 1")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="new folder for both runs and the picture; default: comparison",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=_tolerance, metavar="X",
        help="exit code 2 if a step's losses are more than this apart, relatively",
    )  # fmt: skip
    arguments = parser.parse_intermixed_args()
    try:
        with refusals_told():
            found = _found(arguments)
            draw_comparison(found, arguments.output / PICTURE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([*found.lines(), str(arguments.output / PICTURE)]))
    return 2 if arguments.tolerance is not None and found.worst > arguments.tolerance else 0


class _Parser(argparse.ArgumentParser):
    """A wrong command line is an error like any other: 2 says something else here."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10**9:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 1 to 10^9")
    return number


def _tolerance(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of at least 0")
    return number


def _found(arguments: argparse.Namespace) -> Comparison:
    names = (arguments.first, arguments.second)
    if all((Path(name) / METRICS_FILE).is_file() for name in names):
        _refuse_to_train(arguments)
        return compare(Path(names[0]), Path(names[1]), names)
    if own := [word for word in arguments.words if word.partition("=")[0] in OWN_FIELDS]:
        raise UserError(f"{', '.join(own)}: what is compared decides it, and --steps; leave it out")
    if arguments.output.exists():
        raise UserError(f"--output={arguments.output} is there already; name a new folder")
    configs = [_is_config(name) for name in names]
    if all(configs):
        if arguments.config is not None:
            raise UserError(f"--config={arguments.config} is for two commits; these are configs")
        _refuse_other_seeds(names, arguments.words)
        sides = [(HERE, name) for name in names]
    elif any(configs) or arguments.config is None:
        raise UserError(
            f"{names[0]} and {names[1]} must be two configs, two folders with {METRICS_FILE}, or "
            "two commits with --config"
        )
    else:
        sides = []
    with ExitStack() as stack:
        if not sides:
            trees = [stack.enter_context(_tree(name)) for name in names]
            sides = [(tree, arguments.config) for tree in trees]
        folders = [arguments.output / side for side in ("a", "b")]
        for (tree, config), folder in zip(sides, folders, strict=True):
            _train(tree, config, folder, arguments)
    return compare(folders[0], folders[1], names)


def _refuse_to_train(arguments: argparse.Namespace) -> None:
    """Two runs that are there already are only read."""
    given = {
        "--config": arguments.config is not None, "--steps": arguments.steps != STEPS,
        "--nproc": arguments.nproc != 1, " ".join(arguments.words): bool(arguments.words),
    }  # fmt: skip
    if names := [name for name, is_given in given.items() if is_given]:
        raise UserError(
            f"{', '.join(names)}: {arguments.first} and {arguments.second} are runs that are there "
            "already; nothing is trained"
        )


def _refuse_other_seeds(names: Sequence[str], words: Sequence[str]) -> None:
    """Runs of other seeds differ from the first step on, whatever else does."""
    seeds = [load_config([name, *words], which=()).training.seed for name in names]
    if seeds[0] != seeds[1]:
        raise UserError(
            f"training.seed={seeds[0]} in {names[0]} and {seeds[1]} in {names[1]}; allowed: one "
            f"for both, such as training.seed={seeds[0]} as a further word"
        )


def _is_config(word: str) -> bool:
    return word in presets() or Path(word).is_file()


@contextmanager
def _tree(commit: str) -> Iterator[Path]:
    """The code of a commit, in a folder of its own; this tree for `.`."""
    if commit == ".":
        yield HERE
        return
    done = subprocess.run(
        ["git", "-C", str(HERE), "archive", "--", commit], capture_output=True, check=False
    )
    if done.returncode:
        raise UserError(f"{commit} is no config, no run's folder, and no commit of {HERE}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True)
        yield Path(folder)


def _train(tree: Path, config: str, folder: Path, arguments: argparse.Namespace) -> None:
    own = OWN_FIELDS | {"run_dir": folder, "training.exit_interval": arguments.steps}
    words: Sequence[str] = [
        "pretrain", config, *arguments.words, *(f"{name}={value}" for name, value in own.items()),
        *(["--nproc", str(arguments.nproc)] if arguments.nproc > 1 else []),
    ]  # fmt: skip
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.cli", *words],
        # Else the code of the folder that we are in, if it has some, would be that of both.
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        check=False,
    )
    if done.returncode:
        raise UserError(f"the training of {config} with the code in {tree} has failed")


if __name__ == "__main__":
    sys.exit(main())
