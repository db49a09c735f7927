"""`megatron-hybrid doctor`: what is installed, what is missing, and which backend would run."""

import importlib
import platform as python_platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_hybrid.errors import UserError
from megatron_hybrid.platform.backend import GPU_PACKAGES
from megatron_hybrid.platform.imports import import_errors

DISTRIBUTION = "megatron-hybrid"
# Optional packages, and what each of them gives.
OPTIONAL = {
    "transformer-engine": "FP8 and fused linears on GPUs",
    "mamba-ssm": "fast scans of Mamba on GPUs",
    "causal-conv1d": "fast convolutions of Mamba-2 on GPUs",
    "flash-attn": "other attention kernels on GPUs",
    "mpi4py": "the addresses of ranks that mpirun starts",
    "transformers": "the peer in the benchmarks",
}
# What is imported of them.
IMPORTED = {
    **GPU_PACKAGES, "flash-attn": "flash_attn", "mpi4py": "mpi4py.MPI",
    "transformers": "transformers",
}  # fmt: skip

Status = Literal["ok", "missing", "unusable", "broken"]
_STYLE: dict[Status, str] = {
    "ok": "green", "missing": "yellow", "unusable": "red", "broken": "red",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report: `broken` means that training cannot run before it is mended, and
    `unusable` that it can, but without this.
    """

    what: str
    found: str
    status: Status
    note: str = ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    """What this package cannot run without, as its own metadata says."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


def _import_errors(required: Sequence[str]) -> dict[str, str]:
    """By package, why it cannot be imported, of all that are installed and can not."""
    of_package = {package: IMPORTED[package] for package in OPTIONAL}
    distributions = metadata.packages_distributions()
    for name in required:
        own = canonicalize_name(name)
        found = {m for m, of in distributions.items() if own in map(canonicalize_name, of)}
        public = sorted(module for module in found if not module.startswith("_"))
        if public:  # what has another name has one module
            of_package[name] = own if own in public else public[0]
    modules = {name: module for name, module in of_package.items() if _version(name) is not None}
    errors = import_errors(list(modules.values()))
    return {name: errors[module] for name, module in modules.items() if module in errors}


def _required(requirement: Requirement, errors: Mapping[str, str]) -> Finding:
    version = _version(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        return Finding(requirement.name, "-", "broken", f'pip install "{wanted}"')
    if not requirement.specifier.contains(_release(version), prereleases=True):
        return Finding(requirement.name, version, "broken", f"must be {requirement.specifier}")
    if error := errors.get(requirement.name):
        return Finding(requirement.name, version, "broken", f"cannot be imported: {error}")
    return Finding(requirement.name, version, "ok")


def _release(version: str) -> str:
    """2.13.0 for `2.13.0a0+9186a08b2c.nv26.07`, a build in NVIDIA's images; else the version."""
    parsed = Version(version)
    by_nvidia = any(part.startswith("nv") for part in (parsed.local or "").split("."))
    return parsed.base_version if by_nvidia else version


def _optional(package: str, errors: Mapping[str, str]) -> Finding:
    version, gives = _version(package), OPTIONAL[package]
    if version is None:
        return Finding(package, "-", "missing", f"would give: {gives}")
    if error := errors.get(package):
        return Finding(package, version, "unusable", f"cannot be imported: {error}")
    return Finding(package, version, "ok", gives)


def _apex(kind: str | None) -> Finding:
    """NVIDIA's apex is built from source; PyPI's package of that name is something else."""
    if kind == "nvidia":
        return Finding("apex", "NVIDIA's", "ok", "fused optimizers on GPUs")
    if kind == "unrelated":
        note = "not NVIDIA's but the unrelated web package: pip uninstall apex"
        return Finding("apex", _version("apex") or "-", "missing", note)
    note = "would give: fused optimizers; built from github.com/NVIDIA/apex, not from PyPI"
    return Finding("apex", "-", "missing", note)


def _engine() -> list[Finding]:
    """torch, the GPU and the backend, by asking the code that decides when a run starts."""
    try:
        torch = importlib.import_module("torch")
        backend = importlib.import_module("megatron_hybrid.platform.backend")
        probe = backend.probe()
        has_bf16 = importlib.import_module("megatron_hybrid.ops.bf16").cpu_multiplies_bf16()
    except (ImportError, OSError) as error:
        return [Finding("torch", "-", "broken", f"cannot be imported: {error}")]
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    device = probe.cuda_device
    findings = [
        Finding("torch build", torch.__version__, "ok", build),
        Finding("CUDA device", device or "-", "ok" if device else "missing", "" if device else
                "training runs on the CPU, over gloo"),
        Finding("bf16 on the CPU", "instructions" if has_bf16 else "through fp32", "ok", "" if
                has_bf16 else "precision.recipe=bf16 is no faster here than fp32"),
        _apex(probe.apex),
    ]  # fmt: skip
    try:
        backend.check_engine_version()
    except UserError as error:
        findings.append(Finding("engine", _version("megatron-core") or "-", "broken", str(error)))
    missing = ", ".join(probe.missing)
    note = f"transformer_engine would need: {missing}" if missing else "everything is there"
    findings.append(
        Finding("backend=auto", probe.backend or "-", "ok" if probe.backend else "broken", note)
    )
    return findings


def examine() -> list[Finding]:
    """Look at everything, from Python to the backend that would run."""
    findings = [Finding("Python", python_platform.python_version(), "ok")]
    requirements = _requirements()
    if requirements:
        findings.append(Finding(DISTRIBUTION, _version(DISTRIBUTION) or "-", "ok"))
    else:
        findings.append(Finding(DISTRIBUTION, "-", "broken", "not installed: pip install -e ."))
    errors = _import_errors([requirement.name for requirement in requirements])
    findings += [_required(requirement, errors) for requirement in requirements]
    findings += [_optional(package, errors) for package in OPTIONAL]
    return findings + _engine()


def report(findings: list[Finding], console: Console) -> bool:
    """Print the findings as a table and a conclusion; whether training can run."""
    table = Table("", "found", "status", "note")
    for item in findings:
        style = _STYLE[item.status]
        table.add_row(
            item.what, escape(item.found), f"[{style}]{item.status}[/]", escape(item.note)
        )
    console.print(table)
    broken = [item.what for item in findings if item.status == "broken"]
    if broken:
        console.print(f"[red]cannot train:[/] mend {', '.join(broken)}")
    else:
        unusable = ", ".join(item.what for item in findings if item.status == "unusable")
        console.print(f"[green]ready to train[/]{f', without {unusable}' if unusable else ''}")
    return not broken
