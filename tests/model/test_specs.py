"""The table of the backends: complete, of names that exist, and in step with the engine's specs."""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import megatron.core
import pytest
from megatron.core.models.hybrid import hybrid_layer_specs as engine_specs
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layers.mamba1 import Mamba1Mixer
from megatron_hybrid.layers.mamba2 import Mamba2Mixer
from megatron_hybrid.layers.parallel_heads import JoinFactors
from megatron_hybrid.layers.router import TopKRouter
from megatron_hybrid.model.served import SERVED, served
from megatron_hybrid.model.specs import hybrid_stack_spec, layer_classes

ENGINE = Path(megatron.core.__path__[0])
MODEL = ModelConfig(hybrid_layer_pattern="M*-E", hidden_size=8)
MAMBA_1 = MODEL.model_copy(
    update={"mamba_version": 1, "mamba_intermediate_size": 128, "mamba_dt_rank": 4}
)
NAMES = sorted({name for row in SERVED.values() for name in row[:2]})
# Where the engine imports what may not be installed here.
ENGINE_IMPORTS = {
    "mamba_ssm": "ssm/mamba_mixer.py",
    "causal_conv1d": "ssm/mamba_mixer.py",
    "transformer_engine": "optimizer/__init__.py",
}


# Of a package that is not here, and nothing of which the engine imports: it has no Mamba-1.
UNSEEN = {"mamba_ssm.ops.selective_scan_interface:selective_scan_fn"}


def defined(tree: ast.AST) -> set[str]:
    """Names that a module's source defines or imports, within `if` and `try` too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def parts(spec: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every class and function within a spec, by its place."""
    if isinstance(spec, ModuleSpec):
        yield f"{place}.module", spec.module
        yield from parts(spec.submodules, place)
    elif isinstance(spec, partial):
        yield f"{place}.func", spec.func
        for name, value in spec.keywords.items():
            yield from parts(value, f"{place}.{name}")
    elif is_dataclass(spec) and not isinstance(spec, type):
        for field in fields(spec):
            yield from parts(getattr(spec, field.name), f"{place}.{field.name}")
    else:
        yield place, spec


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name: str) -> None:
    """Each name is in the source of its module; of a package that is not here, in the engine's."""
    module, _, attribute = name.partition(":")
    package = module.partition(".")[0]
    if name in UNSEEN and find_spec(package) is None:
        pytest.skip("mamba-ssm is not installed")
    if package in ENGINE_IMPORTS and find_spec(package) is None:
        tree = ast.parse((ENGINE / ENGINE_IMPORTS[package]).read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == module
            for alias in node.names
        }
        assert attribute in imported, f"the engine does not import {name}"
        return
    found = find_spec(module)
    assert found is not None and found.origin is not None
    assert attribute in defined(ast.parse(Path(found.origin).read_text()))


def test_every_row_has_both_columns() -> None:
    """No part of the model is served on one backend only, and all that is handed on is a row."""
    for part, row in SERVED.items():
        assert all(text.count(":") == 1 for text in row[:2]), part
        assert row.by, part
    handed_on = {part for part, row in SERVED.items() if row.by == "specs"}
    looked_up = set(layer_classes("torch")._fields) - {"mamba_kernel", "moe"}
    assert handed_on == looked_up | {"moe_layer", "moe_router"}


def test_torch_column_is_what_is_built() -> None:
    """The specs of the torch backend hold the table's classes, experts and router too."""
    built = dict(parts(hybrid_stack_spec("torch", MODEL)))
    moe = ".moe_layer.mlp.submodules"
    for place, part in {
        ".module": "stack",
        ".mamba_layer.mixer.module": "mamba_mixer",
        ".mamba_layer.mixer.in_proj": "norm_and_column_linear",
        ".mamba_layer.mixer.out_proj": "row_linear",
        ".attention_layer.self_attention.core_attention": "core_attention",
        ".moe_layer.pre_mlp_layernorm": "norm",
        ".moe_layer.mlp.func": "moe_layer",
        f"{moe}.router": "moe_router",
        f"{moe}.experts.func": "moe_experts",
        f"{moe}.experts.submodules.linear_fc1": "moe_expert_column_linear",
        f"{moe}.experts.submodules.linear_fc2": "moe_expert_row_linear",
    }.items():
        assert built[place] is served(part, "torch"), place


def test_transformer_engine_column_is_the_engines() -> None:
    """Layer by layer the classes of megatron-core's own hybrid specs, but for what we name here.

    Without Transformer Engine the engine's classes are stand-ins, each an object of its own, so
    that taking one for another shows all the same.
    """
    ours = dict(parts(hybrid_stack_spec("transformer_engine", MODEL)))
    others = ("gdn_layer", "dsa_layer", "mla_layer", "mtp_block_spec")
    engine = {
        place: part
        for place, part in parts(engine_specs.hybrid_stack_spec)
        if not place.startswith(tuple(f".{other}" for other in others))
    }
    ours = {
        place: part
        for place, part in ours.items()
        if not place.startswith(tuple(f".{other}" for other in others))
    }
    assert ours.keys() == engine.keys()
    different = {place: ours[place] for place in ours if ours[place] != engine[place]}
    assert different == {
        # Parameters of the engine's names and shapes; runs on any device, A_log stays in fp32.
        ".mamba_layer.mixer.module": Mamba2Mixer,
        # Its expert load is seen, and it runs without CUDA.
        ".moe_layer.mlp.submodules.router": TopKRouter,
    }


def test_transformer_engine_kernel_is_mamba_ssms() -> None:
    """The mixer is told to run mamba-ssm's scan on GPUs, and ours elsewhere."""
    for backend, kernel in (("torch", "torch"), ("transformer_engine", "mamba_ssm")):
        spec = hybrid_stack_spec(backend, MODEL).submodules.mamba_layer.submodules.mixer
        assert spec.params == {"kernel": kernel}
        spec = hybrid_stack_spec(backend, MAMBA_1).submodules.mamba_layer.submodules.mixer
        assert spec.module is Mamba1Mixer
        assert spec.params == {"kernel": kernel, "intermediate_size": 128, "dt_rank": 4}


def test_parallel_heads_are_made_of_the_same_parts() -> None:
    """One norm for both mixers, linears without one, and factors only where the model has them."""
    fields = {"hybrid_layer_pattern": "*H", "hidden_size": 8, "mamba_rms_norm": False}
    factors = {
        "ssm_in_multiplier": 2.0,
        "ssm_multipliers": (1, 3, 1, 1, 1),
        "ssm_out_multiplier": 4,
    }
    for backend in ("torch", "transformer_engine"):
        plain, own = (
            hybrid_stack_spec(backend, ModelConfig(**fields, **more)).submodules.attention_layer
            for more in ({}, factors)
        )
        assert plain.params["kinds"] == {2: "H"}
        heads = own.params["specs"]["H"]
        assert heads.submodules.input_layernorm is served("norm", backend)
        column = served("column_linear", backend)
        assert heads.submodules.self_attention.submodules.linear_qkv is column
        assert heads.submodules.mixer.submodules.in_proj is column
        assert heads.submodules.mixer.params["multipliers"] == (2, 6, 2, 2, 2)
        assert heads.params["factors"] == JoinFactors(ssm_out=4)
        mixer = plain.params["specs"]["H"].submodules.mixer
        assert mixer.params.keys() == {"kernel", "gated_norm"}
