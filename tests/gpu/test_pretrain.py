"""Pretraining of a model of about 400 million parameters on one GPU, with a resume."""

from pathlib import Path

import pytest

from megatron_hybrid.config import load_config
from megatron_hybrid.model.counts import count_parameters
from tests.gpu.runs import MODEL, STEPS, assert_goes_on, in_parts, pretrain


def test_the_model_is_of_that_size(tmp_path: Path) -> None:
    """The config is good, and has 350 to 450 million parameters."""
    config = load_config([*MODEL, "training.train_iters=8", f"run_dir={tmp_path}"], world_size=1)
    assert 350e6 < count_parameters(config.model).total < 450e6


@pytest.mark.parametrize("wrong", ["step lost", "step read twice", "other weights"])
def test_a_wrong_resume_is_seen(wrong: str) -> None:
    """The comparison itself: losses that go on otherwise are not those of an unbroken run."""
    whole = [11.16, 11.08, 10.93, 10.71, 10.45, 10.2, 9.98, 9.8]
    assert_goes_on([*whole[:4], *(loss * 1.0005 for loss in whole[4:])], whole)
    after = {
        "step lost": [*whole[5:], 9.65],
        "step read twice": whole[3:7],
        "other weights": [11.16, 11.08, 10.93, 10.71],
    }[wrong]
    with pytest.raises(AssertionError):
        assert_goes_on([*whole[:4], *after], whole)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_tensorwise"])
def test_trains_and_resumes(recipe: str, tmp_path: Path) -> None:
    """Eight steps in two runs are those of one that is not interrupted, and the loss falls."""
    from megatron_hybrid.platform.backend import probe

    if probe().missing:
        pytest.skip(f"transformer_engine needs {', '.join(probe().missing)}")
    parts = in_parts(tmp_path / "parts", recipe)
    assert_goes_on(parts, pretrain(tmp_path / "whole", STEPS, recipe))
    assert parts[-1] < parts[0]
