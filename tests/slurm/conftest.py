"""One Slurm for all tests here; where there can be none they are skipped, loudly.

A job mostly waits: to be started, to be noticed, to be requeued. So some of them run at the same
time, each on a pair of nodes of its own, and a test waits for its own and looks at what came of it.
"""

import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.warm import python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """It is up; jobs' ranks compute on one thread each and talk over loopback."""
    why = missing()
    if why is not None:
        warnings.warn(f"NOTHING IS TESTED ON SLURM: {why}", stacklevel=1)
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=22)
    cluster.environment |= {
        "PYTHONPATH": str(ROOT), "PYTHON": python(), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(cluster.folder),
    }  # fmt: skip
    try:
        try:
            cluster.start()
        except AssertionError as error:  # nothing of ours has run so far
            warnings.warn(
                f"NOTHING IS TESTED ON SLURM: it does not start here: {error}", stacklevel=1
            )
            pytest.skip(f"Slurm does not start here: {error}")
        yield cluster
    finally:
        cluster.stop()


LONGEST = "hang"
AT_ONCE = 3  # more wait less and compute more slowly: ranks of one step wait for each other
Scenario = Callable[[Cluster, str, Path], Any]
_scenarios: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    """Mark what happens to a job: called in a thread with cluster, a pair of nodes and a folder.

    The test of the same name, but for `test_`, finds what it returns in the fixture `outcome`.
    """
    _scenarios[function.__name__] = function
    return function


@pytest.fixture(scope="session")
def outcomes(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[Any]]]:
    """What comes of each scenario that has a test in this session."""
    asked = {item.name.removeprefix("test_") for item in request.session.items}
    # Which takes longest, for want of a sign of life, waits while others compute.
    names = sorted((name for name in _scenarios if name in asked), key=lambda n: n != LONGEST)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(
                _scenarios[name], cluster, f"node[{2 * place + 1}-{2 * place + 2}]",
                tmp_path_factory.mktemp(name),
            )
            for place, name in enumerate(names)
        }  # fmt: skip


@pytest.fixture
def outcome(outcomes: dict[str, Future[Any]], request: pytest.FixtureRequest) -> Any:
    """What came of the scenario of a test."""
    return outcomes[request.node.name.removeprefix("test_")].result(timeout=900)


def command(*words: str, environment: dict[str, str] | None = None) -> str:
    """What a command of ours prints."""
    done = subprocess.run(
        [python(), "-m", "megatron_hybrid.cli", *words],
        env=environment or os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
