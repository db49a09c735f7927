"""A model on the transformer_engine backend is that of the torch backend: nothing of what it is
made of, and of what its checkpoints hold, differs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.config import load_config, presets, rules
from megatron_hybrid.generation import ONE_RANK
from megatron_hybrid.model.tensor_names import extra_states
from tests.gpu.layers import KINDS, line
from tests.gpu_on_cpu.description import Description, describe_all
from tests.gpu_on_cpu.ranks import run_on_gpus

VOCABULARY = "model.vocab_size=4096"
LINES = {
    **{
        name: [name, *ONE_RANK, *([VOCABULARY] if name == "tiny" else [])]
        for name in presets()
        # The latter are of torch's backend alone.
        if name != "nemotron_3_nano" and not name.startswith("hymba")
    },
    # Its 2,944 experts would take seconds to make.
    "nemotron_3_nano": [
        "nemotron_3_nano", *ONE_RANK, "model.hybrid_layer_pattern=ME*E", "model.num_moe_experts=8",
    ],
    **{symbol: line(symbol, "bf16", Path("/nonexistent")) for symbol in KINDS},
    **{
        change: ["tiny", *ONE_RANK, VOCABULARY, *change.split()]
        for change in (
            "precision.recipe=fp32", "model.activation=swiglu",
            "model.untie_embeddings_and_output_weights=false",
            "model.moe_shared_expert_intermediate_size=null model.add_bias_linear=true",
            "model.mtp_num_layers=2 model.mtp_hybrid_override_pattern=*ME",
        )
    },
    "unlike layers": [
        "tiny", *ONE_RANK, VOCABULARY, "model.position_embedding_type=rope",
        "model.layers={3: {mamba_num_heads: 4, mamba_state_dim: 16}, 4: {num_attention_heads: 2,"
        " window_size: [64, 0]}, 5-8: {activation: swiglu, ffn_hidden_size: 96, mamba_head_dim: 16,"
        " num_moe_experts: 3, moe_shared_expert_intermediate_size: null, moe_latent_size: 48}}",
    ],
}  # fmt: skip
LAYOUTS = {
    "TP2 with SP": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "EP2": ["parallel.expert_model_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2", "model.hybrid_layer_pattern=M-M*|MEM-"],
}


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, Description]]:
    """Each of LINES on both backends."""
    (found,) = run_on_gpus(describe_all, 1, list(LINES.values()))
    return dict(zip(LINES, found, strict=True))


@pytest.fixture(scope="module")
def parts() -> dict[str, list[dict[str, Description]]]:
    """Each of LAYOUTS on both backends, by rank."""
    lines = [["tiny", VOCABULARY, *words] for words in LAYOUTS.values()]
    # Without memory Transformer Engine puts off what it says of norms.
    ranks = run_on_gpus(describe_all, 2, lines, values=True)
    return dict(zip(LAYOUTS, map(list, zip(*ranks, strict=True)), strict=True))


def differences(torch: Description, te: Description) -> Iterator[str]:
    """What is not the same of two backends, a line each."""
    for kind in ("parameters", "marks", "buffers", "saved"):
        one: dict[str, Any] = getattr(torch, kind)
        other: dict[str, Any] = getattr(te, kind)
        for name in sorted(one.keys() | other.keys()):
            mine, its = one.get(name, "missing"), other.get(name, "missing")
            if mine != its:
                yield f"{kind}: {name}: torch {mine}, transformer_engine {its}"


def assert_equal(model: dict[str, Description]) -> None:
    assert model["torch"].parameters and model["torch"].saved
    found = [*differences(model["torch"], model["transformer_engine"])]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", LINES)
def test_backends_are_equal(name: str, models: dict[str, dict[str, Description]]) -> None:
    """Names, shapes, dtypes, marks, and every part of every tensor of a checkpoint."""
    assert_equal(models[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backends_are_equal_on_each_rank(
    layout: str, parts: dict[str, list[dict[str, Description]]]
) -> None:
    """So are the parts that ranks have, and how they are marked and saved."""
    one, other = parts[layout]
    assert one["torch"] != other["torch"]
    assert_equal(one)
    assert_equal(other)


@pytest.mark.parametrize("name", LINES)
def test_written_states_are_those_asked_for(
    name: str, models: dict[str, dict[str, Description]]
) -> None:
    """A checkpoint that was imported or upcycled has what Transformer Engine asks for elsewhere."""
    model = load_config(LINES[name], which=rules.NO_FILES).model
    assert models[name]["transformer_engine"].states <= set(extra_states(model))
