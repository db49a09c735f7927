"""A checkpoint opened for generation, whatever the layout that saved it."""

import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import tokenizers
import torch

from megatron_hybrid.checkpoint.carried import carried_ends, ends_of, read_carried
from megatron_hybrid.checkpoint.integrity import checkpoint_digest
from megatron_hybrid.checkpoint.saved_config import read_config
from megatron_hybrid.config import TRACKER_FILE, load_config, rules
from megatron_hybrid.config.describe import fields
from megatron_hybrid.config.ranks import PP, TP, model_ranks
from megatron_hybrid.config.sections import GpuConfig
from megatron_hybrid.data.tokenizer import NullTokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import ONE_RANK, Generator, SamplingParams
from megatron_hybrid.generation import generator as generator_module
from megatron_hybrid.generation.checkpoint import read_checkpoint
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


def from_checkpoint(checkpoint: Path) -> None:
    """On a rank: tokens of a checkpoint are the likeliest of its model's own forward pass."""
    torch.distributed.destroy_process_group()  # generation makes its own
    prompts = torch.randint(0, VOCAB_SIZE, (2, 70), generator=torch.Generator().manual_seed(0))
    asked = SamplingParams(max_new_tokens=20, ignore_eod=True)
    with Generator(checkpoint) as generator:
        found = generator.generate(prompts.tolist(), asked)
        tokens = torch.tensor([each.tokens for [each] in found])
        logits = generator.logits(torch.cat((prompts, tokens), dim=1))
        assert torch.equal(logits[:, 69:-1, :VOCAB_SIZE].argmax(-1), tokens)
        pieces = list(generator.stream("1 2 3", asked))
        [[whole]] = generator.generate(["1 2 3"], asked)
        assert "".join(pieces) == whole.text and len(pieces) == 20
        [[stopped]] = generator.generate(["1 2 3"], replace(asked, stop=(pieces[4], pieces[3])))
        assert (stopped.text, stopped.end) == ("".join(pieces[:3]), "stop")
    generator_module.carried_ends = lambda folder: frozenset({whole.tokens[3]})
    with Generator(checkpoint) as generator:
        [[ended]] = generator.generate(["1 2 3"], replace(asked, ignore_eod=False))
        assert ended.end == "eod"
        assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[3])]


def test_a_checkpoint_of_any_layout(checkpoint: Path) -> None:
    """All four layer kinds, saved by TP2 x PP2: tokens, streamed text and stop texts."""
    run_distributed(from_checkpoint, 1, checkpoint)


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    """A folder without a checkpoint is refused with its name."""
    with pytest.raises(UserError, match="is no checkpoint: it has"):
        Generator(tmp_path)
    # Of a run, as of its checkpoints: there are some, and nothing says which is the latest.
    (tmp_path / "checkpoints" / "iter_0000004").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(
            UserError, match=rf"checkpoints holds iter_0000004, and no {TRACKER_FILE}"
        ):
            Generator(folder)


def test_a_model_in_memory_is_held_against_its_tokenizer() -> None:
    """As one of a checkpoint is: before its rows are read beyond their end, or from both sides."""
    config = load_config(GOOD, which=())
    Generator.of_model(config, [], NullTokenizer(256))
    with pytest.raises(UserError, match=r"model\.vocab_size=256 must hold the tokenizer's 257"):
        Generator.of_model(config, [], NullTokenizer(257))
    both = load_config([*GOOD, "model.attn_mask_type=no_mask"], which=())
    with pytest.raises(UserError, match=r"the model has model\.attn_mask_type=no_mask"):
        Generator.of_model(both, [], NullTokenizer(256))


def test_a_checkpoint_in_another_s_place(tmp_path: Path) -> None:
    """It is another model, whose answers do not go into the other's file; a copy is the same."""
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "__0_0.distcp"
    weights.write_bytes(bytes(200_000))
    before = checkpoint_digest(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert checkpoint_digest(tmp_path / "b") == before
    for place in (0, 199_999):
        content = bytearray(200_000)
        content[place] = 1
        weights.write_bytes(content)
        assert checkpoint_digest(tmp_path / "a") != before
    for name in ("stamp", "run_config.yaml", "hugging_face/generation_config.json"):
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_text("x")
        after = checkpoint_digest(tmp_path / "b")
        assert after != before, name
        before = after


def test_tokens_that_end_a_text(tmp_path: Path) -> None:
    """Those of the Hugging Face folder that a model came from: of generation_config.json, else of
    config.json, as transformers takes them; generation ends at each.
    """
    folder = tmp_path / "hugging_face"
    assert carried_ends(tmp_path) == ends_of({}) == frozenset()
    folder.mkdir()
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    assert carried_ends(tmp_path) == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert carried_ends(tmp_path) == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 11]}')
    assert carried_ends(tmp_path) == ends_of(read_carried(tmp_path)) == {3, 11}
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, "x"]}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=\[3, 'x'\] must"):
        carried_ends(tmp_path)
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=\[3, 'x'\] must"):
        ends_of(read_carried(tmp_path))
    with pytest.raises(UserError, match=r"hugging_face/config\.json is damaged"):
        ends_of({"config.json": b"{"})


def test_a_special_token_in_a_prompt_is_characters_or_its_id(tmp_path: Path) -> None:
    """Characters by default, its id on demand; a tokenizer that cannot find them says so."""
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
        _, _, tokenizer = read_checkpoint(tmp_path, parse_special_tokens=parse)
        assert tokenizer.encode("<|im_start|>user") == expected
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"--parse-special-tokens needs a tokenizer\.json"):
        read_checkpoint(tmp_path, parse_special_tokens=True)


# Every way to lay a run out, to compute it faster and to keep less of it, in two runs.
LAID_OUT = [
    """tiny --mock-data --tokenizer-type null --vocab-size 256
    model.hybrid_layer_pattern=M*|E-|M*|E- model.num_moe_experts=4 model.activation=swiglu
    model.num_query_groups=4 model.moe_shared_expert_intermediate_size=64
    training.global_batch_size=8
    parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true
    parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2
    parallel.context_parallel_size=2 parallel.mamba_cp_comm_type=state_passing
    parallel.expert_model_parallel_size=2
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


def test_a_layout_that_generates(tmp_path: Path) -> None:
    """The pattern is cut into as many stages, wherever training cut it; what cannot be is refused,
    all of it at once."""
    trained = load_config([*LAID_OUT[0].split(), "run_dir=x"], which=rules.NO_FILES)
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (tmp_path / TRACKER_FILE).write_text("1")
    (folder / "run_config.yaml").write_text(trained.to_yaml())
    NullTokenizer(256).save_copy(folder)
    for stages, pattern in ((1, "M*|E-|M*|E-"), (3, "M*E|-M*|E-"), (8, "M|*|E|-|M|*|E|-")):
        words = [f"parallel.pipeline_model_parallel_size={stages}"]
        config, *_ = read_checkpoint(tmp_path, words, world_size=stages)
        assert config.model.hybrid_layer_pattern == pattern
    flags = ["--tensor-model-parallel-size", "2", "parallel.expert_model_parallel_size=4"]
    assert model_ranks(read_checkpoint(tmp_path, flags, world_size=4)[0])[TP] == 2
    unchecked = "checkpoint.verify_integrity=false"  # as the error of a lost manifest says
    assert not read_checkpoint(tmp_path, [unchecked])[0].checkpoint.verify_integrity
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path, [f"{TP}=3", f"{PP}=9"], world_size=2)
    for text in ("=3 must divide model.num_query_groups=4", "=9 must be at most the layers",
                 "number of ranks, 2, must be 27"):  # fmt: skip
        assert text in str(error.value)
    with pytest.raises(UserError, match=r"parallel\.context_parallel_size is not for generation"):
        read_checkpoint(tmp_path, ["parallel.context_parallel_size=2"])
