"""Flags and overrides: every one reads, and Megatron-LM's names reach the fields they mean."""

import argparse
import re
import sys
from typing import Any, Literal, get_args, get_origin

import pytest

from megatron_hybrid.config import build_config, load_config, rules
from megatron_hybrid.config.describe import allowed, fields, plain_type
from megatron_hybrid.config.flags import flags, parse_command_line
from megatron_hybrid.config.megatron_flags import explained, meaning
from megatron_hybrid.config.megatron_fp8 import FLAGS
from megatron_hybrid.reference import is_megatrons
from tests.config import GOOD

# A value that fits each field whose type alone does not tell one.
TEXTS = {
    "model.hybrid_layer_pattern": "M-MM",
    "model.mamba_version": "1",
    "model.rotary_base": "20000",
    "model.window_size": "128,0",
    "model.ssm_multipliers": "[1, 0.5, 2, 1, 1]",
    "model.mlp_multipliers": "[1, 0.5]",
    "model.layers": "{M: {mamba_num_heads: 2}}",
    "data.data_path": "0.3",
    "data.sources": "{web: {path: some/path}}",
    "data.phases": "[{name: all, weights: {web: 1}}]",
    "data.split": "1,1,1",
    "gpu.cuda_graph_modules": "[attn, mamba]",
    "training.recompute_modules": "[mlp, moe]",
    "training.batch_size_schedule": "[[1e6, 2]]",
    "training.profile_ranks": "[0, 1]",
    "training.eval_tasks": "[one, two]",
    "training.callbacks": "[package.module:Name]",
    "training.objective_options": "{name: 1}",
    "preset": "tiny",
}


def text_for(path: str) -> str:
    """A word that the flag of a field accepts."""
    kind = plain_type(fields()[path])
    if path in TEXTS:
        return TEXTS[path]
    if get_origin(kind) is Literal:
        return str(get_args(kind)[-1])
    number = "2" if "above 1" in allowed(fields()[path]) else "0.5"
    return {int: "64", float: number}.get(kind, "some/path")


@pytest.mark.parametrize("flag", flags().values(), ids=flags())
def test_every_flag_sets_its_field(flag: Any) -> None:
    """Each flag reads alone, as `--flag value` and `--flag=value`, into a value of the type."""
    word = text_for(flag.path)
    typed = [flag.name, word] if flag.takes_value else [flag.name]
    line = parse_command_line(typed)
    assert line.problems == []
    [(path, value)] = line.values
    assert path == flag.path
    if flag.takes_value:
        assert parse_command_line([f"{flag.name}={word}"]).values == line.values
        assert parse_command_line([f"{path}={word}"]).values[0][0] == path
    else:
        assert value == flag.value
    section, _, leaf = path.rpartition(".")
    if path not in ("preset", "data.data_path"):
        values = {"model": {"hybrid_layer_pattern": "M", "hidden_size": 64}}
        values["optimizer"] = {"lr": 1.0}
        (values.setdefault(section, {}) if section else values)[leaf] = value
        config = build_config(values, which=())
        assert getattr(getattr(config, section) if section else config, leaf) is not None


@pytest.mark.parametrize(
    ("typed", "path", "value"),
    [
        ("--tensor-model-parallel-size 2", "parallel.tensor_model_parallel_size", 2),
        ("--sequence-parallel", "parallel.sequence_parallel", True),
        ("--use-distributed-optimizer", "parallel.use_distributed_optimizer", True),
        ("--no-use-distributed-optimizer", "parallel.use_distributed_optimizer", False),
        ("--num-experts 8", "model.num_moe_experts", 8),
        ("--norm-epsilon 1e-6", "model.layernorm_epsilon", 1e-6),
        ("--hybrid-override-pattern M-*", "model.hybrid_layer_pattern", "M-*"),
        ("--hybrid-layer-pattern -M-", "model.hybrid_layer_pattern", "-M-"),
        ("--hybrid-layer-pattern --M", "model.hybrid_layer_pattern", "--M"),
        ("model.hybrid_layer_pattern=*M|E", "model.hybrid_layer_pattern", "*M|E"),
        ("--squared-relu", "model.activation", "squared_relu"),
        ("--swiglu", "model.activation", "swiglu"),
        ("--disable-bias-linear", "model.add_bias_linear", False),
        (
            "--untie-embeddings-and-output-weights",
            "model.untie_embeddings_and_output_weights",
            True,
        ),
        ("--bf16", "precision.recipe", "bf16"),
        ("--reset-attention-mask", "data.packed_documents", True),
        ("--sft", "training.objective", "sft"),
        ("--tokenizer-type GPTSentencePieceTokenizer", "data.tokenizer_type", "sentencepiece"),
        ("--tokenizer-type HuggingFaceTokenizer", "data.tokenizer_type", "huggingface"),
        ("data.tokenizer_type=null", "data.tokenizer_type", "null"),
        ("--no-load-optim", "checkpoint.load_optim", False),
        ("--no-load-rng", "checkpoint.load_rng", False),
        ("--finetune", "checkpoint.finetune", True),
        ("--save runs/1e5", "checkpoint.save", "runs/1e5"),
        ("--save 1e5", "checkpoint.save", "1e5"),
        ("--lr 8e-4", "optimizer.lr", 8e-4),
        ("--train_iters 7", "training.train_iters", 7),
        ("training.train_tokens=15e12", "training.train_tokens", 15e12),
        ("training.eval_interval=null", "training.eval_interval", None),
        ("--window-size (128,0)", "model.window_size", [128, 0]),
        ("model.window_size=[128,0]", "model.window_size", [128, 0]),
        ("--data-path a", "data.data_path", ["a"]),
        ("--data-path 0.3 a 0.7 b", "data.data_path", [0.3, "a", 0.7, "b"]),
        ("--data-path 1 2 3 4", "data.data_path", [1, "2", 3, "4"]),
        ("data.data_path=a", "data.data_path", ["a"]),
        ("--recompute-modules core_attn moe", "training.recompute_modules", ["core_attn", "moe"]),
        ("--recompute-modules mlp", "training.recompute_modules", ["mlp"]),
        ("--recompute-modules [mlp,moe]", "training.recompute_modules", ["mlp", "moe"]),
        ("--cuda-graph-modules attn mamba", "gpu.cuda_graph_modules", ["attn", "mamba"]),
        ("--profile-ranks 0 3", "training.profile_ranks", [0, 3]),
    ],
)
def test_words(typed: str, path: str, value: object) -> None:
    """What is typed becomes this value of this field."""
    line = parse_command_line(typed.split())
    assert line.problems == []
    assert line.values == [(path, value)]


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        (
            "--fp8-format hybrid --fp8-recipe tensorwise --bf16",
            [("precision.recipe", "fp8_tensorwise")],
        ),
        (
            "--bf16 --fp8-recipe blockwise",
            [("precision.recipe", "bf16"), ("precision.recipe", "fp8_blockwise")],
        ),
        (
            "--fp8-recipe mxfp8 precision.recipe=bf16",
            [("precision.recipe", "mxfp8"), ("precision.recipe", "bf16")],
        ),
        (
            "--fp8-recipe delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max",
            [("precision.recipe", "fp8_delayed")],
        ),
        (
            "--fp8-recipe=mxfp8 --fp8-format=e4m3 --fp8-param-gather",
            [("precision.recipe", "mxfp8"), ("precision.fp8_param_gather", True)],
        ),
        (
            "--num-layers-at-end-in-bf16 2 --first-last-layers-bf16 precision.recipe=tensorwise",
            [
                ("precision.num_layers_at_start_in_bf16", 1),
                ("precision.num_layers_at_end_in_bf16", 1),
                ("precision.num_layers_at_end_in_bf16", 2),
                ("precision.recipe", "fp8_tensorwise"),
            ],
        ),
    ],
)
def test_fp8_flags(typed: str, values: list[tuple[str, object]]) -> None:
    """Megatron-LM's FP8 flags become a recipe, --bf16 beside them or not; later values stand."""
    line = parse_command_line(typed.split())
    assert line.problems == []
    assert line.values == values


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (
            "--fp8-format hybrid",
            "--fp8-format hybrid needs --fp8-recipe; "
            "allowed: blockwise, delayed, tensorwise, mxfp8",
        ),
        (
            "--fp8-format hybrid --fp8-recipe blockwise",
            "--fp8-format hybrid is not the format of precision.recipe=fp8_blockwise; "
            "allowed: e4m3",
        ),
        (
            "--fp8-recipe delayed --fp8-amax-history-len 16",
            "--fp8-amax-history-len 16 is not supported; allowed: 1024",
        ),
        ("--fp8-format --bf16", "--fp8-format needs a value"),
        (
            "--first-last-layers-bf16=2",
            "--first-last-layers-bf16 takes no value, but '2' was given",
        ),
    ],
)
def test_fp8_flags_that_cannot_be_taken(typed: str, problem: str) -> None:
    """What a recipe fixes may be repeated but not changed."""
    assert parse_command_line(typed.split()).problems == [problem]


def test_data_path_ends_at_the_next_word_of_ours() -> None:
    """Prefixes with `=` or a leading dash are prefixes; flags and overrides are not."""
    line = parse_command_line(
        ["--data-path", "0.3", "/d/x=1/a", "0.7", "-b", "optimizer.lr=1", "--bf16"]
    )
    assert line.values == [
        ("data.data_path", [0.3, "/d/x=1/a", 0.7, "-b"]),
        ("optimizer.lr", 1),
        ("precision.recipe", "bf16"),
    ]


@pytest.mark.parametrize(
    "typed",
    [
        ["--data-path", "0.3", "a", "0.7", "b"],
        ["data.data_path=0.3 a 0.7 b"],
        ["data.data_path=[[0.3, a], [0.7, b]]"],
        ["data.data_path=[0.3, a, 0.7, b]"],
    ],
)
def test_blends_are_pairs(typed: list[str]) -> None:
    """However a blend is written, the config holds (weight, prefix) pairs."""
    config = load_config(["tiny", *typed], which=rules.NO_FILES)
    assert config.data.data_path == ((0.3, "a"), (0.7, "b"))


def test_one_prefix_may_hold_blanks() -> None:
    """A prefix without a weight has weight 1."""
    config = load_config(["tiny", "data.data_path=my data/text"], which=rules.NO_FILES)
    assert config.data.data_path == ((1.0, "my data/text"),)


def megatron_flags() -> set[str]:
    """Every flag of the installed Megatron-LM's parser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # which it imports, and which leaves folders
        arguments = pytest.importorskip("megatron.training.arguments")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    names = {name for action in parser._actions for name in action.option_strings}
    return {name.replace("_", "-") for name in names if name.startswith("--")}


def test_every_flag_of_megatron_is_taken_or_explained() -> None:
    """Each flag of Megatron-LM's parser sets a field, or has a sentence that says what to use or
    why there is nothing; what is suggested exists; and no sentence is of a flag that is not. The
    reference tells flags of Megatron-LM's from others."""
    theirs = megatron_flags()
    assert len(theirs) > 800
    assert {name for name in flags() if is_megatrons(name)} == theirs & {*flags()}
    left = theirs - {*flags(), *FLAGS}
    assert {f"--{name}" for name in explained()} == left
    for sentence in set(explained().values()):
        # Between backquotes are commands, with options of their own.
        for flag in re.findall(r"--[a-z][a-z0-9-]+", "".join(sentence.split("`")[::2])):
            assert flag in flags(), (flag, sentence)
    for name in left:
        problems = parse_command_line([name, "1"]).problems
        assert problems == [f"{name} of Megatron-LM is not taken; {meaning(name)}"]


@pytest.mark.parametrize(
    ("typed", "use"),
    [
        ("--rampup-batch-size 16 16 1000", "--batch-size-schedule"),
        ("--num-layers 52", "--hybrid-layer-pattern"),
        ("--lr-warmup-iters 10", "--lr-warmup-tokens"),
        ("--override-opt_param-scheduler", "--restart-schedule"),
        ("--muon-momentum 0.9", "AdamW"),
    ],
)
def test_what_is_said_of_a_flag_that_is_not_taken(typed: str, use: str) -> None:
    """The meaning, not what looks alike; its values are passed over."""
    [problem] = parse_command_line(["tiny", *typed.split(), "--bf16"]).problems
    assert use in problem
    assert "did you mean" not in problem


def test_what_is_no_flag_of_megatron_is_not_called_one() -> None:
    """A slip of the hand that begins as flags of its do gets the nearest of ours."""
    for typed, problem in (
        ("--optimizer-lr", "--optimizer-lr is not a flag; "),
        ("--ckpt-interval", "--ckpt-interval is not a flag; "),
        ("--logits-x", "--logits-x is not a flag; "),
        ("--mask-x", "--mask-x is not a flag; "),
    ):
        assert meaning(typed) is None
        [said] = parse_command_line([typed, "1"]).problems
        assert said.startswith(problem)


def test_megatron_script_reads_whole() -> None:
    """A typical script's flags, in its order, on top of a preset."""
    words = """--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --untie-embeddings-and-output-weights --disable-bias-linear --init-method-std 0.014
        --position-embedding-type none --squared-relu --seq-length 512 --train-samples 1000
        --lr-warmup-samples 10 --lr-decay-samples 900 --save s --split 99,1,0
        --lr 8e-4 --min-lr 8e-6 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
        --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm --bf16
        --micro-batch-size 4 --global-batch-size 16 --adam-beta1 0.9 --adam-beta2 0.95
        --log-interval 10 --save-interval 100 --eval-interval 50 --eval-iters 2
        --num-workers 1 --seed 7 --num-query-groups 2 --exit-duration-in-mins 230"""
    config = load_config([*GOOD, *words.split()], world_size=2)
    assert config.parallel.sequence_parallel
    assert config.training.exit_duration_in_mins == 230
    assert config.optimizer.lr_warmup_fraction is None  # the preset's, replaced by samples
