"""Counts by formula: the exact totals of the papers, and FLOPs that hand counts confirm."""

import pytest

from megatron_hybrid.config import ModelConfig, load_config, rules
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.model.counts import count_parameters, flops_per_token

PER_LAYER = {
    "nemotron_h_8b": (8_100_852_736, 109_640_064, 41_947_136, 176_164_864),
    "nemotron_h_4b": (4_489_223_040, 72_752_464, 31_460_352, 75_500_544),
    "nemotron_h_56b": (56_324_350_464, 438_432_512, 151_003_136, 536_879_104),
    "nemotron_nano_12b_v2": (12_310_001_152, 168_504_704, 62_919_680, 209_720_320),
    "nemotron_nano_9b_v2": (8_888_227_328, 147_450_624, 55_054_720, 140_497_280),
}
LAYERS = {
    "nemotron_h_8b": (24, 4, 24),
    "nemotron_h_4b": (24, 4, 24),
    "nemotron_h_56b": (54, 10, 54),
    "nemotron_nano_12b_v2": (28, 6, 28),
    "nemotron_nano_9b_v2": (27, 4, 25),
}


def model(*words: str) -> ModelConfig:
    return load_config(words, which=rules.NO_FILES).model


@pytest.mark.parametrize("name", PER_LAYER)
def test_published_models(name: str) -> None:
    """Layers of each kind, parameters of one of each, and the total, to the last parameter."""
    counts = count_parameters(model(name))
    assert (counts.total, *(counts.per_layer[kind] for kind in "M*-")) == PER_LAYER[name]
    assert tuple(counts.layers[kind] for kind in "M*-") == LAYERS[name]
    assert counts.active == counts.total


# Candidates of the published width search, cut from the 8B model: its figures to the last digit.
MINITRON = {
    (3072, 12288, 112): 4_489_223_040,
    (3072, 10752, 128): 4_490_551_296,
    (3328, 9984, 112): 4_495_167_616,
}


@pytest.mark.parametrize(("hidden", "ffn", "heads"), MINITRON)
def test_pruned_widths(hidden: int, ffn: int, heads: int) -> None:
    """The three best rows of Minitron-SSM's search (arXiv:2504.11409), by words on the parent."""
    widths = (
        f"model.hidden_size={hidden}",
        f"model.ffn_hidden_size={ffn}",
        f"model.mamba_num_heads={heads}",
    )
    assert count_parameters(model("nemotron_h_8b", *widths)).total == MINITRON[hidden, ffn, heads]


def test_attention_comes_where_the_papers_say() -> None:
    """1-based places of attention layers in the released patterns."""
    places = {
        "nemotron_h_8b": [8, 19, 30, 41],
        "nemotron_h_56b": [8 + 11 * i for i in range(10)],
        "nemotron_nano_12b_v2": [8, 17, 26, 35, 44, 53],
        "nemotron_nano_9b_v2": [15, 22, 31, 40],
    }
    for name, expected in places.items():
        pattern = model(name).hybrid_layer_pattern
        assert [i for i, symbol in enumerate(pattern, 1) if symbol == "*"] == expected


def test_moe_layer_by_hand() -> None:
    """Router, experts, shared expert and norm; active counts the chosen experts."""
    words = ("tiny", "--hybrid-layer-pattern", "E", "--vocab-size", "128", "--swiglu")
    counts = count_parameters(model(*words))
    d, f, experts, chosen = 128, 128, 4, 2
    shared = 3 * d * 128
    assert counts.per_layer["E"] == experts * d + experts * 3 * d * f + shared + d
    assert counts.active == counts.total - (experts - chosen) * 3 * d * f
    assert counts.total == counts.per_layer["E"] + 2 * 128 * d + d


def test_biases_and_tied_embeddings() -> None:
    """Biases of attention and MLP linears; one matrix for both ends of a tied model."""
    words = ("nemotron_h_8b", "--hybrid-layer-pattern", "*-")
    plain = count_parameters(model(*words))
    biased = count_parameters(model(*words, "--add-bias-linear"))
    d, queries, keys_values, f = 4096, 32 * 128, 2 * 8 * 128, 21504
    assert biased.per_layer["*"] - plain.per_layer["*"] == queries + keys_values + d
    assert biased.per_layer["-"] - plain.per_layer["-"] == f + d
    tied = count_parameters(model(*words, "--no-untie-embeddings-and-output-weights"))
    assert plain.total - tied.total == 131072 * d


def test_vocabulary_is_padded() -> None:
    """The embedding is counted with the rows it is built with."""
    assert [
        ModelConfig(hybrid_layer_pattern="M", hidden_size=8, vocab_size=size).padded_vocab_size
        for size in (1, 128, 129)
    ] == [128, 128, 256]
    sizes = [count_parameters(model("tiny", "--vocab-size", str(v))).total for v in (4000, 4096)]
    assert sizes[0] == sizes[1]
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        count_parameters(model("tiny"))


def test_flops_of_matrices_are_six_a_parameter() -> None:
    """An MLP's and the output layer's FLOPs are 6 for each of their weights."""
    config = model("nemotron_h_8b", "--hybrid-layer-pattern", "-")
    flops = flops_per_token(config, 8192)
    d, f = 4096, 21504
    assert flops.by_kind["-"] == 6 * 2 * d * f
    assert flops.logits == 6 * 131072 * d
    assert flops.total == flops.by_kind["-"] + flops.logits


def test_flops_of_attention_count_what_a_query_sees() -> None:
    """Causal: the mean over queries of the keys before and at them, also within a window; all
    keys where there is no mask."""
    open_config = model(
        "nemotron_h_8b", "--hybrid-layer-pattern", "*", "--attn-mask-type", "no_mask"
    )
    causal = model("nemotron_h_8b", "--hybrid-layer-pattern", "*")
    more = flops_per_token(open_config, 64).by_kind["*"] - flops_per_token(causal, 64).by_kind["*"]
    assert more == pytest.approx(3 * 4 * 32 * 128 * (64 - 65 / 2))
    for window, length in ((None, 64), (10, 64), (1, 5), (200, 64)):
        words = ("--window-size", f"{window},0") if window else ()
        config = model("nemotron_h_8b", "--hybrid-layer-pattern", "*", *words)
        seen = [min(j, length if window is None else window) + 1 for j in range(length)]
        weights = 4096 * (2 * 32 * 128 + 2 * 8 * 128)
        expected = 3 * (2 * weights + 4 * 32 * 128 * sum(seen) / length)
        assert flops_per_token(config, length).by_kind["*"] == pytest.approx(expected, rel=1e-12)


def test_flops_of_mamba_by_hand() -> None:
    """Two linears, the convolution, and five FLOPs a channel and state for the recurrence."""
    config = model("nemotron_h_8b", "--hybrid-layer-pattern", "M")
    d, inner, groups_states, heads, states = 4096, 128 * 64, 8 * 128, 128, 128
    linears = 2 * d * (2 * inner + 2 * groups_states + heads) + 2 * inner * d
    forward = linears + 2 * 4 * (inner + 2 * groups_states) + 5 * inner * states
    assert flops_per_token(config, 8192).by_kind["M"] == 3 * forward


MAMBA_130M = [
    "nemotron_h_8b", "--hybrid-layer-pattern", 24 * "M", "model.mamba_version=1",
    "model.hidden_size=768",
    "model.mamba_state_dim=16", "model.vocab_size=50280", "--make-vocab-size-divisible-by", "8",
    "--no-untie-embeddings-and-output-weights",
]  # fmt: skip


def test_mamba_1_as_released() -> None:
    """mamba-130m, to the last parameter; FLOPs of linears, convolution, steps and recurrence."""
    config = model(*MAMBA_130M)
    assert count_parameters(config).total == 129_135_360
    inner, rank, states = 1536, 48, 16
    forward = 2 * 768 * 3 * inner + 2 * 4 * inner + 2 * inner * (2 * rank + 2 * states)
    forward += 5 * inner * states
    assert flops_per_token(config, 2048).by_kind["M"] == 24 * 3 * forward


def test_unlike_layers_are_counted_one_by_one() -> None:
    """What each layer would count in a model of its own, parameters and FLOPs."""
    words = ("nemotron_h_8b", "--hybrid-layer-pattern", "M-*-M")
    own = {
        "-": "model.ffn_hidden_size=1024", "*": "model.window_size=[10,0]",
        "M": "model.mamba_num_heads=64",
    }  # fmt: skip
    entries = {"2": own["-"], "*": own["*"], "5": own["M"]}
    unlike = [said.replace("model.", f"model.layers.{key}.") for key, said in entries.items()]
    made = model(*words, *unlike)
    one = {kind: model("nemotron_h_8b", "--hybrid-layer-pattern", kind) for kind in "M-"}
    pruned = {
        kind: model("nemotron_h_8b", "--hybrid-layer-pattern", kind, said)
        for kind, said in own.items()
    }
    layers = [one["M"], pruned["-"], pruned["*"], one["-"], pruned["M"]]
    counts = count_parameters(made)
    assert counts.per_layer.keys() == {"*"}
    assert counts.total - counts.embedding - counts.final_norm == sum(
        sum(count_parameters(layer).per_layer.values()) for layer in layers
    )
    flops = flops_per_token(made, 64)
    assert flops.total - flops.logits == pytest.approx(
        sum(sum(flops_per_token(layer, 64).by_kind.values()) for layer in layers)
    )


def test_flops_of_prediction() -> None:
    """Of each module: its projection, its layers as the model's own, and the output layer again."""
    words = ("tiny", "model.vocab_size=4096")
    ahead = ("model.mtp_num_layers=2", "model.mtp_hybrid_override_pattern=*E")
    plain = flops_per_token(model(*words), 256)
    found = flops_per_token(model(*words, *ahead), 256)
    layers = plain.by_kind["*"] + plain.by_kind["E"]  # of which the model has one each
    assert found.prediction == 2 * (3 * 2 * 256 * 128 + layers + plain.logits)
    assert found.total == plain.total + found.prediction
    counts = count_parameters(model(*words, *ahead))
    of_model = count_parameters(model(*words))
    # The experts that a token does not meet, in one layer and in two of the modules.
    assert counts.total - counts.active == 3 * (of_model.total - of_model.active)
