"""The patch table against the installed engine: an update that moves a place is told by name."""

import ast
import inspect
import logging
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_hybrid.platform import cpu, initialize
from megatron_hybrid.platform.cpu import PATCHES, Patch
from megatron_hybrid.platform.torch_view import CUDA_NAMES, FACTORIES

# What our replacements of functions are called with.
ARGUMENTS = {
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": (
        ["new_state", "device", "graph_safe"],
        cpu.set_rng_state,
    ),
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": (
        ["tensor", "as_numpy", "record_stream"],
        cpu.move_tensor_to_cpu,
    ),
    "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue": (
        ["mp_mode"],
        cpu.results_file,
    ),
}

# Files that serve only GPUs, inference, or models that are not built here.
NOT_ON_THE_PATH = (
    "distributed/fsdp/",
    "energy_monitor.py",
    "export/",
    "extensions/",
    "fault_injector.py",
    "full_cuda_graph.py",
    "inference/",
    "models/T5",
    "models/audio",
    "models/bert",
    "models/huggingface",
    "models/mimo",
    "models/multimodal",
    "models/vision",
    "nccl_allocator.py",
    "optimizer/cpu_offloading/",
    "optimizer/optimizer_cuda_graph.py",
    "pipeline_parallel/fine_grained",
    "post_training/",
    "resharding/",
    "ssm/ops/",
    "transformer/cuda_graphs.py",
    "transformer/custom_layers",
    "transformer/experimental_attention_variant/",
    "transformer/moe/paged_stash.py",
)

# Names that the view leaves to the real torch.cuda: they work there, or are not come to.
LEFT_TO_TORCH = {
    "BFloat16Tensor": "a type, compared with",
    "FloatTensor": "a type, compared with",
    "HalfTensor": "a type, compared with",
    "OutOfMemoryError": "a type, caught",
    "is_available": "answers False",
    "CUDAGraph": "CUDA graphs, which are off",
    "amp": "for torch before 2.4",
    "clock_rate": "the straggler detector, which is off without CUDA",
    "default_generators": "in _set_cuda_rng_state, replaced, and for CUDA graphs",
    "get_device_capability": "the flex dispatcher, which needs DeepEP",
    "power_draw": "the straggler detector, which is off without CUDA",
    "set_device": "persistent checkpoint writers, which are started only with CUDA",
    "temperature": "the straggler detector, which is off without CUDA",
    "utilization": "the straggler detector, which is off without CUDA",
}

by_name = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.where)


def engine_root() -> Path:
    """The folder of megatron.core, found without importing it."""
    spec = find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "core"


@cache
def sources() -> dict[str, str]:
    """Source text of each file that a training run may come through, by its path in the engine."""
    root = engine_root()
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
    return {
        name: text for name, text in sorted(texts.items()) if not name.startswith(NOT_ON_THE_PATH)
    }


def source_of(module: str) -> str:
    inside = module.removeprefix("megatron.core").replace(".", "/").lstrip("/")
    for name in (f"{inside}.py", f"{inside}/__init__.py".lstrip("/")):
        if (path := engine_root() / name).is_file():
            return path.read_text()
    pytest.fail(f"the module {module} is gone")


def definition(tree: ast.AST, parts: list[str]) -> ast.AST | None:
    """The class or function of a dotted name, also where an `if` or `try` wraps it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == parts[0]:
            return node if len(parts) == 1 else definition(node, parts[1:])
    return None


@by_name
def test_place_still_needs_its_patch(patch: Patch) -> None:
    """The place exists, and its source holds the construct that the patch is there for."""
    if patch.module == "torch":
        assert any(patch.construct in text for text in sources().values()), patch.construct
        return
    text = source_of(patch.module)
    found = definition(ast.parse(text), patch.name.split("."))
    if found is not None:
        # Through the parser, so that quotes and line breaks do not matter.
        text = ast.unparse(found)
    else:
        assert "." not in patch.name, f"{patch.where} is gone"
        assert patch.name in text, f"{patch.where} is gone"
    assert patch.construct in text, f"{patch.where} no longer has {patch.construct!r}"


@pytest.mark.parametrize("where", ARGUMENTS)
def test_replaced_function_is_called_as_before(where: str) -> None:
    """A function that we replace has the arguments that ours takes, by the same names."""
    module, name = where.rsplit(".", 1)
    found = definition(ast.parse(source_of(module)), [name])
    assert isinstance(found, ast.FunctionDef), f"{where} is gone"
    expected, ours = ARGUMENTS[where]
    assert [argument.arg for argument in found.args.args] == expected
    code = ours.__code__
    assert list(code.co_varnames[: code.co_argcount]) == expected


def test_every_use_of_torch_cuda_is_known() -> None:
    """What the training path calls of torch.cuda is in the view, or listed as not needed there."""
    used: dict[str, str] = {}
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                used.setdefault(node.attr, f"{name}:{node.lineno}")
    unknown = {attribute: used[attribute] for attribute in used.keys() - known_cuda_names()}
    assert not unknown, f"new in the engine: {unknown}"
    assert not known_cuda_names() - used.keys(), "no longer used by the engine"


def known_cuda_names() -> set[str]:
    return CUDA_NAMES.keys() | LEFT_TO_TORCH.keys()


def test_every_factory_on_cuda_is_known() -> None:
    """What the training path makes with device="cuda" goes through the view."""
    used: dict[str, str] = {}
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                if keyword.arg == "device" and ast.unparse(keyword.value) == "'cuda'":
                    used.setdefault(ast.unparse(node.func), f"{name}:{node.lineno}")
    used.pop("torch.cuda.Stream")
    assert used.keys() == {f"torch.{factory}" for factory in FACTORIES}, used


def print_changed_places(cuda: bool) -> None:
    """In a fresh process: import the engine, initialize the platform, print what has changed.

    With `cuda` torch is made to say that there is a CUDA device, which is all that we ask it.
    """
    import torch

    before = [(patch.where, place_now(patch)) for patch in PATCHES]
    modules = set(sys.modules)
    if cuda:
        torch.cuda.is_available = lambda: True
        torch.cuda.current_device = lambda: 0
    finders = list(sys.meta_path)
    assert initialize().has_cuda == cuda
    for (where, old), patch in zip(before, PATCHES, strict=True):
        if any(one is not other for one, other in zip(old, place_now(patch), strict=True)):
            print(where)
    if cuda:
        assert sys.meta_path == finders
        assert "megatron_hybrid.layers" not in set(sys.modules) - modules
    else:
        print("still compiled:", *compiled_functions())


def place_now(patch: Patch) -> tuple[object, ...]:
    """The object at the place, the constants of its code, and the log filters beside it."""
    found = cpu.resolve(patch)
    code = getattr(getattr(found, "__func__", found), "__code__", None)
    filters = logging.getLogger(patch.module).filters if patch.name.endswith("fork") else []
    return found, code and code.co_consts, len(filters)


def compiled_functions() -> list[str]:
    return [
        f"{module}.{name}"
        for module, loaded in list(sys.modules.items())
        if module.startswith("megatron.core")
        for name, value in vars(loaded).items()
        if inspect.isfunction(value) and hasattr(value, "_torchdynamo_orig_callable")
    ]


@cache
def changed_places(cuda: bool) -> list[str]:
    result = subprocess.run(
        [
            sys.executable,
            *("-W", "ignore", "-c"),
            f"from {__name__} import *; print_changed_places({cuda})",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@by_name
def test_patch_is_applied_without_cuda(patch: Patch) -> None:
    """Each place changes, even where the engine was imported before the platform was initialized.

    A patch that does nothing is caught by name.
    """
    assert patch.where in changed_places(cuda=False)


def test_functions_compiled_before_are_plain_again() -> None:
    """Functions that the engine compiled as it was imported are put back."""
    assert changed_places(cuda=False)[-1] == "still compiled:"


def test_nothing_is_patched_with_cuda() -> None:
    """Where torch has a CUDA device no place of the table changes and no import hook is there."""
    assert changed_places(cuda=True) == []
