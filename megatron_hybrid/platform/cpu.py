"""megatron-core without CUDA: every place that has to change, why, and the change.

`PATCHES` is the whole list. `tests/platform/test_patched_places.py` holds each entry against the
installed engine's source, so that an engine update which moves a patched place is told by name.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hybrid.platform.adam import Adam
from megatron_hybrid.platform.results_file import ResultsFile
from megatron_hybrid.platform.torch_view import ENGINE_TORCH

ENGINE = "megatron.core"


@dataclass(frozen=True)
class Patch:
    """One place of megatron-core that cannot run without CUDA as it is.

    Attributes:
        module: the module that holds the place.
        name: the place in that module, dotted inside a class.
        reason: what happens there on a machine without CUDA.
        construct: source text of the place that causes it; once it is gone, so is the reason.
        apply: makes the change; called once, imports what it needs.
    """

    module: str
    name: str
    reason: str
    construct: str
    apply: Callable[[Patch], None]

    @property
    def where(self) -> str:
        """The full dotted place."""
        return f"{self.module}.{self.name}"


def resolve(patch: Patch) -> Any:
    """The object now at the patched place; AttributeError where there is none."""
    found: Any = importlib.import_module(patch.module)
    for part in patch.name.split("."):
        found = inspect.getattr_static(found, part)
    return found


def replace_by(new: Any) -> Callable[[Patch], None]:
    """A change: put `new` in the place, and wherever the engine imported the old object from it."""

    def apply(patch: Patch) -> None:
        old = resolve(patch)
        for module in _engine_modules():
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)

    return apply


def set_to(value: Any) -> Callable[[Patch], None]:
    """A change: give the place, a plain flag or a name of this one module, another value."""

    def apply(patch: Patch) -> None:
        setattr(importlib.import_module(patch.module), patch.name, value)

    return apply


def accept_cpu_types(patch: Patch) -> None:
    """A change: in the place's code, the type strings of CUDA tensors become those of CPU ones."""
    function = resolve(patch)
    function = getattr(function, "__func__", function)
    function.__code__ = _with_cpu_types(function.__code__)


def _with_cpu_types(constant: Any) -> Any:
    """`constant` (of a function's code) with "torch.cuda.FloatTensor" as "torch.FloatTensor"."""
    if isinstance(constant, types.CodeType):
        return constant.replace(co_consts=tuple(_with_cpu_types(c) for c in constant.co_consts))
    if isinstance(constant, tuple):
        return tuple(_with_cpu_types(c) for c in constant)
    if isinstance(constant, str):
        return constant.replace("torch.cuda.", "torch.")
    return constant


def set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the CPU generator's state: on a CPU it is the one that layers draw from."""
    del device, graph_safe
    torch.set_rng_state(new_state)


def without_rng_warning(patch: Patch) -> None:
    """A change: drop the place's warning that the CPU generator moved: here it is meant to."""
    text = "CPU RNG state changed within GPU RNG context"
    logging.getLogger(patch.module).addFilter(lambda record: record.getMessage() != text)


def move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`tensor` as a numpy array where that is asked for; all_to_all_single wants its splits so."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def results_file(mp_mode: str = "spawn") -> ResultsFile:
    """How a checkpoint's writer reports back: through a file, for which nothing is started."""
    del mp_mode
    return ResultsFile()


def stay_on_cpu_for_engine(patch: Patch) -> None:
    """A change: `tensor.cuda()` returns the tensor itself to the engine, and raises for others."""
    del patch
    to_cuda = torch.Tensor.cuda

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return self if _is_engine(caller) else to_cuda(self, *args, **kwargs)

    torch.Tensor.cuda = cuda  # type: ignore[assignment, method-assign]


def in_every_module(change: Callable[[types.ModuleType], None]) -> Callable[[Patch], None]:
    """A change: apply `change` to each engine module, those loaded and those still to come."""

    def apply(patch: Patch) -> None:
        del patch
        for module in _engine_modules():
            change(module)
        _EngineFinder.installed().changes.append(change)

    return apply


def see_cpu_torch(module: types.ModuleType) -> None:
    """Let `module` see torch as `ENGINE_TORCH`."""
    if getattr(module, "torch", None) is torch:
        module.torch = ENGINE_TORCH  # type: ignore[attr-defined]


def leave_uncompiled(patch: Patch) -> None:
    """A change: `torch.compile` returns the engine's functions themselves, and compiles others'.

    To only ask for it imports torch's compiler, a third of a rank's start.
    """
    compiles = torch.compile

    def compile_(model: Any = None, **options: Any) -> Any:
        if not _is_engine(sys._getframe(1).f_globals.get("__name__", "")):
            return compiles(model, **options)
        return model if model is not None else lambda function: function

    torch.compile = compile_
    in_every_module(do_not_compile)(patch)


def do_not_compile(module: types.ModuleType) -> None:
    """Leave `module`'s small functions uncompiled."""
    if module.__name__ == f"{ENGINE}.jit":
        module.disable_jit_fuser()
    # Compiled ones are there only if the engine was imported before the platform was initialized.
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    for holder in (module, *classes):
        for name, value in list(vars(holder).items()):
            if hasattr(value, "_torchdynamo_orig_callable") and inspect.isfunction(value):
                setattr(holder, name, vars(value)["_torchdynamo_orig_callable"])


class _EngineFinder(importlib.abc.MetaPathFinder):
    """Imports engine modules as Python does, then makes the changes that each of them needs."""

    def __init__(self) -> None:
        self.changes: list[Callable[[types.ModuleType], None]] = []

    @staticmethod
    def installed() -> _EngineFinder:
        """The one finder of this process, put before Python's own."""
        for finder in sys.meta_path:
            if isinstance(finder, _EngineFinder):
                return finder
        finder = _EngineFinder()
        sys.meta_path.insert(0, finder)
        return finder

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_engine(fullname):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then_change(module: types.ModuleType) -> None:
            run(module)
            for change in self.changes:
                change(module)

        spec.loader.exec_module = run_then_change  # type: ignore[method-assign]
        return spec


def _is_engine(module_name: str) -> bool:
    return module_name == ENGINE or module_name.startswith(f"{ENGINE}.")


def _engine_modules() -> list[types.ModuleType]:
    return [module for name, module in list(sys.modules.items()) if _is_engine(name)]


OPTIMIZER = f"{ENGINE}.optimizer"
TYPE_STRINGS = "parameters are sorted by type strings such as torch.cuda.FloatTensor"

# In this order: the first three have to be there before the engine's modules are imported.
PATCHES: tuple[Patch, ...] = (
    Patch(
        ENGINE,
        "torch",
        "every module calls torch.cuda or makes tensors with device='cuda'",
        "import torch",
        in_every_module(see_cpu_torch),
    ),
    Patch(
        f"{ENGINE}.jit",
        "jit_fuser",
        "compiles small functions: seconds each, and a C++ compiler that a laptop may not have",
        "jit_fuser = torch.compile",
        leave_uncompiled,
    ),
    Patch(
        "torch",
        "Tensor.cuda",
        "the engine moves tensors with .cuda() when it loads checkpoints and broadcasts data",
        ".cuda()",
        stay_on_cpu_for_engine,
    ),
    Patch(
        f"{ENGINE}.tensor_parallel.random",
        "_set_cuda_rng_state",
        "sets CUDA's generator through a call that torch puts off until CUDA starts",
        "_lazy_call(cb)",
        replace_by(set_rng_state),
    ),
    Patch(
        f"{ENGINE}.tensor_parallel.random",
        "CudaRNGStatesTracker.fork",
        "warns at every dropout that the CPU generator has moved",
        "'CPU RNG state changed within GPU RNG context'",
        without_rng_warning,
    ),
    Patch(
        OPTIMIZER,
        "Adam",
        "torch's Adam keeps `step` for each parameter: resharded checkpoints do not load",
        "from torch.optim import AdamW as Adam",
        set_to(Adam),
    ),
    Patch(
        OPTIMIZER,
        "USING_PYTORCH_OPTIMIZER",
        "chooses torch's Adam whatever `Adam` is",
        "USING_PYTORCH_OPTIMIZER = True",
        set_to(False),
    ),
    Patch(
        f"{OPTIMIZER}.distrib_optimizer",
        "Adam",
        "accepts only the Adam that it knows",
        "from torch.optim import Adam as Adam",
        set_to(Adam),
    ),
    Patch(
        f"{OPTIMIZER}.distrib_optimizer",
        "HAVE_APEX_OR_TE",
        "looks for torch's `step` of each parameter in checkpoints",
        "HAVE_APEX_OR_TE = False",
        set_to(True),
    ),
    Patch(
        f"{OPTIMIZER}.distrib_optimizer",
        "USING_APEX_OPTIMIZER",
        "looks for the `step` of each group only when it knows of FusedAdam",
        "USING_APEX_OPTIMIZER = False",
        set_to(True),
    ),
    Patch(
        f"{OPTIMIZER}.distrib_optimizer",
        "DistributedOptimizer.__init__",
        TYPE_STRINGS,
        "'torch.cuda.BFloat16Tensor'",
        accept_cpu_types,
    ),
    Patch(
        f"{OPTIMIZER}.distrib_optimizer",
        "DistributedOptimizer._build_model_and_main_param_groups",
        TYPE_STRINGS,
        "'torch.cuda.FloatTensor'",
        accept_cpu_types,
    ),
    Patch(
        f"{OPTIMIZER}.optimizer",
        "Float16OptimizerWithFloat16Params.__init__",
        TYPE_STRINGS,
        "'torch.cuda.FloatTensor'",
        accept_cpu_types,
    ),
    Patch(
        f"{OPTIMIZER}.clip_grads",
        "clip_grad_by_total_norm_fp32",
        "asserts that gradients are CUDA tensors",
        "'torch.cuda.FloatTensor'",
        accept_cpu_types,
    ),
    Patch(
        f"{ENGINE}.transformer.moe.moe_utils",
        "maybe_move_tensor_to_cpu",
        "leaves the split sizes of CPU tensors as tensors, which all_to_all_single refuses",
        "tensor.is_cuda",
        replace_by(move_tensor_to_cpu),
    ),
    Patch(
        f"{ENGINE}.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        "starts a manager process in each rank, which imports torch and the main script again",
        "ctx.Manager().Queue()",
        replace_by(results_file),
    ),
)


def apply_patches() -> int:
    """Make megatron-core run on the CPU; returns the number of patched places. Call once."""
    for patch in PATCHES:
        patch.apply(patch)
    return len(PATCHES)
