"""`megatron-hybrid plan` as it is typed."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.config import load_config, rules
from megatron_hybrid.config.precision import float8_layers
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
        "pipeline bubble", "to generate on one h100", "published runs of hybrid models",
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
        "model.position_embedding_type=rope",
    )  # fmt: skip
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:2] == "  "}
    for kind in ("M", "*", "-", "E", "embedding", "output"):
        assert all(float(number) > 0 for number in rows[kind])
    assert "balanced  bubble" in text


MEASURED = {
    "window": ["model.window_size=[8,0]"],
    "warm-up": ["optimizer.lr_warmup_samples=64", "training.train_iters=null",
                "training.train_samples=128"],
    "phases": ["data.phases=[{name: a, weights: {x: 1}, seq_length: 64}, "
               "{name: b, start_tokens: 16384, weights: {x: 1}, seq_length: 128}]",
               "data.sources={x: {path: x}}", "training.train_iters=null",
               "training.train_tokens=65536"],
    "batch sizes": ["training.batch_size_schedule=[[4096, 16]]", "training.train_iters=null",
                    "training.train_tokens=65536"],
    "full recomputation": ["training.recompute_granularity=full",
                           "training.recompute_method=block", "training.recompute_num_layers=4"],
    "selective recomputation": ["training.recompute_granularity=selective",
                                "training.recompute_modules=[moe, mlp]"],
    "float8": ["precision.recipe=fp8_blockwise", "precision.num_layers_at_start_in_bf16=1",
               "precision.num_layers_at_end_in_bf16=1"],
    "kernels": [
                "gpu.moe_shared_expert_overlap=true", "gpu.overlap_p2p_comm=true",
                "gpu.cuda_graph_impl=local", "gpu.cuda_graph_modules=[attn, mamba]",
                "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
                "gpu.align_param_gather=true"],
    "experts": ["model.moe_router_score_function=sigmoid", "model.moe_expert_capacity_factor=2",
                "parallel.expert_model_parallel_size=2"],
    "another start": ["upcycling.from=x", "optimizer.restart_schedule=true"],
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_layers_of_any_valid_run_can_be_measured(name: str) -> None:
    """What belongs to the run around them, or to layers of another kind, stands against nothing:
    each kind alone is a config that megatron-core takes, on either backend, with its sizes."""
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.planner.measure import one_rank, timed_otherwise

    line = [
        "model.hybrid_layer_pattern=M*-E|M*-E|M*-E|M*-E", "model.hidden_size=128",
        "model.num_attention_heads=4", "model.mamba_head_dim=16", "model.mamba_state_dim=8",
        "model.mamba_num_groups=2", "model.vocab_size=64", "model.num_moe_experts=4",
        "model.moe_shared_expert_intermediate_size=128", "data.tokenizer_type=null",
        "data.seq_length=128", "training.global_batch_size=8", "training.micro_batch_size=2",
        "training.train_iters=32", "optimizer.lr=1e-3", "backend=transformer_engine",
        "parallel.pipeline_model_parallel_size=2",
    ]  # fmt: skip
    config = load_config([*line, *MEASURED[name]], which=rules.NO_FILES, world_size=4)
    for kind in "M*-E":
        single = one_rank(config, kind * 2)
        # What the engine asks Transformer Engine for experts, it asks where that is installed.
        for backend in ("torch", "transformer_engine") if kind != "E" else ("torch",):
            made = transformer_config(single, backend, torch.device("meta"))
            assert (made.num_layers, made.hidden_size) == (2, 128)
        assert single.data.seq_length == 128
        assert single.training.global_batch_size == single.training.micro_batch_size == 2
        assert float8_layers(single) == ([1, 2] if name == "float8" else [])
    said = timed_otherwise(config, has_cuda=False)
    bf16 = "precision.recipe=fp8_blockwise: without a GPU its linears are timed in bf16"
    assert said == (bf16 if name == "float8" else None)
    assert timed_otherwise(config, has_cuda=True) is None


def test_asks_only_for_what_it_goes_by(tmp_path: Path) -> None:
    """A model and a layout are enough: no learning rate and no length, of which no plan is."""
    path = tmp_path / "model.yaml"
    path.write_text(
        "model: {hybrid_layer_pattern: '*-*-|*-*-', hidden_size: 64, num_attention_heads: 4, "
        "vocab_size: 256}\ndata: {tokenizer_type: 'null', seq_length: 128}\n"
        "training: {global_batch_size: 8}\n"
        "parallel: {pipeline_model_parallel_size: 2}\n"
    )
    text = plan(str(path), "--gpus", "2")
    assert "fits," in text
    assert "published runs of dense models" in text
    assert "None was in bf16 on a h100's generation." in text
    assert "-0.0%" not in text
    done = CliRunner().invoke(app, ["counts", str(path)])
    assert done.exit_code == 0, done.output


def test_columns_stay_in_a_file() -> None:
    """Without a terminal no header is cut, with twenty segments a stage either."""
    words = ["parallel.pipeline_model_parallel_size=2", "training.global_batch_size=8"]
    pattern = "|".join(["M-"] * 40)
    done = CliRunner().invoke(
        app, ["plan", *MODEL, "--gpus", "2", *words, f"model.hybrid_layer_pattern={pattern}",
              "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"],
        env={"COLUMNS": None},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    [header] = [line for line in lines if "optimizer state" in line]
    assert header.split()[-2:] == ["total", "GiB"]
    stages = [line for line in lines if "(40 in 20 segments)" in line]
    assert [line.split()[0] for line in stages] == ["0", "1"]


def test_json(caplog: pytest.LogCaptureFixture) -> None:
    """The layouts of a search, for programs; what is typed of one is not gone by, which is said."""
    found = json.loads(plan(*MODEL, "--gpus", "8", "--search", "--top", "2", "--json",
                            "--context-tokens", "4096", "--micro-batch-size", "4"))  # fmt: skip
    assert caplog.messages == [
        "note: training.micro_batch_size: no effect, as --search tries layouts of its own"
    ]
    assert len(found) == 2
    assert all(each["generation"] is not None for each in found)
    assert found[0]["step"]["tokens_per_s"] >= found[1]["step"]["tokens_per_s"]
    assert found[0]["fits"]
    assert set(found[0]["flops_per_token"]) == {"M", "*", "-", "logits"}


def test_mistakes() -> None:
    """Each is refused in words."""
    with pytest.raises(UserError, match="--gpu=v100 is not known; allowed: h100, h200"):
        plan(*MODEL, "--gpus", "8", "--gpu", "v100")
    with pytest.raises(ConfigError, match="mxfp8 needs a GPU of compute capability 10"):
        plan(*MODEL, "--gpus", "8", "precision.recipe=mxfp8")
    with pytest.raises(ConfigError, match="fp8_tensorwise needs a GPU of compute capability"):
        plan(*MODEL, "--gpus", "8", "--gpu", "a100", "precision.recipe=fp8_tensorwise")
    with pytest.raises(ConfigError, match="the number of ranks, 6, must be a multiple of"):
        plan(*MODEL, "--gpus", "6", "parallel.pipeline_model_parallel_size=4")
    with pytest.raises(ConfigError, match=r"model.vocab_size"):
        plan("tiny", "data.tokenizer_type=null", "--gpus", "4")
    done = CliRunner().invoke(app, ["plan", *MODEL, "--gpus", "8", "--batch", "2"])
    assert done.exit_code == 2
    assert "only with --context-tokens" in done.output
    with pytest.raises(UserError, match=r"--balance needs parallel.pipeline_model_parallel"):
        plan(*MODEL, "--gpus", "8", "--balance")
