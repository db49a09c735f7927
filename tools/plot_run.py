"""Draw the metrics of one or several runs into a PNG.

python tools/plot_run.py runs/quickstart
python tools/plot_run.py runs/a runs/b -o a_against_b.png
python tools/plot_run.py runs/moe --experts
"""

import argparse
import sys
from pathlib import Path

from megatron_hybrid.errors import UserError
from megatron_hybrid.training.plot import plot_runs
from megatron_hybrid.training.plot_experts import draw_expert_load


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
    arguments = parser.parse_args()
    if arguments.experts and len(arguments.run_dir) > 1:
        parser.error("--experts draws one run")
    if arguments.output is None and len(arguments.run_dir) > 1:
        parser.error("several runs in one picture: say where it goes with -o PNG")
    name = "expert_load.png" if arguments.experts else "plot.png"
    output = arguments.output or arguments.run_dir[0] / name
    try:
        if arguments.experts:
            draw_expert_load(arguments.run_dir[0], output)
        else:
            plot_runs(arguments.run_dir, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
