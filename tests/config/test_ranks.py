"""What a rank has: every way of dividing the tokens is known to every rule that asks for them."""

import itertools

import pytest

from megatron_hybrid.config import build_config, rules
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.phases import sequence_length_fields
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.config.ranks import data_parallel_size, model_ranks, rank_tokens
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.planner.layout import layout_of

MODEL: dict[str, object] = {
    "hybrid_layer_pattern": "M*-|M*-", "hidden_size": 512, "num_attention_heads": 16,
    "mamba_num_heads": 128, "mamba_head_dim": 64, "mamba_num_groups": 8, "vocab_size": 256,
}  # fmt: skip


def values(
    *, tp: int, cp: int, split: bool, micro: int, seq_length: int, phase: int | None
) -> dict[str, object]:
    phases = [
        {"name": "a", "weights": {"web": 1}, "seq_length": None},
        {"name": "b", "weights": {"web": 1}, "seq_length": phase, "start_fraction": 0.5},
    ]
    data = {"sources": {"web": {"path": "web"}}, "phases": phases} if phase else {"mock_data": True}
    return {
        "model": MODEL,
        "parallel": {
            "tensor_model_parallel_size": tp, "context_parallel_size": cp,
            "sequence_parallel": split,
        },
        "data": {"tokenizer_type": "null", "seq_length": seq_length, **data},
        "training": {"micro_batch_size": micro, "global_batch_size": micro, "train_tokens": 1e9},
        "optimizer": {"lr": 1.0},
    }  # fmt: skip


@pytest.mark.parametrize("recipe", FLOAT8_RECIPES)
def test_float8_sees_the_tokens_that_a_rank_quantises(recipe: str) -> None:
    """Over TP, SP, CP, micro batches, lengths and phases: refused where, and only where, the
    shard of one of the lengths is no whole number of blocks."""
    multiple = FLOAT8_RECIPES[recipe].tokens_multiple
    seen = set()
    for tp, cp, micro, length, phase in itertools.product(
        (1, 2, 4), (1, 2), (1, 3), (32, 36, 128), (None, 48)
    ):
        for split in {False, tp > 1}:
            lengths = {length, phase or length}
            if any(n % (2 * cp) or n % (tp * cp if split else 1) for n in lengths):
                continue  # told of by another rule
            config = values(
                tp=tp, cp=cp, split=split, micro=micro, seq_length=length, phase=phase
            ) | {"precision": {"recipe": recipe}}
            try:
                build_config(config, which=rules.NO_FILES)
                problems: list[str] = []
            except ConfigError as error:
                problems = error.problems
            wrong = [n for n in lengths if (n // cp // (tp if split else 1)) * micro % multiple]
            assert len(problems) == len(wrong), problems
            assert all("tokens on a rank must be a multiple of" in text for text in problems)
            seen.add((split, bool(wrong)))
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_what_is_said_of_a_shard() -> None:
    """The field whose length it is, the ranks that share it, and the tokens of one."""
    config = values(tp=2, cp=1, split=True, micro=1, seq_length=128, phase=96)
    with pytest.raises(ConfigError) as caught:
        build_config(config | {"precision": {"recipe": "mxfp8"}}, which=rules.NO_FILES)
    assert caught.value.problems == [
        "precision.recipe=mxfp8: data.phases[1].seq_length=96 * training.micro_batch_size=1 / "
        "(parallel.context_parallel_size=1 * parallel.tensor_model_parallel_size=2) = 48 tokens "
        "on a rank must be a multiple of 32"
    ]


def test_float8_sees_the_length_of_evaluations() -> None:
    """Which is data.seq_length, also where each phase has a length of its own; else it is free."""
    config = values(tp=1, cp=1, split=False, micro=1, seq_length=36, phase=128)
    config["precision"] = {"recipe": "mxfp8"}
    config["data"]["phases"][0]["seq_length"] = 256
    build_config(config, which=rules.NO_FILES)
    config["training"]["eval_interval"] = 2
    with pytest.raises(ConfigError, match=r"mxfp8: data.seq_length=36 \* .* must be a multiple of"):
        build_config(config, which=rules.NO_FILES)


def test_one_answer_for_rules_and_planner() -> None:
    """The planner's tokens are the rules', and a rank's shards make up the sequence."""
    for tp, cp, split in ((1, 1, False), (4, 1, False), (4, 1, True), (2, 2, True)):
        config = build_config(
            values(tp=tp, cp=cp, split=split, micro=2, seq_length=64, phase=256),
            which=rules.NO_FILES,
        )
        layout = layout_of(config, 8)
        assert sequence_length_fields(config) == {
            "data.phases[1].seq_length": 256, "data.seq_length": 64
        }  # fmt: skip
        assert layout.own_tokens == rank_tokens(config, 256)
        assert layout.own_tokens * cp * (tp if split else 1) == 2 * 256
        assert layout.tokens == rank_tokens(config, 256, gathered=True) == 2 * 256 // cp
        assert layout.dp == data_parallel_size(config, 8) == 8 // (tp * cp)
        assert len(model_ranks(config)) == 3
        assert data_parallel_size(config, 8 * tp * cp + 1) == (
            8 * tp * cp + 1 if tp * cp == 1 else 0
        )


@pytest.mark.parametrize(
    ("pattern", "stages", "most"),
    [("MMMM", 1, 4), ("MMMM", 2, 2), ("MMMMM*|M", 2, 6), ("M|MM|M|MMM", 2, 5), ("M|MM", 1, 3)],
)
def test_the_layers_of_the_longest_stage(pattern: str, stages: int, most: int) -> None:
    """Recomputation takes as many layers as the longest stage has, however the pattern is cut."""
    assert parse_pattern(pattern).most_layers(stages) == most
    good = values(tp=1, cp=1, split=False, micro=1, seq_length=64, phase=None)
    model = MODEL | {"hybrid_layer_pattern": pattern}
    if "*" not in pattern:
        model.pop("num_attention_heads")

    def build(layers: int) -> None:
        recompute = {
            "recompute_granularity": "full", "recompute_method": "uniform",
            "recompute_num_layers": layers, "train_tokens": 1e9, "global_batch_size": 4,
        }  # fmt: skip
        parallel = {"pipeline_model_parallel_size": stages}
        sections = {"model": model, "parallel": parallel, "training": recompute}
        build_config(good | sections, which=rules.NO_FILES)

    build(most)
    with pytest.raises(ConfigError, match=f"allowed: 1 to {most}$"):
        build(most + 1)
