"""Published budgets and tables, to the digit."""

import pytest

from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.generation import Limits
from megatron_hybrid.generation.decoder import Decoder
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.planner.generation import generation_memory
from megatron_hybrid.planner.hardware import GPUS
from megatron_hybrid.planner.report import Report
from megatron_hybrid.testing import run_distributed
from tests.generation.models import MODELS, built, small_config

MIB, GIB = 2**20, 2**30
DATA = ["data.mock_data=true", "data.tokenizer_type=null", "model.vocab_size=131072"]
# An A10G as Nemotron Nano 2 counts it: 95 % of what it shows, less 1.3 GiB for the engine.
A10G_GIB = 22.06 * 0.95 - 1.3


def model(*line: str) -> ModelConfig:
    return load_config([*line, *DATA]).model


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("nemotron_h_8b", 8_100_852_736), ("nemotron_h_4b", 4_489_223_040),
     ("nemotron_h_56b", 56_324_350_464), ("nemotron_nano_12b_v2", 12_310_001_152),
     ("nemotron_nano_9b_v2", 8_888_227_328)],
)  # fmt: skip
def test_weights(preset: str, parameters: int) -> None:
    """Two bytes for each parameter of the published models."""
    assert generation_memory(model(preset), 1).weights == 2 * parameters


def test_the_9b_fits_an_a10g_and_the_12b_does_not() -> None:
    """At 128k tokens and one sequence: 18.62 and 26.0 GiB, of 19.66."""
    assert round(A10G_GIB, 2) == 19.66
    small = generation_memory(model("nemotron_nano_9b_v2"), 128 * 1024, state_bytes=2)
    assert round(small.weights / GIB, 3) == 16.556
    assert small.keys_values == 2 * GIB
    assert round(small.ssm_states / GIB, 3) == 0.066
    assert round(small.total / GIB, 2) == 18.62 < A10G_GIB
    large = generation_memory(model("nemotron_nano_12b_v2"), 128 * 1024, state_bytes=2)
    assert round(large.weights / GIB, 3) == 22.929
    assert large.keys_values == 3 * GIB
    assert round(large.ssm_states / GIB, 3) == 0.068
    assert round(large.total / GIB, 1) == 26.0 > A10G_GIB


def test_parallel_heads_keep_what_both_mixers_keep() -> None:
    """Falcon-H1 0.5B: 512 bytes of keys and values a token and layer, a state of 768 KiB."""
    found = generation_memory(model("falcon_h1_0_5b", "model.vocab_size=32784"), 1000, 3)
    assert found.keys_values == 3 * 1000 * 36 * 512
    assert found.ssm_states == 3 * 36 * 24 * 64 * 128 * 4 == 3 * 36 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "recipe"),
    # Meta tokens have a sequence of their own beside those that were asked for.
    [*((name, "fp32") for name in MODELS if name != "meta tokens"),
     ("parallel heads", "bf16"), ("gated delta nets", "bf16"),
     ("mamba alone, tied", "bf16")],
)  # fmt: skip
def test_what_generate_keeps(name: str, recipe: str) -> None:
    """Byte by byte what the program's own engine allocates: states in fp32 whatever the weights
    are, and keys of layers with windows as long as another layer sees all."""
    config, tokens = small_config(name, f"precision.recipe={recipe}"), 40
    report = Report.of(config, 1, GPUS["h100"], context_tokens=tokens, batch=3)
    assert report.generation is not None
    length = min(tokens, 12) if name == "window" else tokens
    limits = Limits(max_sequences=3, max_tokens=3 * length, page_tokens=1)
    kept = run_distributed(_kept, 1, config, limits)[0]
    memory = report.generation
    assert (memory.conv_states, memory.ssm_states, memory.keys_values) == kept


def _kept(config: RunConfig, limits: Limits) -> tuple[int, int, int]:
    with built(config, limits) as generator:
        decoder = Decoder(generator.chunks, config.model)
        states = decoder.make_states(limits)
        pages = [each for pool in states.attention for each in (pool.keys, pool.values)]
        return (
            sum(slots.conv.nbytes for slots in states.mamba),
            sum(slots.ssm.nbytes for slots in states.mamba),
            # In the weights' format, but on CPUs without products of bf16.
            sum(tensor.numel() for tensor in pages) * decoder.dtype.itemsize,
        )


def test_the_pruned_7b() -> None:
    """Layers 43 to 48, 50 and 52 of the 9B dropped, and narrower: the published pattern, 7.00 B."""
    whole = model("nemotron_nano_9b_v2")
    dropped = {*range(43, 49), 50, 52}
    pattern = "".join(
        kind for n, kind in enumerate(whole.hybrid_layer_pattern, start=1) if n not in dropped
    )
    assert pattern == "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-MMMM-M-"
    pruned = model(
        "nemotron_nano_9b_v2", f"model.hybrid_layer_pattern={pattern}", "model.hidden_size=4352",
        "model.mamba_num_heads=120", "model.mamba_head_dim=80", "model.ffn_hidden_size=13824",
    )  # fmt: skip
    assert f"{count_parameters(pruned).total / 1e9:.2f}" == "7.00"


def test_llama_with_fewer_attention_layers() -> None:
    """Puzzle's table of Llama-3.1-8B with 20 of its 32 attention layers, in bf16, for 96 sequences
    of 4096 tokens in and 4096 out.
    """
    pattern = "*-" * 20 + "-" * 12
    llama = load_config(
        [
            f"model.hybrid_layer_pattern={pattern}", "model.hidden_size=4096",
            "model.ffn_hidden_size=14336", "model.activation=swiglu",
            "model.num_attention_heads=32", "model.num_query_groups=8", "model.vocab_size=128256",
            "model.position_embedding_type=rope", "data.mock_data=true",
            "data.tokenizer_type=null", "data.seq_length=8192", "training.train_iters=1",
            "optimizer.lr=1e-4",
        ]
    ).model  # fmt: skip
    counts, memory = count_parameters(llama), generation_memory(llama, 8192, 96)
    assert counts.total == 7_526_895_616
    assert counts.per_layer["*"] == 41_947_136
    assert memory.keys_values / MIB == 61_440
    one_head = memory.keys_values / MIB / 20 / 8
    assert one_head == 384
    attention = memory.keys_values + 2 * 20 * counts.per_layer["*"]
    assert attention / MIB == 63_040.15625
    assert 2 * 32 * counts.per_layer["-"] / MIB == 10_752.25
    rest = 2 * (counts.embedding + counts.final_norm)
    assert round(rest / MIB, 4) == 2_004.0078
    assert memory.total / MIB == 75_796.4140625


def test_hymba_keeps_as_little_as_published() -> None:
    """1.5B at 8k tokens in fp16, each layer by its own window and neighbours together: 77.7 MB,
    where the convolution keeps four inputs (here the three that it needs)."""
    model = load_config(["hymba_1_5b"], which=rules.NO_FILES).model
    texts = model.model_copy(update={"num_meta_tokens": 0})
    kept = generation_memory(texts, 8000, state_bytes=2, by_window=True)
    a_token = 2 * 5 * (64 + 128)
    assert kept.keys_values == (3 * 8000 + 14 * 1025) * a_token
    assert kept.total - kept.weights + 2 * 32 * 3200 == pytest.approx(77.7e6, rel=1e-3)
    longer = generation_memory(model, 8000, state_bytes=2, by_window=True)
    assert longer.keys_values - kept.keys_values == 17 * 128 * a_token
