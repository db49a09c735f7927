"""What this machine has, in one line; where there are GPUs by a program, since asking takes hold of
one.
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass

from launchers.environment import own_code
from megatron_hybrid.errors import UserError
from megatron_hybrid.human import say
from megatron_hybrid.platform.warm import load_for_forks


@dataclass(frozen=True)
class Facts:
    """`line` is for people; `gpus` is 0 where a training would run on the CPU."""

    line: str
    gpus: int


def find_facts() -> Facts:
    """Ask torch and the packages' metadata; with GPUs, in a process of its own.

    Raises:
        UserError: torch cannot be imported, or a GPU is there without the packages that it needs.
    """
    try:
        if load_for_forks():
            return _look()
    except (ImportError, OSError) as error:
        raise UserError(
            f"this installation cannot train: {error}; see megatron-hybrid doctor"
        ) from error
    command = [sys.executable, "-m", "megatron_hybrid.smoke.facts"]
    environment = os.environ | own_code(os.environ)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"this installation cannot train: {last}; see megatron-hybrid doctor")
    return Facts(**json.loads(done.stdout.splitlines()[-1]))


def _look() -> Facts:
    import torch

    from megatron_hybrid import __version__
    from megatron_hybrid.platform.backend import check_engine_version, probe, resolve_backend

    check_engine_version()
    backend, found = resolve_backend("auto"), probe()
    gpus = torch.cuda.device_count() if found.cuda_device else 0
    device = f"{gpus} x {found.cuda_device}" if gpus else f"CPU, {os.cpu_count()} cores"
    line = (
        f"megatron-hybrid {__version__}, megatron-core {found.versions['megatron-core']}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; "
        f"{device}, backend {backend}"
    )
    return Facts(line, gpus)


if __name__ == "__main__":
    say(json.dumps(asdict(_look())))
