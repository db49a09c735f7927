"""Draw the metrics of one or several runs into a PNG.

python tools/plot_run.py runs/quickstart
python tools/plot_run.py runs/a runs/b -o a_against_b.png
python tools/plot_run.py runs/moe --experts
python tools/plot_run.py runs/long --time
python tools/plot_run.py runs/study --float8
python tools/plot_run.py runs/student --teacher
"""

import argparse
import sys
from pathlib import Path

from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import refusals_told
from megatron_hybrid.training.plot import plot_runs
from megatron_hybrid.training.plot_distillation import draw_distillation
from megatron_hybrid.training.plot_experts import draw_expert_load
from megatron_hybrid.training.plot_float8 import draw_float8
from megatron_hybrid.training.plot_time import draw_run_time

# Pictures of one run: what draws each, and its file's name.
OF_ONE_RUN = {
    "experts": (draw_expert_load, "expert_load.png"),
    "time": (draw_run_time, "run_time.png"),
    "float8": (draw_float8, "float8.png"),
    "teacher": (draw_distillation, "distillation.png"),
}


def main() -> int:
    """Parse the command line, draw, print where the picture is."""
    parser = argparse.ArgumentParser(description="Plot loss, learning rate and throughput.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="folder with a metrics.jsonl")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PNG",
        help="default: plot.png in the run's folder; needed for several runs",
    )  # fmt: skip
    parser.add_argument(
        "--experts", action="store_true",
        help="where the tokens of a MoE run went; default output: expert_load.png",
    )  # fmt: skip
    parser.add_argument(
        "--time", action="store_true",
        help="where the time of a run's starts went; default output: run_time.png",
    )  # fmt: skip
    parser.add_argument(
        "--float8", action="store_true",
        help="how operands of emulated float8 fit the format; default output: float8.png",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", action="store_true",
        help="how near a student is to its teacher; default output: distillation.png",
    )  # fmt: skip
    arguments = parser.parse_args()
    asked = [name for name in OF_ONE_RUN if getattr(arguments, name)]
    if asked and len(arguments.run_dir) > 1:
        parser.error(f"--{asked[0]} draws one run")
    if len(asked) > 1:
        parser.error(f"--{asked[0]} and --{asked[1]} are two pictures")
    if arguments.output is None and len(arguments.run_dir) > 1:
        parser.error("several runs in one picture: say where it goes with -o PNG")
    try:
        with refusals_told():
            output = _draw(arguments, asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def _draw(arguments: argparse.Namespace, asked: list[str]) -> Path:
    if asked:
        draw, name = OF_ONE_RUN[asked[0]]
        output: Path = arguments.output or arguments.run_dir[0] / name
        draw(arguments.run_dir[0], output)
    else:
        output = arguments.output or arguments.run_dir[0] / "plot.png"
        plot_runs(arguments.run_dir, output)
    return output


if __name__ == "__main__":
    sys.exit(main())
