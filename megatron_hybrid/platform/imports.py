"""Imports that take long, and packages that are installed and cannot be imported.

These are found out in a process of its own. That a package is installed does not say that it works:
what is compiled may be missing, or built for another torch, and an import that fails half-way
leaves a process in no good state, or ends it.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MOST_SECONDS = 300
_UNENDED = f"the import did not end within {MOST_SECONDS} s"

# What the engine looks for while it is imported and we have no use for without a GPU. It passes
# over what is missing, but not over what is there and broken in another way than by ImportError.
GPU_MODULES = (
    "amp_C", "apex", "causal_conv1d", "deep_ep", "emerging_optimizers", "flash_attn",
    "flash_attn_3", "flash_mla", "flashattn_hopper", "flashinfer",
    "fused_weight_gradient_mlp_cuda", "mamba_ssm", "torch_memory_saver", "transformer_engine",
)  # fmt: skip

_MARK = "\x01"  # begins our lines: modules print too when they are imported
_PROGRAM = f"""
import contextlib, importlib, json, sys
with contextlib.suppress(Exception):
    import torch  # which loads the libraries that the others need
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        error = None
    except BaseException as caught:
        error = f"{{type(caught).__name__}}: {{caught}}"
    print("\\n" + {_MARK!r} + json.dumps(error), flush=True)
"""


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch and the engine, without the collector of garbage.

    What they make is there to stay, and to look for garbage in all of it, again and again as it
    grows, takes up to a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def import_errors(modules: Sequence[str]) -> dict[str, str]:
    """What importing modules says, for those that cannot be imported: an error in one line.

    A module that ends the process, or does not come to an end within 300 s, is named like others.
    """
    found: dict[str, str] = {}
    left = list(modules)
    while left:
        output, ended = _import(left)
        lines = [line for line in output.splitlines() if line.startswith(_MARK)]
        told = [json.loads(line.removeprefix(_MARK)) for line in lines]
        for name, error in zip(left, told, strict=False):
            if error is not None:
                found[name] = " ".join(error.split())[:300]
        left = left[len(told) :]
        if left:
            found[left.pop(0)] = ended
    return found


def came_to_an_end(error: str) -> bool:
    """Whether an error of `import_errors` is one of the module, not of a slow file system."""
    return error != _UNENDED


def _import(modules: list[str]) -> tuple[str, str]:
    """What a process that imports modules printed, and how it ended."""
    # mpi4py would join the job of MPI that this process may be in.
    environment = os.environ | {"MPI4PY_RC_INITIALIZE": "0"}
    # Where this process finds modules, and not in the current folder, a checkout of theirs maybe.
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, *given]))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROGRAM, *modules], capture_output=True, text=True,
            check=False, timeout=MOST_SECONDS, env=environment, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output if isinstance(output, str) else output.decode(errors="replace")
        return text, _UNENDED
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
    return done.stdout, f"the import ended Python with {how}"


def hide_gpu_modules() -> None:
    """Let this process go without the modules of GPUs, as if they were not installed.

    Those that are imported already stay.
    """
    for name in GPU_MODULES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Within it a module that is not imported yet is as if it were not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
