"""nemotron_h: the bytes, the logits and the gradients of transformers, there and back."""

from pathlib import Path

import pytest

from tests.checkpoints_converter.cases import (
    Case,
    assert_file_comes_back,
    assert_same_gradients,
    assert_same_logits,
    run_cases,
)
from tests.checkpoints_converter.nemotron_models import MODELS
from tests.checkpoints_converter.peer_models import nemotron_h


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every model, converted and run."""
    models = {name: nemotron_h(pattern, **fields) for name, (pattern, fields) in MODELS.items()}
    return run_cases(tmp_path_factory.mktemp("nemotron_h"), models)


@pytest.mark.parametrize("name", MODELS)
def test_file_comes_back_byte_for_byte(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """Imported and exported again, the file is the one that transformers wrote."""
    assert_file_comes_back(cases[name], tmp_path / "hf")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_theirs(name: str, cases: dict[str, Case]) -> None:
    """Our trainer's model computes the logits of transformers, to 1e-5 of their deviation."""
    assert_same_logits(cases[name])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_theirs(name: str, cases: dict[str, Case]) -> None:
    """Each parameter's gradient in training is that of transformers under the map, to 1e-5."""
    assert_same_gradients(cases[name])
