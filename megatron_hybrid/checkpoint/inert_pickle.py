"""Read a pickle without running any of it: classes and functions become `Opaque` records.

torch's own `weights_only` refuses what it does not know; Megatron-LM's checkpoints hold their
arguments as objects of many classes, of which we want the numbers and strings.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from megatron_hybrid.checkpoint.errors import CheckpointError

_PLAIN = {"collections.OrderedDict": dict, "builtins.set": set, "torch.Size": tuple}


class Opaque:
    """What a pickle would have made by calling `path`; a record of that call.

    Attributes:
        path: the class or function that the pickle names, as `module.name`.
        args: positional arguments of the call.
        state: of the object, where it is not a dict of attributes.
        __dict__: holds the object's attributes, too, if it has any.
    """

    path = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.__dict__.update(kwargs)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})
        else:
            self.state = state


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Callable[[str, str], bool]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in _PLAIN:
            return _PLAIN[path]
        dtype = torch.__dict__.get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if not self._allowed(module, name):
            raise CheckpointError(f"opening it would call {path}")
        return type(name, (Opaque,), {"path": path})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_pickle(data: bytes, allowed: Callable[[str, str], bool] = lambda *_: True) -> Any:
    """What a pickle holds: plain values as they are, everything else as `Opaque`.

    Args:
        allowed: which names (module, name) a pickle of its kind may hold. Nothing is called in any
            case; but what holds others was not made by whom it seems to be.

    Raises:
        CheckpointError: it names something that is not allowed.
        Exception: of any kind, where the bytes are no pickle.
    """
    return _Reader(data, allowed).load()
