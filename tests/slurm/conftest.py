"""One Slurm of two nodes for all tests here; where there can be none they are skipped, loudly."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """It is up; jobs' ranks compute on one thread each and talk over loopback."""
    why = missing()
    if why is not None:
        warnings.warn(f"NOTHING IS TESTED ON SLURM: {why}", stacklevel=1)
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.environment |= {
        "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(cluster.folder),
    }  # fmt: skip
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def command(*words: str, environment: dict[str, str] | None = None) -> str:
    """What a command of ours prints."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hybrid.cli", *words],
        env=environment or os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
