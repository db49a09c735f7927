"""The steps of a check that say whether the program is right on this GPU."""

import math
import os
import platform as python_platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.gpu import kernels as mamba_kernels
from tests.gpu import layers as one_layer
from tests.gpu import runs
from tests.gpu.findings import Findings, NeedsGpuError

LENGTHS = (64, 504, 2048)
RECIPE_STEPS = 20
MOE = ("model.num_moe_experts=8", "model.moe_ffn_hidden_size=512", "model.moe_router_topk=2")
# Of the first loss. Emulated on a CPU, float8's losses are within 0.3 % of it.
AS_IN_BF16 = 0.02


def versions(findings: Findings) -> None:
    """What is installed here, and whether a run would find a GPU and its kernels."""
    with findings.part("device") as found:
        found |= _device()
    with findings.part("packages") as found:
        from megatron_hybrid.doctor import examine

        found["packages"] = [asdict(item) for item in examine()]
    with findings.part("backend") as found:
        from megatron_hybrid.platform.backend import probe

        found |= {"versions": probe().versions, "missing": list(probe().missing)}
        assert not probe().missing, f"transformer_engine needs {', '.join(probe().missing)}"


def _device() -> dict[str, Any]:
    found = {
        "python": python_platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cpus": len(os.sched_getaffinity(0)),
        "commit": _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }  # fmt: skip
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def _said(*command: str) -> str | None:
    """What a program says; None where there is none, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else None


def kernels(findings: Findings) -> None:
    """mamba-ssm's and causal-conv1d's kernels against the reference, forward and all gradients."""
    for length in LENGTHS:
        for packed in (False, True):
            with findings.part(f"{length} tokens{', packed' if packed else ''}") as found:
                run = partial(mamba_kernels.run, length, packed=packed)
                want = run("cpu", torch.float64, "reference")
                backend, device = ("torch", "cpu") if findings.toy else ("mamba_ssm", "cuda")
                got = run(device, torch.float32, backend)
                error, where = one_layer.largest_error(got, want)
                found |= {"error": error, "of": where}
                assert error < mamba_kernels.TOLERANCE, f"{where} is off by {error:.2e}"
                if findings.toy:
                    raise NeedsGpuError("mamba-ssm's scan needs a GPU: torch's stood in its place")


def layers(findings: Findings) -> None:
    """Losses and gradients of each kind of layer on Transformer Engine against torch's in fp32."""
    for symbol in one_layer.KINDS:
        with findings.part(symbol) as found:
            error, where = one_layer.transformer_engine_error(symbol, findings.work)
            found |= {"error": error, "of": where}
            assert error < one_layer.TOLERANCE, f"{where} is off by {error:.2e}"


def recipes(findings: Findings) -> None:
    """Twenty steps in each recipe, whose losses are those of bf16 as far as float8 goes."""
    from megatron_hybrid.config.precision import FLOAT8_RECIPES

    pattern, hidden, vocabulary, length = (
        ("M-*EM-*E", 512, 512, 64) if findings.toy else ("M-*EM-*EM-*E", 1024, 8192, 1024)
    )
    words = (*runs.model_words(pattern, hidden, vocabulary, length), *MOE)
    exact: list[float] = []
    for recipe in ("bf16", *FLOAT8_RECIPES):
        if why := _refusal(words, recipe):
            findings.skip(recipe, why)
            continue
        with findings.part(recipe) as found:
            losses = found["losses"] = _train(words, recipe)
            assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] / 2
            if recipe == "bf16":
                exact = losses
                continue
            assert exact, "bf16 has no losses to compare with"
            far = max(abs(one - other) for one, other in zip(losses, exact, strict=True))
            found["off_bf16_nats"] = far
            assert far < AS_IN_BF16 * exact[0], f"a loss is off that of bf16 by {far:.3f} nats"


def _refusal(words: Sequence[str], recipe: str) -> str | None:
    """Why the GPU that is here has nothing for a recipe, by the rules of configs."""
    from megatron_hybrid.config.rules import Facts
    from megatron_hybrid.config.rules.precision import delayed_scaling_resumes, recipe_of_this_gpu
    from megatron_hybrid.config.sections import PrecisionConfig
    from megatron_hybrid.platform.backend import probe

    config = _config(words, "bf16")
    config = config.model_copy(update={"precision": PrecisionConfig(recipe=recipe)})
    facts = Facts(**probe().facts)
    problems = [*recipe_of_this_gpu(config, facts), *delayed_scaling_resumes(config, facts)]
    return problems[0] if problems else None


def _config(words: Sequence[str], recipe: str) -> Any:
    from megatron_hybrid.config import load_config

    size = ("training.micro_batch_size=2", "training.global_batch_size=2")
    more = (f"training.train_iters={RECIPE_STEPS}", f"precision.recipe={recipe}")
    return load_config([*words, *size, *more], world_size=1, has_cuda=True)


def _train(words: Sequence[str], recipe: str) -> list[float]:
    """The losses of steps on one and the same batch."""
    from benchmarks.gpu_step import Side
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import process_groups

    config, platform = _config(words, recipe), initialize()
    with process_groups(config, platform, alone=True):
        side = Side(config, "ours", "transformer_engine", platform.device)
        while len(side.losses) < RECIPE_STEPS:
            side.step()
        return side.losses


def resume(findings: Findings) -> None:
    """A run that ends half-way and goes on is the unbroken run; all of them at the same time."""
    model, module = runs.SMALL, runs.CLI
    if findings.toy:
        model, module = runs.TOY, "tests.gpu_on_cpu.as_on_a_gpu"
    recipes_here = ("bf16",) if findings.toy else ("bf16", "fp8_tensorwise")
    with ThreadPoolExecutor() as pool:
        started = {
            recipe: (
                pool.submit(
                    runs.in_parts, findings.work / f"{recipe}_parts", recipe, model, module
                ),
                pool.submit(
                    runs.pretrain, findings.work / recipe, runs.STEPS, recipe, model, module
                ),
            )
            for recipe in recipes_here
        }
        for recipe, (parts, whole) in started.items():
            with findings.part(recipe) as found:
                found |= {"in_parts": parts.result(), "unbroken": whole.result()}
                runs.assert_goes_on(found["in_parts"], found["unbroken"])
                assert min(found["unbroken"][1:]) < found["unbroken"][0]
    if findings.toy:
        findings.skip("fp8_tensorwise", "arithmetic in float8 needs a GPU")
