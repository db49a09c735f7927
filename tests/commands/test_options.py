"""Every option of every command is read, or refused, or it is said that nothing reads it."""

import inspect
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from megatron_hybrid import cli
from megatron_hybrid.commands.app import options_with, refuse_unread
from megatron_hybrid.commands.generate import _note_unread
from megatron_hybrid.generation.params import Limits, SamplingParams
from tests.test_bounds import COMMANDS

# What each command goes by, whatever else is given.
READ = {
    "pretrain": "nproc dry_run show_help",
    "upcycle": "load save experts granularity topk layers shared_experts router_order router_std "
    "router_noise reinit_fraction scale_weights restart_schedule model threads dry_run",
    "compress score": "checkpoint output picture batch_size nproc",
    "compress prune": "checkpoint save num_layers drop_layers hidden_size ffn_hidden_size "
    "mamba_num_heads mamba_head_dim num_attention_heads num_moe_experts "
    "moe_shared_expert_intermediate_size layers scores keep restart_schedule model threads dry_run",
    "submit": "nodes ranks_per_node gpus_per_node time_limit job_name partition account chain "
    "array option template dry_run",
    "preflight": "nproc world_size checksum_s",
    "plan": "gpus gpu search balance context_tokens output as_json",
    "verdict": "exit_code world_size",
    "generate": "checkpoint prompt prompts serve output max_new_tokens temperature "
    "repetition_penalty stop parse_special_tokens nproc",
    "evaluate": "checkpoint inputs prefixes tasks batch_size as_json nproc",
    "status": "run as_json",
    "track": "run",
    "smoke-test": "nproc layouts keep",
    "config": "reference",
    "counts": "",
    "doctor": "",
    "distill cache": "teacher output top_k top_p dtype block_samples nproc dry_run",
    "data tokenize": "inputs output tokenizer_type more_inputs chat parse_special_tokens encoder "
    "append_eod shuffle workers max_rejected_fraction",
    "data plan": "output scale as_json",
    "data verify": "prefixes tokenizer_model tokenizer_type vocab_size",
    "data stats": "prefixes output",
    "data show": "prefix numbers tokens chat",
    "convert to-hf": "checkpoint out dtype max_shard_size family model in_place force "
    "verify_integrity threads",
    "convert from-hf": "source checkpoints dtype make_vocab_size_divisible_by force threads",
    "convert verify": "checkpoint out prompt max_new_tokens tolerance model json",
}
# Where what they go with is no other option: said by a note, or refused by what they name.
SAID = {
    "preflight": "timeout_s",  # of ranks
    "generate": "top_k top_p min_p seed max_sequences max_tokens",  # of draws
    "evaluate": "overlap parse_special_tokens",  # of windows of files; of texts
    "data tokenize": "tokenizer_model vocab_size json_key",  # of kinds of tokenizers, of texts
    "data show": "tokenizer_model tokenizer_type vocab_size",  # of texts
    "convert from-hf": "ignore_field",  # of what config.json has
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_was_looked_at(name: str) -> None:
    """A new one is read always, or has an entry that says when."""
    there = {*inspect.signature(COMMANDS[name]).parameters} - {"context"}
    kinds = [READ[name].split(), SAID.get(name, "").split(), [*options_with(COMMANDS[name])]]
    assert sorted(each for kind in kinds for each in kind) == sorted(there)


def test_what_is_read_with_another_is_refused_without_it() -> None:
    """By name, and taken beside it, or at its default."""
    tried = 0
    for function in COMMANDS.values():
        for name, other in options_with(function).items():
            default = inspect.signature(function).parameters[name].default
            with pytest.raises(typer.BadParameter, match=f"only with --{other.replace('_', '-')}"):
                refuse_unread(function, {name: object(), other: None})
            refuse_unread(function, {name: object(), other: True})
            refuse_unread(function, {name: default, other: None})
            tried += 1
    assert tried >= 12
    runner = CliRunner()
    for words, hint in (
        ("generate x --prompt a --max-tokens 9", "--max-tokens"),
        ("plan tiny --gpus 8 --top 3", "--top"),
        ("data tokenize --input x --output y --tokenizer-type null --no-shuffle --shuffle-seed 7",
         "--shuffle-seed"),
        ("data show x 0 --tokens --tokenizer-model y", "--tokenizer-model"),
        ("data show x 0 --tokenizer-model y --vocab-size 9", "--vocab-size"),
    ):  # fmt: skip
        done = runner.invoke(cli.app, words.split())
        assert done.exit_code == 2, words
        assert hint in done.output


def test_what_only_draws_go_by_is_said() -> None:
    """Every field of them, with the reason; nothing where there are draws."""
    for name, value in (("top_k", 5), ("top_p", 0.5), ("min_p", 0.1), ("seed", 7)):
        said = SamplingParams(**{name: value}).unread  # type: ignore[arg-type]
        assert said == f"{name}={value} has no effect: temperature=0 takes the likeliest token"
        assert SamplingParams(**{name: value}, temperature=0.5).unread is None  # type: ignore[arg-type]
    assert SamplingParams().unread is None
    assert "n=3 continuations are the same" in str(SamplingParams(n=3).unread)


def test_tokens_that_nothing_keeps_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a server as of a file of prompts."""
    for pattern, most, said in (
        ("M-", 9, True),
        ("M-", Limits.max_tokens, False),
        ("M*", 9, False),
    ):
        model = SimpleNamespace(hybrid_layer_pattern=pattern)
        config = SimpleNamespace(model=model)
        _note_unread(SimpleNamespace(limits=Limits(max_tokens=most), config=config))  # type: ignore[arg-type]
        assert ("max_tokens=9 has no effect" in capsys.readouterr().err) == said


def test_preflight_refuses_ranks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every command that starts ranks, under a launcher that has."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(cli.app, ["preflight", "tiny", "--nproc", "2"])
    assert done.exit_code == 2
    assert "a launcher has started this rank already" in done.output
