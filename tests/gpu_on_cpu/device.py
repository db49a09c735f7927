"""Pretended CUDA devices, whose memory is the CPU's, for a whole process and all its threads."""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from megatron_hybrid.platform.torch_view import CPU, CUDA_NAMES, ENGINE_TORCH, TorchView

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
_memory = CPU


def memory() -> torch.device:
    """Where tensors of the device are."""
    return _memory


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """For the time of the block tensors of the device are torch's "meta": shapes without values."""
    global _memory
    _memory = torch.device("meta")
    try:
        yield
    finally:
        _memory = CPU


def set_capability(capability: tuple[int, int]) -> None:
    """The compute capability of the device from now on; what was asked before is not forgotten."""
    _PROPERTIES.major, _PROPERTIES.minor = capability


def pretend() -> None:
    """Let torch say that there are CUDA devices, and leave tensors that go there where they are."""
    names: dict[str, Any] = CUDA_NAMES | {
        "device_count": lambda: DEVICES,
        "current_device": memory,
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
    ENGINE_TORCH.cuda.current_device = memory
    del names["random"]  # a module, of which torch itself uses more than we have
    for name, value in names.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.is_cuda = property(lambda self: self.device.type != "meta")
    torch.Tensor.to = _to
    torch.Tensor.pin_memory = lambda self, *_: self
    for holder in (torch.Tensor, torch.nn.Module):
        holder.cuda = lambda self, *_, **__: self


def _real(device: Any) -> Any:
    """The memory of the pretended device in place of a CUDA device; anything else as it is."""
    is_device = isinstance(device, str | torch.device)
    return _memory if is_device and str(device).startswith("cuda") else device


def _to(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    arguments = tuple(map(_real, arguments))
    return _REAL_TO(tensor, *arguments, **{k: _real(v) for k, v in named.items()})


def _on_device(name: str) -> Callable[..., torch.Tensor]:
    """A factory that makes its tensor in our memory where a GPU's was asked for."""
    factory = getattr(torch, name)

    @wraps(factory)
    def make(*arguments: Any, device: Any = None, **named: Any) -> torch.Tensor:
        return factory(*arguments, device=_real(device), **named)

    return make


# What Transformer Engine sees as torch.
TORCH = TorchView(torch, {name: _on_device(name) for name in FACTORIES})


def see_pretended_torch(module: ModuleType) -> None:
    """Let a module that says "cuda" to torch's factories get what lies in our memory."""
    if getattr(module, "torch", None) is torch:
        module.torch = TORCH  # type: ignore[attr-defined]
