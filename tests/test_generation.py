"""Generation: stepping with caches equals the full forward; sampling does what it says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from megatron_hybrid import generation
from megatron_hybrid.checkpoint.saved_config import read_config
from megatron_hybrid.config import TRACKER_FILE, load_config, rules
from megatron_hybrid.config.describe import fields
from megatron_hybrid.config.ranks import model_ranks
from megatron_hybrid.config.sections import GpuConfig
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import ONE_RANK, Sampling, choose, generate_text
from megatron_hybrid.testing import run_distributed
from tests.config import GOOD
from tests.distributed.layouts import (
    LAYOUTS,
    MOE,
    VOCAB_SIZE,
    built,
    layout_config,
    save_weights,
)

TWO_STAGES = next(layout for layout in LAYOUTS if layout.name == "TP2xPP2")


# What the GPUs' section has of a forward pass, which is that of training.
OF_A_FORWARD_PASS = {
    "cp_comm_type", "attention_backend", "apply_rope_fusion", "bias_activation_fusion",
    "bias_dropout_fusion", "moe_permute_fusion", "moe_router_fusion",
}  # fmt: skip
# Of no account where nothing is learned.
OF_A_LOSS = {"cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "cuda_graph_warmup_steps"}


def test_nothing_of_training_s_schedule_is_left() -> None:
    """Graphs, overlaps and fused gradients of a run's ranks are none of one that generates; the
    config of such a run is one that a single rank takes."""
    put_off = {word.partition("=")[0] for word in ONE_RANK}
    known = {f"gpu.{name}" for name in OF_A_FORWARD_PASS | OF_A_LOSS}
    assert {f"gpu.{name}" for name in GpuConfig.model_fields} == known | {
        name for name in put_off if name.startswith("gpu.")
    }
    run = ["gpu.cuda_graph_impl=local", "gpu.cuda_graph_modules=[attn, mamba]",
           "gpu.gradient_accumulation_fusion=true", "gpu.align_param_gather=true",
           "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
           "backend=transformer_engine"]  # fmt: skip
    config = load_config([*GOOD, *run], which=rules.NO_FILES)
    alone = load_config(list(ONE_RANK), base=config.model_dump(mode="json"), which=rules.NO_FILES)
    assert alone.gpu == GpuConfig()


def save_checkpoint(weights: Path, save: Path) -> None:
    """On a rank: a checkpoint as a TP2xPP2 run leaves it."""
    from megatron_hybrid.checkpoint.progress import Progress
    from megatron_hybrid.data.tokenizer import NullTokenizer
    from megatron_hybrid.training.checkpoint import Checkpointer, load_checkpoint

    config = layout_config(TWO_STAGES, MOE, packed=False, recompute=False)
    checkpoint = config.checkpoint.model_copy(update={"save": save})
    config = config.model_copy(update={"checkpoint": checkpoint})
    with built(config) as (model, optimizer, _):
        load_checkpoint(config, weights, model, optimizer, weights_only=True)
        saver = Checkpointer(config, model, optimizer, NullTokenizer(VOCAB_SIZE), lambda *_: None)
        saver.save(Progress(1, 4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    (folder / "weights").mkdir()
    run_distributed(save_weights, 1, MOE, folder / "weights")
    run_distributed(save_checkpoint, 4, folder / "weights", folder / "save")
    return folder / "save"


def compare_logits(checkpoint: Path, prompt_tokens: int) -> tuple[float, float]:
    """On a rank: largest difference of logits with and without caches, and their deviation."""
    from megatron_hybrid.generation import open_checkpoint

    torch.distributed.destroy_process_group()  # generation makes its own
    tokens = torch.randint(0, VOCAB_SIZE, (2, 150), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(checkpoint) as generator:
        whole = generator.logits(tokens)[:, prompt_tokens - 1 :]
        stepped = torch.stack(list(generator.stepwise_logits(tokens, prompt_tokens)), dim=1)
        return (whole - stepped).abs().max().item(), whole.std().item()


@pytest.mark.parametrize("prompt_tokens", [1, 3, 64, 149])
def test_caches_equal_full_forward(checkpoint: Path, prompt_tokens: int) -> None:
    """KV cache, convolution and scan states, all four layer kinds, RoPE: 1e-5 of the deviation."""
    (difference, deviation) = run_distributed(compare_logits, 1, checkpoint, prompt_tokens)[0]
    assert difference <= 1e-5 * deviation


def generate_tokens(checkpoint: Path, sampling: Sampling) -> list[int]:
    from megatron_hybrid.generation import open_checkpoint

    torch.distributed.destroy_process_group()
    with open_checkpoint(checkpoint) as generator:
        return list(generator.generate([5, 17, 3], 20, sampling))


def test_seed_decides_the_text(checkpoint: Path) -> None:
    """The same seed draws the same tokens, another one others; greedy is one text."""
    hot = [
        run_distributed(generate_tokens, 1, checkpoint, Sampling(temperature=1.0, seed=seed))[0]
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]
    greedy = run_distributed(generate_tokens, 1, checkpoint, Sampling())[0]
    likeliest = run_distributed(generate_tokens, 1, checkpoint, Sampling(temperature=1.0, top_k=1))
    assert greedy == likeliest[0]


def _shares(sampling: Sampling, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([choose(logits, sampling, generator) for _ in range(draws)])
    return torch.bincount(tokens, minlength=len(logits)) / draws


def test_sampling_draws_from_the_right_tokens() -> None:
    """Temperature, top-k and top-p give the shares that they define, to 3%."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for sampling, expected in (
        (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.8), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(), [1, 0, 0, 0]),
    ):
        torch.testing.assert_close(
            _shares(sampling, logits), torch.tensor(expected).float(), atol=0.03, rtol=0
        )


def test_wrong_sampling_names_every_field() -> None:
    """All three fields in one message, with their values."""
    with pytest.raises(UserError) as error:
        Sampling(temperature=-1, top_k=-2, top_p=0)
    for text in ("temperature=-1", "top_k=-2", "top_p=0"):
        assert text in str(error.value)


def test_a_temperature_that_is_none_is_refused() -> None:
    """NaN, and what float32 cannot hold; the least that there is picks the likeliest."""
    for temperature in (float("nan"), float("inf"), 1e-40, 1e40):
        with pytest.raises(UserError, match="temperature"):
            Sampling(temperature=temperature)
    logits, draws = torch.tensor([1.0, 30.0, -5.0]), torch.Generator()
    assert all(choose(logits, Sampling(temperature=1e-37), draws) == 1 for _ in range(5))


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    """A folder without a checkpoint is refused with its name."""
    from megatron_hybrid.generation import open_checkpoint

    with pytest.raises(UserError, match="is no checkpoint: it has"), open_checkpoint(tmp_path):
        pass
    # Of a run, as of its checkpoints: there are some, and nothing says which is the latest.
    (tmp_path / "checkpoints" / "iter_0000004").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with (
            pytest.raises(
                UserError, match=rf"checkpoints holds iter_0000004, and no {TRACKER_FILE}"
            ),
            open_checkpoint(folder),
        ):
            pass


def test_a_special_token_in_a_prompt_is_characters_or_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters by default, its id on demand; a tokenizer that cannot find them says so."""
    prompts: list[Sequence[int]] = []

    @contextmanager
    def open_model(config: object, folder: Path, tokenizer: object) -> Iterator[SimpleNamespace]:
        def generate(prompt: Sequence[int], *_: object) -> Iterator[int]:
            prompts.append(prompt)
            yield from ()

        yield SimpleNamespace(tokenizer=tokenizer, generate=generate)

    monkeypatch.setattr(generation, "open_model", open_model)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"user": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("<|im_start|>", "isolated")
    words.add_special_tokens(["</s>", "<|im_start|>"])
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (tmp_path / TRACKER_FILE).write_text("1")
    words.save(str(folder / "tokenizer.json"))
    # Rules of training may have come since.
    trained = load_config([*GOOD, "optimizer.min_lr=1"], which=())
    (folder / "run_config.yaml").write_text(trained.to_yaml())
    for parse, expected in ((False, [1, 0]), (True, [3, 0])):
        list(generate_text(tmp_path, "<|im_start|>user", 1, Sampling(), parse_special_tokens=parse))
        assert prompts[-1] == expected
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"--parse-special-tokens needs a tokenizer\.json"):
        list(generate_text(tmp_path, "", 1, Sampling(), parse_special_tokens=True))


# Every way to lay a run out, to compute it faster and to keep less of it, in two runs.
LAID_OUT = [
    """tiny --mock-data --tokenizer-type null --vocab-size 256
    model.hybrid_layer_pattern=M*|E-|M*|E- model.num_moe_experts=4 model.activation=swiglu
    model.num_query_groups=4 model.moe_shared_expert_intermediate_size=64
    training.global_batch_size=8
    parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true
    parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2
    parallel.context_parallel_size=2 parallel.expert_model_parallel_size=2
    parallel.expert_tensor_parallel_size=2 parallel.overlap_grad_reduce=true
    parallel.overlap_param_gather=true gpu.cp_comm_type=a2a gpu.attention_backend=flash
    gpu.overlap_p2p_comm=true gpu.align_param_gather=true gpu.gradient_accumulation_fusion=true
    gpu.apply_rope_fusion=true gpu.bias_activation_fusion=true gpu.bias_dropout_fusion=true
    gpu.cross_entropy_loss_fusion=true gpu.cross_entropy_fusion_impl=te
    gpu.moe_permute_fusion=true gpu.moe_router_fusion=true gpu.moe_shared_expert_overlap=true
    training.recompute_granularity=full training.recompute_method=uniform
    training.recompute_num_layers=1""",
    """tiny --mock-data --tokenizer-type null --vocab-size 256 gpu.cuda_graph_impl=local
    gpu.cuda_graph_modules=[attn] gpu.cuda_graph_warmup_steps=4
    training.recompute_granularity=selective training.recompute_modules=[core_attn]""",
]


def test_one_process_generates_whatever_the_layout_was(tmp_path: Path) -> None:
    """What only many ranks can have is no reason to refuse a checkpoint; every field is tried."""
    of_layout = [n for n in fields() if n.startswith(("parallel.", "gpu.", "training.recompute"))]
    tried = set()
    for line in LAID_OUT:
        config = load_config(line.split(), which=rules.NO_FILES)
        values = config.model_dump()
        for name in of_layout:
            section, _, leaf = name.partition(".")
            if values[section][leaf] != fields()[name].default:
                tried.add(name)
        (tmp_path / "run_config.yaml").write_text(config.to_yaml())
        alone = read_config(tmp_path, *ONE_RANK, which=rules.NO_FILES)
        assert prod(model_ranks(alone).values()) == 1
    assert set(of_layout) - tried == {"parallel.use_distributed_optimizer"}  # always true
