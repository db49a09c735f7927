"""A run made smaller: all of its lengths and sources by the same factor, nothing else."""

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_hybrid.config import load_config, phases, rules, sources
from megatron_hybrid.config.scale import parse_scale, scale_config
from megatron_hybrid.errors import ConfigError

FILE = """preset: tiny
run_dir: runs/big
data:
  sources: {web: {path: d/web, fraction: 0.5}, code: {path: d/code, max_epochs: 3}}
  phases:
    - {name: one, weights: {web: 1}}
    - {name: two, start_tokens: 30e6, weights: {web: 1, code: 1}}
    - {name: three, start_fraction: 0.6, weights: {code: 1}}
    - {name: four, last_tokens: 15e6, weights: {code: 1}}
training: {train_tokens: 150e6, batch_size_schedule: [[60e6, 32]]}
optimizer:
  {lr_decay_style: WSD, lr_warmup_tokens: 3e6, lr_decay_tokens: 140e6, lr_wsd_decay_tokens: 30e6}
checkpoint: {load: elsewhere}
"""


def test_all_lengths_shrink_together(tmp_path: Path) -> None:
    """Tokens of the run, of phases, batch sizes and learning rate, and the share of each source."""
    file = tmp_path / "run.yaml"
    file.write_text(FILE, encoding="utf-8")
    config = load_config([str(file)], which=rules.NO_FILES)
    small = scale_config(config, Fraction(1, 15))
    assert [phase.start_tokens for phase in phases(small)] == [0, 2e6, 6e6, 9e6]
    assert phases(small)[-1].end_tokens == 10e6
    assert small.training.batch_size_schedule == ((4_000_000, 32),)
    optimizer = small.optimizer
    assert (optimizer.lr_warmup_tokens, optimizer.lr_wsd_decay_tokens) == (200_000, 2_000_000)
    assert optimizer.lr_decay_tokens == round(140e6 / 15)
    assert small.data.sources["web"].fraction == pytest.approx(0.5 / 15, rel=1e-15)
    assert small.data.sources["code"].max_epochs == 3
    assert [phase.weights for phase in phases(small)] == [phase.weights for phase in phases(config)]
    assert small.training.global_batch_size == config.training.global_batch_size
    assert small.run_dir == Path("runs/big-1_15")
    assert small.checkpoint.save == small.run_dir / "checkpoints"
    assert small.checkpoint.load is None


def test_what_is_set_stays(tmp_path: Path) -> None:
    """Of what follows from other fields, all but a folder, of which each run has its own."""
    set_ = (
        "precision.recipe=fp8_tensorwise", "precision.num_layers_at_start_in_bf16=1",
        "precision.num_layers_at_end_in_bf16=0", "checkpoint.save=disk/big",
    )  # fmt: skip
    words = ["tiny", "--data-path", "a", "--train-samples", "1000", "model.mamba_head_dim=16"]
    small = scale_config(load_config([*words, *set_], which=rules.NO_FILES), Fraction("0.1"))
    precision = small.precision
    assert precision.num_layers_at_start_in_bf16 == 1
    assert precision.num_layers_at_end_in_bf16 == 0
    assert small.checkpoint.save == Path("disk/big-1_10")
    followed = scale_config(load_config([*words, *set_[:1]], which=rules.NO_FILES), Fraction("0.1"))
    assert followed.checkpoint.save == Path("runs/default-1_10/checkpoints")


def test_a_blend_becomes_sources(tmp_path: Path) -> None:
    """Sources of --data-path take names of their own, and the fraction that it cannot say."""
    words = ["tiny", "--data-path", "3", "a/text.v1", "1", "b/text.v1", "--train-samples", "1000"]
    small = scale_config(load_config(words, which=rules.NO_FILES), Fraction("0.1"))
    assert {name: source.path for name, source in sources(small).items()} == {
        "text_v1": ("a/text.v1",),
        "text_v1-2": ("b/text.v1",),
    }
    assert phases(small)[0].weights == {"text_v1": 0.75, "text_v1-2": 0.25}
    assert {source.fraction for source in sources(small).values()} == {0.1}
    assert small.training.train_samples == 100
    file = tmp_path / "small.yaml"
    file.write_text(small.to_yaml(), encoding="utf-8")
    assert load_config([str(file)], which=rules.NO_FILES) == small


def test_too_small_a_run_is_refused(tmp_path: Path) -> None:
    """Phases that no longer hold a global batch are named."""
    file = tmp_path / "run.yaml"
    file.write_text(FILE, encoding="utf-8")
    config = load_config([str(file)], which=rules.NO_FILES)
    with pytest.raises(ConfigError, match=r"data.phases\[3\] has 1500 tokens.* a global batch"):
        scale_config(config, Fraction(1, 10000))


@pytest.mark.parametrize("text", ["0", "2", "-1/2", "1/0", "half", ""])
def test_wrong_scales(text: str) -> None:
    """A scale is a part of the run."""
    with pytest.raises(ConfigError, match=f"--scale={text} must be a number above 0"):
        parse_scale(text)
    assert parse_scale(" 1/15 ") == Fraction(1, 15)
