"""`megatron-hybrid plan` as it is typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.config import load_config, rules
from megatron_hybrid.errors import ConfigError, UserError

MODEL = ["nemotron_h_8b", "data.tokenizer_type=null", "model.vocab_size=131072"]


def plan(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def test_tables_and_picture(tmp_path: Path) -> None:
    """Memory by stage, time by cause, whether it fits, and the memory to generate."""
    picture = tmp_path / "memory.png"
    text = plan(
        *MODEL, "--gpus", "64", "-o", str(picture), "--context-tokens", "131072",
        "parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2",
    )  # fmt: skip
    for part in (
        "8.10B parameters on 64 x h100", "fits,", "matrix products", "tokens/s", "MFU",
        "pipeline bubble", "to generate on one h100", "not been held against a run",
    ):  # fmt: skip
        assert part in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_ends_with_an_error() -> None:
    """By how much is said."""
    text = plan(*MODEL, "--gpus", "1", "--gpu", "a10g", "training.global_batch_size=1",
                "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
                code=1)  # fmt: skip
    assert "DOES NOT FIT" in text
    assert "GiB too little" in text


def test_balance_by_given_costs(tmp_path: Path) -> None:
    """A pattern that can be pasted, and is faster."""
    path = tmp_path / "costs.json"
    cost = {"forward_ms": 1.0, "backward_ms": 2.0}
    path.write_text(json.dumps({"M": cost, "*": cost, "-": cost, "output": {
        "forward_ms": 8, "backward_ms": 16}}))  # fmt: skip
    words = [*MODEL, "--gpus", "64", "parallel.pipeline_model_parallel_size=4"]
    text = plan(*words, "--balance", "--costs", str(path))
    [line] = [line for line in text.splitlines() if line.startswith("model.hybrid_layer_pattern")]
    pattern = line.split("=")[1].strip("'")
    assert [len(part) for part in pattern.split("|")] == [15, 15, 15, 7]
    load_config([*words[:3], words[-1], f"model.hybrid_layer_pattern={pattern}"],
                which=rules.NO_FILES)  # fmt: skip


def test_measured_costs() -> None:
    """Layers are timed on this machine, on one rank, whatever the layout."""
    text = plan(
        "tiny", "data.tokenizer_type=null", "model.vocab_size=4096", "--gpus", "4",
        "parallel.pipeline_model_parallel_size=2", "--balance", "--measure",
    )  # fmt: skip
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:2] == "  "}
    for kind in ("M", "*", "-", "E", "embedding", "output"):
        assert all(float(number) > 0 for number in rows[kind])
    assert "balanced  bubble" in text


def test_json() -> None:
    """The layouts of a search, for programs."""
    found = json.loads(plan(*MODEL, "--gpus", "8", "--search", "--top", "2", "--json"))
    assert len(found) == 2
    assert found[0]["step"]["tokens_per_s"] >= found[1]["step"]["tokens_per_s"]
    assert found[0]["fits"]
    assert set(found[0]["flops_per_token"]) == {"M", "*", "-", "logits"}


def test_mistakes() -> None:
    """Each is refused in words."""
    with pytest.raises(UserError, match="--gpu=v100 is not known; allowed: h100, h200"):
        plan(*MODEL, "--gpus", "8", "--gpu", "v100")
    with pytest.raises(ConfigError, match="the number of ranks, 6, must be a multiple of"):
        plan(*MODEL, "--gpus", "6", "parallel.pipeline_model_parallel_size=4")
    with pytest.raises(ConfigError, match=r"model.vocab_size"):
        plan("tiny", "data.tokenizer_type=null", "--gpus", "4")
    with pytest.raises(UserError, match=r"--balance needs parallel.pipeline_model_parallel"):
        plan(*MODEL, "--gpus", "8", "--balance")
