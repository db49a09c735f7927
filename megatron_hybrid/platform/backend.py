"""What is installed, which backend it can run, and whether the engine is the one we know."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Literal

from packaging.version import Version

from megatron_hybrid.errors import UserError

logger = logging.getLogger(__name__)

Backend = Literal["torch", "transformer_engine"]
BACKENDS = ("auto", "torch", "transformer_engine")

# The engine's releases this code is held against, by tests/platform/test_patched_places.py.
ENGINE_FROM, ENGINE_BELOW = Version("0.19"), Version("0.20")

# Packages that the transformer_engine backend needs, by what pip calls them.
GPU_PACKAGES = ("transformer-engine", "mamba-ssm", "causal-conv1d")
HIDE_GPUS = "CUDA_VISIBLE_DEVICES= (empty) in the environment"
OTHER_PACKAGES = ("megatron-core", "torch", "triton", "flash-attn", "mpi4py")


class BackendError(UserError):
    """The backend that was asked for cannot run here."""


@dataclass(frozen=True)
class Probe:
    """What this machine and this Python environment offer.

    Attributes:
        versions: installed version of each package, None where it is not installed.
        cuda_device: name of the current CUDA device, None without one.
        missing: what keeps the transformer_engine backend from running, one phrase each.
        apex: what the package called apex is: "nvidia", "unrelated" (the web package of that name
            on PyPI) or None.
    """

    versions: dict[str, str | None]
    cuda_device: str | None
    missing: tuple[str, ...]
    apex: Literal["nvidia", "unrelated"] | None

    @property
    def backend(self) -> Backend | None:
        """What `backend=auto` runs here; None where a GPU lacks its packages."""
        if not self.missing:
            return "transformer_engine"
        return "torch" if self.cuda_device is None else None


@cache
def probe() -> Probe:
    """Look at what is installed, from package metadata alone, and ask torch for a CUDA device."""
    import torch

    versions = {name: _version(name) for name in (*OTHER_PACKAGES, *GPU_PACKAGES)}
    cuda_device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    missing = [] if cuda_device else ["a CUDA device"]
    missing += [f"the package {name}" for name in GPU_PACKAGES if versions[name] is None]
    return Probe(versions, cuda_device, tuple(missing), _apex())


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
