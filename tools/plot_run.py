"""Draw the metrics of one or several runs into a PNG.

python tools/plot_run.py runs/quickstart
python tools/plot_run.py runs/a runs/b -o a_against_b.png
python tools/plot_run.py runs/moe --experts
python tools/plot_run.py runs/long --time
"""

import argparse
import sys
from pathlib import Path

from megatron_hybrid.errors import UserError
from megatron_hybrid.training.plot import plot_runs
from megatron_hybrid.training.plot_experts import draw_expert_load
from megatron_hybrid.training.plot_time import draw_run_time


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
    arguments = parser.parse_args()
    if (arguments.experts or arguments.time) and len(arguments.run_dir) > 1:
        parser.error("--experts and --time draw one run")
    if arguments.experts and arguments.time:
        parser.error("--experts and --time are two pictures")
    if arguments.output is None and len(arguments.run_dir) > 1:
        parser.error("several runs in one picture: say where it goes with -o PNG")
    name = "expert_load" if arguments.experts else "run_time" if arguments.time else "plot"
    output = arguments.output or arguments.run_dir[0] / f"{name}.png"
    try:
        if arguments.experts:
            draw_expert_load(arguments.run_dir[0], output)
        elif arguments.time:
            draw_run_time(arguments.run_dir[0], output)
        else:
            plot_runs(arguments.run_dir, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
