"""The command line of the product as if there were a GPU.

    python -m tests.gpu_on_cpu.as_on_a_gpu pretrain tiny backend=transformer_engine ...
    python -m tests.gpu_on_cpu.as_on_a_gpu --run benchmarks/gpu_step.py ...

The words are those of `megatron-hybrid`; --run takes a Python program instead. Ranks of
`pretrain --nproc` are started the same way.
"""

import runpy
import sys
from collections.abc import Sequence
from functools import wraps

from tests.gpu_on_cpu import stand_in


def main() -> None:
    stand_in.install()
    if sys.argv[1:2] == ["--run"]:
        del sys.argv[:2]
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    from megatron_hybrid import cli

    launch = cli.launch

    @wraps(launch)
    def launch_ranks(argv: Sequence[str], *others: object, **named: object) -> int:
        assert list(argv[:2]) == ["-m", "megatron_hybrid.cli"]
        return launch(["-m", __spec__.name, *argv[2:]], *others, **named)

    cli.launch = launch_ranks
    cli.main()


if __name__ == "__main__":
    main()
