"""Settings of no effect are said, each with its reason, and only then."""

import pytest

from megatron_hybrid.config import load_config, presets, rules
from megatron_hybrid.config.notes import _TABLE, notes
from tests.config import GOOD

# What is typed, and what gives it an effect.
UNUSED = {
    "training.eval_interval=11": (["training.train_iters=10"], "training.train_iters=11"),
    "training.exit_interval=11": (["training.train_iters=10"], "training.train_iters=11"),
    "training.eval_iters=3": (["training.eval_interval=null"], "training.eval_interval=2"),
    "training.loss_spike_action=skip": ([], "training.loss_spike_factor=2"),
    "training.profile_step_start=3": ([], "training.profile=true"),
    "training.profile_step_end=30": ([], "training.profile=true"),
    "training.profile_ranks=[0, 1]": ([], "training.profile=true"),
    "training.recompute_granularity=selective": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.position_embedding_type=rope": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.attention_dropout=0.1": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.rotary_base=5": ([], "model.position_embedding_type=rope"),
    "model.rotary_percent=0.5": ([], "model.position_embedding_type=rope"),
    "gpu.apply_rope_fusion=true": ([], "model.position_embedding_type=rope"),
    "gpu.cuda_graph_warmup_steps=5": ([], "gpu.cuda_graph_impl=local"),
    "optimizer.lr_wsd_decay_style=linear": ([], "optimizer.lr_decay_style=WSD"),
    "optimizer.min_lr=1e-5": (
        ["optimizer.lr_decay_style=constant"], "optimizer.lr_decay_style=linear",
    ),
    "data.data_cache_path=x": (["data.mock_data=false"], "data.sample_order=megatron"),
    "data.max_epochs=1": ([], "data.mock_data=false"),
    "data.block_tokens=8192": ([], "data.mock_data=false"),
    "data.sample_order=megatron": ([], "data.mock_data=false"),
    "logging.wandb_entity=us": ([], "logging.wandb_project=x"),
    "logging.wandb_exp_name=first": ([], "logging.wandb_project=x"),
    "logging.wandb_save_dir=here": ([], "logging.wandb_project=x"),
    "logging.mlflow_run_name=first": ([], "logging.mlflow_experiment=x"),
    "logging.mlflow_tracking_uri=http://here": ([], "logging.mlflow_experiment=x"),
}  # fmt: skip


@pytest.mark.parametrize("word", UNUSED)
def test_what_has_no_effect_is_said(word: str) -> None:
    """One sentence with field, value and reason; none where the reason is gone."""
    beside, reads = UNUSED[word]
    line = [*GOOD, *beside, word]
    name = word.partition("=")[0]
    (said,) = [note for note in notes(load_config(line, which=())) if note.startswith(name)]
    assert " has no effect: " in said
    found = notes(load_config([*line, reads], which=()))
    assert not [note for note in found if note.startswith(f"{name}=")]


def test_the_whole_table_is_tried() -> None:
    """By field."""
    named = {name for each in _TABLE for name in each.names}
    assert named == {word.partition("=")[0] for word in UNUSED}


def test_presets_have_nothing_to_say() -> None:
    """As they are, nor does a good config."""
    for name in presets():
        line = [name, "--data-path", "x", "--tokenizer-type", "null", "--vocab-size", "256"]
        assert notes(load_config(line, which=rules.NO_FILES)) == []
    assert notes(load_config(GOOD)) == []


def test_the_length_in_tokens_counts_too() -> None:
    """The smallest batches and shortest samples make the most steps a run can have."""
    line = [*GOOD, "training.train_tokens=1e6", "training.global_batch_size=8"]
    few, many = "training.eval_interval=489", "training.eval_interval=492"
    assert not notes(load_config([*line, "data.seq_length=256", few], which=()))
    assert notes(load_config([*line, "data.seq_length=256", many], which=()))
