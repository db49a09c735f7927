"""The arbiter as judge: what rounding makes of a model is no difference; what is one, it names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_converter.arbiter import FAMILIES, Arbiter
from checkpoints_converter.comparison import Comparison
from checkpoints_converter.errors import ConversionError
from checkpoints_converter.verify import TOLERANCE
from checkpoints_converter.verify_report import Report
from checkpoints_converter.verify_sides import Answer, Prompt
from tests.checkpoints_converter.peer_models import nemotron_h, saved, tokens
from tests.checkpoints_converter.test_families import mamba2

PATTERN = "MM"
MODELS = {
    "nemotron_h": lambda: nemotron_h(PATTERN),
    "mamba2": lambda: mamba2(num_hidden_layers=2, tie_word_embeddings=True),
}
assert MODELS.keys() == FAMILIES.keys()
PROMPT = Prompt("drawn", tuple(tokens()[0].tolist()))


def regular(model: Any) -> Any:
    """A large channel that all words share: the logits' deviation is small beside their size."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 30
        model.get_output_embeddings().weight[:, 0] = 30
    return model


def theirs(model: Any) -> Answer:
    """What transformers makes of the prompt, in fp32."""
    answer = Answer()
    handles = [
        layer.register_forward_hook(lambda *a: answer.residuals.append(a[-1][0].detach()))
        for layer in model.base_model.layers
    ]
    with torch.no_grad():
        answer.logits = model(torch.tensor([PROMPT.tokens]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return answer


def exact(folder: Path) -> Answer:
    """What a side without any error answers."""
    trace = Arbiter(folder).trace(PROMPT.tokens)
    return Answer(residuals=[*trace.residuals], logits=trace.logits)


def compare(export: Path, ours: Answer, their: Answer, arbiter: bool = True) -> Report:
    comparison = Comparison(PATTERN, [PROMPT], [len(PROMPT.tokens)], [ours], [their])
    if arbiter:
        comparison.ask_arbiter(export)
    return Report("", str(export), "", comparison.rows(TOLERANCE))


@pytest.mark.parametrize("name", MODELS)
def test_rounding_is_no_difference(name: str, tmp_path: Path) -> None:
    """A right side and transformers, beyond the tolerance, of each family that it knows."""
    model = regular(MODELS[name]())
    folder = saved(model, tmp_path / "hf")
    ours, their = exact(folder), theirs(model)
    report = compare(folder, ours, their)
    assert report.rows[-1].relative > TOLERANCE
    assert report.rows[-1].verdict == "rounding"
    assert report.passed and report.blame is None
    without = compare(folder, ours, their, arbiter=False)
    assert not without.passed and without.first_difference is not None


@pytest.mark.parametrize("side", ["ours", "transformers'"])
@pytest.mark.parametrize("name", MODELS)
def test_says_which_side_is_off(name: str, side: str, tmp_path: Path) -> None:
    """One changed number in one side's second layer, in a regular model too."""
    model = regular(MODELS[name]())
    folder = saved(model, tmp_path / "hf")
    right = theirs(model)
    with torch.no_grad():
        model.base_model.layers[1].mixer.D[0] += 0.01
    wrong = theirs(model)
    answers = (wrong, right) if side == "ours" else (right, wrong)
    report = compare(folder, *answers)
    assert report.first_difference == "layer 1 (Mamba)"
    assert report.blame is not None and report.blame.startswith(f"{side} off (")
    assert not report.passed


def test_what_is_no_number_is_off(tmp_path: Path) -> None:
    """NaN passes no comparison, and is whose it is."""
    model = MODELS["nemotron_h"]()
    folder = saved(model, tmp_path / "hf")
    wrong = theirs(model)
    wrong.residuals[0][3, 3] = torch.nan
    report = compare(folder, wrong, theirs(model))
    assert report.blame is not None and report.blame.startswith("ours off (")


def test_constants_and_ties_end_in_a_sentence(tmp_path: Path) -> None:
    """No deviation to measure by; experts alike at the first token of every prompt."""
    answer = Answer(residuals=[torch.ones(3, 4)], logits=torch.ones(3, 5))
    other = Answer(residuals=[torch.ones(3, 4)], logits=torch.ones(3, 5) + 1e-7)
    prompt = Prompt("", (1, 2, 3))
    rows = Comparison("-", [prompt], [3], [answer], [other]).rows(TOLERANCE)
    assert [row.passed for row in rows] == [True, False]
    with pytest.raises(ConversionError, match="nothing can be compared"):
        Comparison("-", [prompt], [1], [answer], [other])
