"""What is installed, which backend it can run, and whether the engine is the one we know."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

from packaging.version import Version

from megatron_hybrid.errors import UserError
from megatron_hybrid.platform.imports import came_to_an_end, import_errors

logger = logging.getLogger(__name__)

Backend = Literal["torch", "transformer_engine"]
BACKENDS = ("auto", "torch", "transformer_engine")

# The engine's releases this code is held against, by tests/platform/test_patched_places.py.
ENGINE_FROM, ENGINE_BELOW = Version("0.19"), Version("0.20")

# Packages that the transformer_engine backend needs, by what pip calls them, and what it imports.
GPU_PACKAGES = {
    "transformer-engine": "transformer_engine.pytorch",
    "mamba-ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal-conv1d": "causal_conv1d",
}
# Of NVIDIA's apex, by which the engine adds up gradients of weights in their product.
FUSED_WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
HIDE_GPUS = "CUDA_VISIBLE_DEVICES= (empty) in the environment"
OTHER_PACKAGES = (
    "megatron-core", "torch", "triton", "transformer-engine-torch", "flash-attn", "mpi4py",
)  # fmt: skip


class BackendError(UserError):
    """The backend that was asked for cannot run here."""


@dataclass(frozen=True)
class Probe:
    """What this machine and this Python environment offer.

    Attributes:
        versions: installed version of each package, None where it is not installed.
        cuda_device: name of the current CUDA device, None without one.
        compute_capability: of that device.
        missing: what keeps the transformer_engine backend from running, one phrase each: packages
            that are not installed, or cannot be imported, with the error.
        fused_weight_gradients: whether apex's extension for them can be imported.
        apex: what the package called apex is: "nvidia", "unrelated" (the web package of that name
            on PyPI) or None.
    """

    versions: dict[str, str | None]
    cuda_device: str | None
    missing: tuple[str, ...]
    apex: Literal["nvidia", "unrelated"] | None
    compute_capability: tuple[int, int] | None = None
    fused_weight_gradients: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What the rules of a config go by, as arguments of `config.validate`."""
        return {
            "has_cuda": self.cuda_device is not None,
            "compute_capability": self.compute_capability,
            "fused_weight_gradients": self.fused_weight_gradients,
        }

    @property
    def backend(self) -> Backend | None:
        """What `backend=auto` runs here; None where a GPU lacks its packages."""
        if not self.missing:
            return "transformer_engine"
        return "torch" if self.cuda_device is None else None


@cache
def probe() -> Probe:
    """Look at what is installed, and ask torch for a CUDA device.

    Where there is one, the packages that it needs are imported, in another process, by the first
    rank of a node; without one nothing uses them, and what is said of them is from their metadata.
    """
    import torch

    versions = {name: _version(name) for name in (*OTHER_PACKAGES, *GPU_PACKAGES)}
    missing = [f"the package {name}" for name in GPU_PACKAGES if versions[name] is None]
    if not torch.cuda.is_available():
        return Probe(versions, None, ("a CUDA device", *missing), _apex())
    modules = {name: module for name, module in GPU_PACKAGES.items() if versions[name] is not None}
    if has_fused := find_spec(FUSED_WEIGHT_GRADIENTS) is not None:
        modules[FUSED_WEIGHT_GRADIENTS] = FUSED_WEIGHT_GRADIENTS
    errors = {}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        found = import_errors(list(modules.values()))
        # What takes too long is not broken: it may be read from a file system that all nodes share.
        errors = {name: error for name, error in found.items() if came_to_an_end(error)}
    missing += [
        f"a {name}=={versions[name]} that can be imported ({errors[module]})"
        for name, module in modules.items()
        if module in errors and name in GPU_PACKAGES
    ]
    return Probe(
        versions, torch.cuda.get_device_name(), tuple(missing), _apex(),
        compute_capability=torch.cuda.get_device_capability(),
        fused_weight_gradients=has_fused and FUSED_WEIGHT_GRADIENTS not in errors,
    )  # fmt: skip


def resolve_backend(requested: str) -> Backend:
    """The backend to run: `requested`, or for "auto" the one of this device.

    Logs what "auto" chose, once in a process.

    Raises:
        BackendError: `requested` is no backend, or something it needs is missing.
    """
    if requested not in BACKENDS:
        raise BackendError(f"backend={requested}: unknown; allowed: {', '.join(BACKENDS)}")
    if requested == "auto":
        return _resolve_auto()
    if requested == "torch":
        if device := probe().cuda_device:
            raise BackendError(
                f"backend=torch runs on the CPU, but this process sees {device}; "
                f"allowed here: transformer_engine, auto, or torch with {HIDE_GPUS}"
            )
        return "torch"
    if missing := probe().missing:
        raise BackendError(
            f"backend=transformer_engine needs {_joined(missing)}; "
            'allowed here: torch, auto (pip install "megatron-hybrid[gpu]" brings the packages)'
        )
    return "transformer_engine"


@cache
def _resolve_auto() -> Backend:
    found = probe()
    if found.backend is None:
        raise BackendError(
            f"backend=auto: on {found.cuda_device}, transformer_engine needs "
            f"{_joined(found.missing)}; install it, or run on the CPU with {HIDE_GPUS}"
        )
    if found.missing:
        logger.info("backend=auto: torch (transformer_engine needs %s)", _joined(found.missing))
    else:
        logger.info("backend=auto: transformer_engine on %s", found.cuda_device)
    return found.backend


@cache  # asked for with each part of a model that is built, and the answer is read from files
def check_engine_version() -> None:
    """Raise UserError if the installed megatron-core is not a release this code was made for."""
    version = _version("megatron-core")
    allowed = f"allowed: >={ENGINE_FROM},<{ENGINE_BELOW}"
    if version is None:
        raise UserError(f'megatron-core is not installed; {allowed} (pip install "megatron-core")')
    if not ENGINE_FROM <= Version(version) < ENGINE_BELOW:
        raise UserError(f"megatron-core=={version} is not the engine of this release; {allowed}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _apex() -> Literal["nvidia", "unrelated"] | None:
    """NVIDIA's apex is known by the package `apex.optimizers`; the one on PyPI has none."""
    try:
        files = metadata.files("apex")
    except metadata.PackageNotFoundError:
        return None
    names = {file.as_posix() for file in files or ()}
    return "nvidia" if "apex/optimizers/__init__.py" in names else "unrelated"


def _joined(phrases: tuple[str, ...]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
