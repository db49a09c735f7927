"""What megatron-core sees as `torch` on a machine without CUDA.

megatron-core writes `torch.cuda.current_device()` and `torch.zeros(..., device="cuda")` all over.
Each of its modules is given `ENGINE_TORCH` under the name `torch`: the real torch, seen through an
object on which those few names mean the CPU. The real torch, which the rest of the process uses,
is left as it is. An attribute read through the view costs about 0.1 microseconds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")

# The factories which megatron-core calls with device="cuda" where a CPU run gets to.
FACTORIES = ("empty", "empty_like", "ones", "tensor", "zeros")


class TorchView:
    """A module with some names replaced; every other name is read from the module when used.

    Args:
        module: the module seen through this view.
        replaced: what to show instead of the module's own attribute, by name.
    """

    def __init__(self, module: ModuleType, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced)
        self.__dict__["viewed_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["viewed_module"], name)


class Stream:
    """The one order in which a CPU computes: every stream equals every other, waits are over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs  # device and priority: there is nothing to choose

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Stream) -> None:
        del stream

    def wait_event(self, event: Event) -> None:
        del event

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Event:
    """A mark in the one stream: what it marks has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs  # timing, blocking, interprocess: CUDA's

    def record(self, stream: Stream | None = None) -> None:
        del stream

    def wait(self, stream: Stream | None = None) -> None:
        del stream

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_STREAM = Stream()


@contextlib.contextmanager
def _stream_context(stream: Stream | None) -> Iterator[None]:
    del stream
    yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """For what has no meaning without CUDA: synchronize, empty_cache, NVTX ranges."""


def _get_rng_state(device: Any = None) -> torch.Tensor:
    del device
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    del device
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _on_cpu(factory_name: str) -> Callable[..., torch.Tensor]:
    """`torch.<factory_name>` that makes its tensor in the CPU's memory, whatever was asked for."""

    # Looked up at each call, so that a test may replace the real factory.
    @functools.wraps(getattr(torch, factory_name))
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(device, str) and device.startswith("cuda"):
            device = CPU
        kwargs.pop("pin_memory", None)  # pages are locked for copies to a GPU
        return getattr(torch, factory_name)(*args, device=device, **kwargs)

    return make


CUDA_NAMES: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "current_device": lambda: CPU,
    "current_stream": lambda device=None: _STREAM,
    "device_count": lambda: 1,
    "empty_cache": _nothing,
    "get_rng_state": _get_rng_state,
    "is_current_stream_capturing": lambda: False,
    "manual_seed": _manual_seed,
    "nvtx": SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    "random": SimpleNamespace(get_rng_state=_get_rng_state),
    "set_rng_state": _set_rng_state,
    "stream": _stream_context,
    "synchronize": _nothing,
}

ENGINE_TORCH = TorchView(
    torch,
    {
        "cuda": TorchView(torch.cuda, CUDA_NAMES),
        **{name: _on_cpu(name) for name in FACTORIES},
    },
)
