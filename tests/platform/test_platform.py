"""The platform as its callers see it: what it says, and what it leaves alone."""

import os
import pickle
import queue
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_hybrid import platform
from megatron_hybrid.errors import UserError
from megatron_hybrid.platform import backend, threads
from megatron_hybrid.platform.results_file import ResultsFile
from megatron_hybrid.testing import run_distributed
from tests.training.runs import trainer, words


def look_around() -> dict:
    from megatron.core.tensor_parallel import random as engine_random

    def error_of(call) -> str:
        try:
            call()
        except (RuntimeError, AssertionError) as error:
            return type(error).__name__
        return "none"

    return {
        "platform": platform.initialize(),
        "again": platform.initialize() is platform.initialize(),
        "engine": engine_random.torch.cuda.current_device(),
        "made": engine_random.torch.zeros(2, device="cuda:0").device,
        "user": [
            error_of(lambda: torch.zeros(2, device="cuda")),
            error_of(lambda: torch.ones(2).cuda()),
            error_of(torch.cuda.current_device),
        ],
    }


def test_only_the_engine_sees_a_patched_torch() -> None:
    """After initialize() the engine computes on the CPU; other code still is told: no CUDA."""
    (seen,) = run_distributed(look_around, 1)
    cpu = torch.device("cpu")
    assert seen["platform"] == platform.Platform(cpu, "gloo", has_cuda=False)
    assert seen["again"]
    assert seen["engine"] == seen["made"] == cpu
    assert "none" not in seen["user"]


def test_importing_the_platform_imports_neither_torch_nor_the_engine() -> None:
    """The package costs nothing until it is used."""
    code = "import megatron_hybrid.platform, megatron_hybrid.platform.backend, sys; "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'megatron.core')))"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.parametrize("version", ["0.18.1", "0.20.0", "1.0", None])
def test_another_engine_is_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that the patches were not made for is an error that names both versions."""

    def installed(package: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    backend.check_engine_version.cache_clear()
    with pytest.raises(UserError, match=r"megatron-core.*allowed: >=0\.19,<0\.20"):
        platform.initialize()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch):
    """Pretend that this machine has a GPU and all packages; returns the versions, to be changed."""
    versions = dict.fromkeys(backend.GPU_PACKAGES, "2.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backend, "_version", lambda name: versions.get(name))
    monkeypatch.setattr(backend, "import_errors", lambda modules: {})
    backend.probe.cache_clear()
    backend._resolve_auto.cache_clear()
    yield versions
    backend.probe.cache_clear()
    backend._resolve_auto.cache_clear()


def test_auto_takes_transformer_engine_where_it_can_run(packages: dict) -> None:
    """With a GPU and the packages, auto and the request itself are granted."""
    assert backend.resolve_backend("auto") == "transformer_engine"
    assert backend.resolve_backend("transformer_engine") == "transformer_engine"


def test_torch_is_refused_on_a_gpu(packages: dict) -> None:
    """The CPU's kernels are not run on a GPU in silence; the message says how to hide it."""
    with pytest.raises(backend.BackendError, match=r"NVIDIA H100.*CUDA_VISIBLE_DEVICES="):
        backend.resolve_backend("torch")


@pytest.mark.parametrize("missing", backend.GPU_PACKAGES)
def test_a_missing_package_is_named(packages: dict, missing: str) -> None:
    """A GPU without one of the packages is an error that says which, for auto too."""
    del packages[missing]
    with pytest.raises(backend.BackendError, match=f"needs the package {missing}"):
        backend.resolve_backend("auto")
    with pytest.raises(backend.BackendError, match=f"needs the package {missing}"):
        backend.resolve_backend("transformer_engine")


@pytest.mark.parametrize("broken", backend.GPU_PACKAGES)
def test_a_broken_package_is_named(
    packages: dict, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is installed and cannot be imported is as good as missing, and its error is told."""
    module = backend.GPU_PACKAGES[broken]
    monkeypatch.setattr(backend, "import_errors", lambda modules: {module: "OSError: no such file"})
    told = rf"needs a {broken}==2\.0 that can be imported \(OSError: no such file\)"
    for requested in ("auto", "transformer_engine"):
        with pytest.raises(backend.BackendError, match=told):
            backend.resolve_backend(requested)


def test_what_the_rules_go_by(packages: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The facts about this GPU are those that a config is validated with."""
    from megatron_hybrid.config import load_config, validate
    from tests.config import GOOD

    facts = backend.probe().facts
    assert facts == {
        "has_cuda": True, "compute_capability": (9, 0), "fused_weight_gradients": False,
    }  # fmt: skip
    validate(load_config(GOOD), **facts)


def test_auto_is_logged_once(packages: dict, caplog: pytest.LogCaptureFixture) -> None:
    """What auto chose is one line of the log, however often it is asked."""
    with caplog.at_level("INFO", logger=backend.__name__):
        backend.resolve_backend("auto")
        backend.resolve_backend("auto")
    assert [record.getMessage() for record in caplog.records] == [
        "backend=auto: transformer_engine on NVIDIA H100"
    ]


def test_an_unknown_backend_is_refused() -> None:
    """The message has the value and what is allowed."""
    with pytest.raises(UserError, match="backend=te: unknown; allowed: auto, torch, transf"):
        backend.resolve_backend("te")


def test_probe_tells_what_is_here() -> None:
    """Versions come from the packages' metadata; what is missing is said in words."""
    found = backend.probe()
    assert found.versions["torch"] == metadata.version("torch")
    assert found.versions["megatron-core"] == metadata.version("megatron-core")
    if not torch.cuda.is_available():
        assert found.cuda_device is None
        assert "a CUDA device" in found.missing
        assert found.backend == "torch"


@pytest.mark.parametrize("size", [3, 1_000_000])
def test_results_file_carries_a_message_from_a_forked_child(size: int) -> None:
    """Messages larger than a pipe holds arrive too, with nobody reading meanwhile."""
    results = ResultsFile()
    child = os.fork()
    if child == 0:
        results.put(list(range(size)))
        os._exit(0)
    os.waitpid(child, 0)
    assert results.get_nowait() == list(range(size))


@pytest.mark.parametrize("written", [b"", pickle.dumps("whole")[:-3]])
def test_results_file_of_a_dead_writer_is_empty(written: bytes) -> None:
    """Nothing, or a part of a message, is no message."""
    results = ResultsFile()
    results._file.write(written)
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_openmp_waits_as_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threads spin a little without GPUs; a choice of the user's stands, and so does a GPU node."""
    monkeypatch.setattr(threads, "NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    threads.spin_before_sleeping()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    threads.spin_before_sleeping()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    threads.spin_before_sleeping()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(threads, "NVIDIA_DRIVER", tmp_path)
    threads.spin_before_sleeping()
    assert "OMP_WAIT_POLICY" not in os.environ


SLEEPS_AFTER_A_SUM = """
from megatron_hybrid.platform import threads
threads.NVIDIA_DRIVER = threads.Path("/nowhere")
threads.spin_before_sleeping()
import threading, time
import torch
torch.set_num_threads(2)
torch.ones(10**6).sum()
others = set(threads.Path("/proc/self/task").iterdir())
others = {each for each in others if each.name != str(threading.get_native_id())}
assert others, "no second thread"
deadline = time.monotonic() + 20  # of a spin of 3 ms; one of minutes has not ended then
while not all(" S " in (each / "stat").read_text() for each in others):
    assert time.monotonic() < deadline, "a thread spins"
    time.sleep(0.01)
"""


def test_openmp_sleeps_when_there_is_nothing_to_do() -> None:
    """After an operation of two threads the one without work comes to sleep."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SLEEPS_AFTER_A_SUM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def warnings_of_an_experts_linear() -> list[str]:
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    platform.initialize()
    parallel_state.initialize_model_parallel()
    config = ModelParallelConfig(use_cpu_initialization=True)
    config.sequence_parallel = True  # the model's, which has more tensor ranks than its experts
    with warnings.catch_warnings(record=True) as caught:
        ColumnParallelLinear(4, 4, config=config, init_method=torch.nn.init.zeros_)
    return [str(warning.message) for warning in caught]


def test_a_layer_of_one_tensor_rank_is_no_warning() -> None:
    """Experts under sequence parallelism are as they were asked for."""
    assert run_distributed(warnings_of_an_experts_linear, 1) == [[]]


def warnings_of_a_run(line: list[str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, trainer(line) as run:
        run.run()
    return [str(warning.message) for warning in caught]


def test_mamba_in_fp32_beside_bf16_is_no_warning(tmp_path: Path) -> None:
    """Its decays have a buffer of their own, whose parameters are gathered out of turn."""
    line = words(
        tmp_path, "precision.recipe=bf16", "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true", "model.hybrid_layer_pattern=M*M-",
        "training.train_iters=1",
    )  # fmt: skip
    assert run_distributed(warnings_of_a_run, 1, line) == [[]]
