"""What every test run needs: GPU tests are skipped, by name, where there is no GPU, no test leaves
anything in the temp folder, and several processes share the tests by file.
"""

import gc
import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.platform.imports import importing
from megatron_hybrid.platform.threads import NVIDIA_DRIVER
from tests.warm import Session, fork_servers_too, python

# What others leave in the temp folder, by the beginning of its name, and why that is no test's.
LEAVINGS = {
    "pymp-": "Python's multiprocessing, of a process that was killed while it had a listener",
}

# The same, by the end of its name.
WHILE_IT_RUNS = {
    "wandb-media": "wandb, which the engine's timers and the trackers' test import",
    "wandb-artifacts": "the same: both go as the process ends",
}

SLURM = "tests/slurm/"
TOGETHER = (SLURM, "tests/gpu_on_cpu/")  # tests that share one Slurm, or one server of ranks
WARM = "warm"  # in what pytest-xdist gives to its processes


def pytest_configure(config: pytest.Config) -> None:
    """Keep out of reports what the engine and torch warn of as the engine is imported; make what
    `tests.warm.python` is.

    With `-n`, all that import torch and the engine are forks of one process that has: those that
    share the tests, and the fork servers of each.
    """
    for message in ("(Transformer Engine|Apex)", "`torch.jit", "The following imports from"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    shared = getattr(config, "workerinput", {}).get(WARM)
    warm = Session(Path(shared) if shared else None)
    config.add_cleanup(warm.end)
    if shared:
        fork_servers_too()
    elif getattr(config.option, "tx", None) and not NVIDIA_DRIVER.exists():
        config.option.tx = [f"popen//python={python()}"] * len(config.option.tx)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process that will share the tests where the server is."""
    node.workerinput[WARM] = str(Path(python()).parent)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: a file's tests, which share fixtures, stay together, and those of some folders."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import all tests, and what they import, without looking for garbage in it."""
    with importing():
        yield
    gc.freeze()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Several of us share the cores: a thread that waits for another that waits for its core
        # spins, and matrix products took three times as long.
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with Slurm, where tests wait, for others to compute meanwhile; skip tests marked `gpu`
    without a CUDA device.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def temp_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator["TempFolder"]:
    """A temp folder of this session's own, for its processes too; what is left there at its end is
    an error.
    """
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    folder = TempFolder(tmp_path_factory.mktemp("temp"))
    with pytest.MonkeyPatch.context() as patch:
        # What torch has compiled is to be there for the next session.
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        patch.setenv("TMPDIR", str(folder.path))
        patch.setattr(tempfile, "tempdir", str(folder.path))
        yield folder
    deadline = time.monotonic() + 10  # of processes that are just ending
    while folder.left() and time.monotonic() < deadline:
        time.sleep(0.02)
    lines = [f"{name}, seen after {folder.seen.get(name, 'the last')}" for name in folder.left()]
    assert not lines, "left in the temp folder; use tmp_path:\n" + "\n".join(lines)


@pytest.fixture(autouse=True)
def look_into_the_temp_folder(
    temp_folder: "TempFolder", request: pytest.FixtureRequest
) -> Iterator[None]:
    """Remember which test something came there with."""
    yield
    for name in temp_folder.left():
        temp_folder.seen.setdefault(name, request.node.nodeid)


class TempFolder:
    """Attributes: `path`; `seen`: after which test a name was there first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, str] = {}

    def left(self) -> list[str]:
        """The names there, but for what others leave."""
        names = sorted(path.name for path in self.path.iterdir())
        ends = tuple(WHILE_IT_RUNS)
        return [n for n in names if not n.startswith(tuple(LEAVINGS)) and not n.endswith(ends)]
