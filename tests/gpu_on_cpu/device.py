"""A pretended CUDA device, whose memory is the CPU's, for a whole process and all its threads."""

import contextlib
from collections.abc import Callable
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from megatron_hybrid.platform.torch_view import CPU, CUDA_NAMES, TorchView

HOPPER = (9, 0)
NAME = "NVIDIA H100 (pretended)"
MEMORY_BYTES = 80 * 2**30
DEVICES = 8
# Those that Transformer Engine calls with device="cuda".
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
_PROPERTIES = SimpleNamespace(
    name=NAME, major=HOPPER[0], minor=HOPPER[1], multi_processor_count=132,
    total_memory=MEMORY_BYTES, gcnArchName="",
)  # fmt: skip


_REAL_TO = torch.Tensor.to


def set_capability(capability: tuple[int, int]) -> None:
    """The compute capability of the device from now on; what was asked before is not forgotten."""
    _PROPERTIES.major, _PROPERTIES.minor = capability


def pretend() -> None:
    """Let torch say that this process has one CUDA device, and take tensors there and back."""
    names: dict[str, Any] = CUDA_NAMES | {
        "device_count": lambda: DEVICES,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: _PROPERTIES,
        "get_device_capability": lambda device=None: (_PROPERTIES.major, _PROPERTIES.minor),
        "get_device_name": lambda device=None: NAME,
        "device": lambda device: contextlib.nullcontext(),
        "default_generators": (torch.default_generator,),
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
        **{
            name: lambda device=None: 0
            for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated",
                         "memory_reserved")
        },
    }  # fmt: skip
    del names["random"]  # a module, of which torch itself uses more than we have
    for name, value in names.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.is_cuda = property(lambda self: self.device.type != "meta")
    torch.Tensor.to = _to
    torch.Tensor.pin_memory = lambda self, *_: self
    for holder in (torch.Tensor, torch.nn.Module):
        holder.cuda = lambda self, *_, **__: self


def _cpu_for_cuda(device: Any) -> Any:
    """The CPU in place of a CUDA device; anything else as it is."""
    is_cuda = str(device).startswith("cuda") if isinstance(device, str | torch.device) else False
    return CPU if is_cuda else device


def _to(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    arguments = tuple(map(_cpu_for_cuda, arguments))
    return _REAL_TO(tensor, *arguments, **{k: _cpu_for_cuda(v) for k, v in named.items()})


def _on_cpu(name: str) -> Callable[..., torch.Tensor]:
    """A factory that makes its tensor in the CPU's memory where a GPU's was asked for."""
    real = getattr(torch, name)

    @wraps(real)
    def make(*arguments: Any, device: Any = None, **named: Any) -> torch.Tensor:
        return real(*arguments, device=_cpu_for_cuda(device), **named)

    return make


# What Transformer Engine sees as torch.
TORCH = TorchView(torch, {name: _on_cpu(name) for name in FACTORIES})


def see_pretended_torch(module: ModuleType) -> None:
    """Let a module that says "cuda" to torch's factories get what lies in the CPU's memory."""
    if getattr(module, "torch", None) is torch:
        module.torch = TORCH  # type: ignore[attr-defined]
