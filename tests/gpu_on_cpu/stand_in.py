"""Makes this process one with a GPU, as far as Transformer Engine, the engine and we can tell.

    from tests.gpu_on_cpu import stand_in

    stand_in.install()

First of all, before megatron.core is imported.
"""

import importlib
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import megatron_hybrid.platform as platform
from megatron_hybrid.platform import Platform, backend
from megatron_hybrid.platform.backend import GPU_PACKAGES, OTHER_PACKAGES, Probe
from megatron_hybrid.platform.imports import hide_gpu_modules
from megatron_hybrid.platform.noise import silence
from tests.gpu_on_cpu import device, transformer_engine_torch
from tests.gpu_on_cpu.folder import find_folder

TE = "transformer_engine"
# With Transformer Engine the engine finds an optimizer for GPUs by itself.
OF_THE_CPUS_ADAM = {"Adam", "USING_PYTORCH_OPTIMIZER", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"}


def install(te_folder: Path | None = None) -> None:
    """Put the stand-ins in place, for all that this process does from now on. Once a process.

    Args:
        te_folder: holds the package transformer-engine, and is in nobody's path; None: where
            `folder.find_folder` finds it.

    Raises:
        FileNotFoundError: there is none.
    """
    assert "megatron.core" not in sys.modules, "the engine has been imported without the stand-in"
    silence()  # as `platform.initialize` does, before anything of the engine is imported
    hide_gpu_modules()
    _take_transformer_engine(te_folder or find_folder())
    for module in (_mamba_ssm(), _mamba_1()):
        sys.modules[module.__name__] = module
    device.pretend()
    _patch_engine()
    platform._initialize_once = lambda: Platform(device.memory(), "gloo", has_cuda=True)
    backend.probe = _probe


def _take_transformer_engine(folder: Path) -> None:
    """Import it from its folder, with our module in place of the compiled one."""
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = transformer_engine_torch
    # Exports to ONNX, which need packages of their own, and nobody here makes any.
    sys.modules[f"{TE}.pytorch.onnx_extensions"] = onnx = ModuleType("onnx_extensions")
    onnx.__getattr__ = lambda name: None  # type: ignore[method-assign]
    del sys.modules[TE]  # hidden
    spec = importlib.util.find_spec(TE)
    assert spec is not None and spec.loader is not None
    package = sys.modules[TE] = importlib.util.module_from_spec(spec)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it loads no libraries then
    try:
        # Before the package itself, which asks it for the compiled module.
        common = importlib.import_module(f"{TE}.common")
        common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        spec.loader.exec_module(package)
        importlib.import_module(f"{TE}.pytorch")  # the package passes over an import that fails
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]
    extensions = importlib.import_module(f"{TE}.pytorch.cpp_extensions")
    extensions.__getattr__ = partial(getattr, transformer_engine_torch)  # type: ignore[method-assign]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == TE:
            device.see_pretended_torch(module)


def _mamba_ssm() -> ModuleType:
    """Its module of fused kernels, of which we call one: here our own of the torch backend."""
    from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan

    def mamba_split_conv1d_scan_combined(
        zxbcdt: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: torch.Tensor,
        dt_bias: torch.Tensor,
        A: torch.Tensor,
        D: torch.Tensor,
        chunk_size: int,
        *,
        seq_idx: torch.Tensor | None = None,
        activation: str = "silu",
        headdim: int,
        ngroups: int = 1,
        norm_before_gate: bool = True,
        **others: Any,
    ) -> torch.Tensor:
        if others or activation != "silu":
            raise NotImplementedError(f"mamba_split_conv1d_scan_combined with {others}")
        assert seq_idx is None or seq_idx.dtype == torch.int32, seq_idx.dtype
        return mamba2_split_conv1d_scan(
            zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, head_dim=headdim,
            num_groups=ngroups, seq_idx=seq_idx, backend="torch",
        )  # fmt: skip

    module = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined  # type: ignore
    return module


def _mamba_1() -> ModuleType:
    """mamba-ssm's module of the scan of Mamba-1, by the torch backend's."""
    from megatron_hybrid.ops.selective_scan import selective_scan

    def selective_scan_fn(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        D: torch.Tensor,
        z: torch.Tensor,
        delta_bias: torch.Tensor,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (delta_softplus and return_last_state):
            raise NotImplementedError(f"{delta_softplus=}, {return_last_state=}")
        # Which its compiled code refuses otherwise.
        assert u.dtype == delta.dtype == z.dtype == B.dtype == C.dtype
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        by_token = [each.transpose(1, 2) for each in (u, delta, B, C, z)]
        x, dt, B_l, C_l, z_l = by_token
        y, state = selective_scan(x, dt, A, B_l, C_l, D, z_l, delta_bias, backend="torch")
        return y.transpose(1, 2), state

    module = ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    return module


def _patch_engine() -> None:
    """Tensors lie in the CPU's memory: what the engine needs there, it needs here."""
    from megatron_hybrid.platform.cpu import PATCHES

    for patch in PATCHES:
        if patch.name not in OF_THE_CPUS_ADAM:
            patch.apply(patch)


def _probe() -> Probe:
    """What would be found on a node with the device and all packages."""
    versions = {name: backend._version(name) for name in (*OTHER_PACKAGES, *GPU_PACKAGES)}
    return Probe(
        versions, device.NAME, (), None,
        compute_capability=torch.cuda.get_device_capability(),
    )  # fmt: skip
