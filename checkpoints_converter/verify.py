"""Prove an export: our model of the checkpoint and transformers' of the exported folder agree.

Compared are the residual stream after every block, the logits, the greedy continuations, and for
small models both against the arbiter, which reads nothing but the exported files. Where it runs it
judges: sides that differ by more than the tolerance agree all the same if both are about as near to
it as its own formulas in fp32; if not, it says which side is off. All arithmetic is fp32 (the
arbiter's is float64), also for a bf16 export: its numbers are exact in fp32, so that the same
narrow tolerance holds, and bf16's own rounding cannot hide a mistake.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints_converter import releases
from checkpoints_converter.arbiter import FAMILIES
from checkpoints_converter.comparison import Comparison, grown
from checkpoints_converter.errors import ConversionError
from checkpoints_converter.registry import family
from checkpoints_converter.verify_report import Report, Text
from checkpoints_converter.verify_sides import (
    Answer,
    Prompt,
    exported_dtypes,
    our_answers,
    require_transformers,
    their_answers,
)
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.source_model import source_config
from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.layers import in_the_model
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.sections import GpuConfig, ParallelConfig, PrecisionConfig
from megatron_hybrid.data.tokenizer import (
    NullTokenizer,
    Tokenizer,
    holds_tokenizer,
    load_tokenizer,
)
from megatron_hybrid.model.transformer_config import RECOMPUTE_FIELDS
from megatron_hybrid.small_files import read_json

BUILT_IN_PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ")
# fp32 rounding: between transformers' own cached and uncached logits it is up to 4e-6 in models of
# a few layers.
TOLERANCE = 1e-5
# Both sides round alike in most places, so that they are nearer to each other than to the truth.
ARBITER_TOLERANCES = 10
ARBITER_PARAMETERS = 20_000_000  # it is slow, and in float64
PROMPT_SEED = 1234


def verify(
    checkpoint: Path,
    export: Path,
    prompts: Sequence[str] = (),
    *,
    model: str | None = None,
    parse_special_tokens: bool = False,
    max_new_tokens: int = 32,
    tolerance: float = TOLERANCE,
) -> Report:
    """Compare a checkpoint with what was exported from it.

    Args:
        checkpoint: as `find_checkpoint` takes it.
        prompts: texts to continue; ids, where the run had no tokenizer. Built-in ones without.
        model: preset or YAML file that describes the model, where the checkpoint does not.
        parse_special_tokens: let the text of a special token in a prompt become its id.
        tolerance: on differences relative to the standard deviation, for models of up to 8 layers;
            beyond, it grows with the root of the number of layers.

    Raises:
        UserError: a side cannot be loaded; transformers is missing or computes wrongly.
    """
    found = require_transformers()
    folder = find_checkpoint(checkpoint)
    exported = exported_dtypes(export)
    with CheckpointReader(folder) as reader:
        config = _alone_in_fp32(source_config(reader, model))
    tokenizer = _tokenizer(folder, config, parse_special_tokens)
    hf_config = read_json(export / "config.json", ConversionError)
    chosen = family(hf_config.get("model_type"))
    if not chosen.in_transformers:
        raise ConversionError(
            f"{export} is of model_type={chosen.model_type!r}, which transformers has not: it is "
            "published with code of its own, and files that are loaded may run no code here"
        )
    if problem := releases.problem(found, chosen, config.model):
        raise ConversionError(problem)
    report = Report(str(folder), str(export), found)
    asked = _prompts(prompts, tokenizer, hf_config)
    if not isinstance(tokenizer, NullTokenizer):
        report.problems += _tokenizer_problems(export, tokenizer, asked, parse_special_tokens)
    ours = our_answers(folder, config, tokenizer, exported, asked, max_new_tokens)
    theirs = their_answers(export, asked, max_new_tokens, tokenizer.eod)
    pattern = parse_pattern(config.model.hybrid_layer_pattern).layers
    at_the_end = grown(tolerance, len(pattern))
    lengths = _comparable(asked, ours, at_the_end)
    report.arbiter_left_out = _why_no_arbiter(export, hf_config)
    comparison = Comparison(pattern, asked, lengths, ours, theirs)
    if report.arbiter_left_out is None:
        comparison.ask_arbiter(export)
    report.rows += comparison.rows(tolerance)
    logits = report.rows[-1]
    if logits.judgement is not None:
        allowed = max(ARBITER_TOLERANCES * at_the_end, logits.judgement.allowed)
        report.rows += comparison.rows_of_sides(allowed)
    if logits.passed:
        at_the_end = max(at_the_end, logits.relative)
    for prompt, our, their in zip(asked, ours, theirs, strict=True):
        report.texts.append(_compare_texts(prompt, our, their, tokenizer, at_the_end))
    return report


def _alone_in_fp32(config: RunConfig) -> RunConfig:
    """The same model on a single rank, in fp32."""
    no_recompute = dict.fromkeys(RECOMPUTE_FIELDS)
    return config.model_copy(
        update={
            "model": in_the_model(config.model),
            "parallel": ParallelConfig(expert_tensor_parallel_size=1),
            "gpu": GpuConfig(),
            "precision": PrecisionConfig(recipe="fp32"),
            "training": config.training.model_copy(update=no_recompute),
        }
    )


def _tokenizer(folder: Path, config: RunConfig, parse_special_tokens: bool) -> Tokenizer:
    """The run's; ids as text where the checkpoint has none, as Megatron-LM's own."""
    if holds_tokenizer(folder):
        return load_tokenizer(folder, parse_special_tokens=parse_special_tokens)
    assert config.model.vocab_size is not None
    return NullTokenizer(config.model.vocab_size)


def _prompts(texts: Sequence[str], tokenizer: Tokenizer, hf_config: dict[str, Any]) -> list[Prompt]:
    """The texts asked for or the built-in ones, and drawn tokens beyond the length of a chunk."""
    prompts = []
    if texts or not isinstance(tokenizer, NullTokenizer):
        for text in texts or BUILT_IN_PROMPTS:
            tokens = tuple(tokenizer.encode(text))
            if not tokens:
                raise ConversionError(f"--prompt {text!r} has no tokens: give at least one")
            prompts.append(Prompt(repr(text), tokens, text))
    chunk = hf_config.get("chunk_size") or hf_config.get("mamba_chunk_size") or 256
    draws = torch.Generator().manual_seed(PROMPT_SEED)
    for length in (7, chunk + chunk // 2 + 1):
        drawn = torch.randint(0, tokenizer.vocab_size, (length,), generator=draws)
        prompts.append(Prompt(f"{length} drawn tokens", tuple(drawn.tolist())))
    return prompts


def _tokenizer_problems(
    export: Path, tokenizer: Tokenizer, prompts: Sequence[Prompt], parse_special_tokens: bool
) -> list[str]:
    """How the exported tokenizer differs from the run's on the prompts, and at a document's end."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        theirs = AutoTokenizer.from_pretrained(export, local_files_only=True)
    except Exception as error:  # any part of transformers may stumble, in its own way
        return [f"transformers cannot load the tokenizer of {export}: {error}"]
    problems = []
    for prompt in prompts:
        if prompt.text is not None:
            # By itself it lets the text of a special token become its id.
            ids = theirs.encode(
                prompt.text,
                add_special_tokens=False,
                split_special_tokens=not parse_special_tokens,
            )
            if tuple(ids) != prompt.tokens:
                problems.append(
                    f"the exported tokenizer reads {prompt.name} as {ids}, the run's as "
                    f"{list(prompt.tokens)}"
                )
    ends = GenerationConfig.from_pretrained(export).eos_token_id
    if tokenizer.eod not in (ends if isinstance(ends, list) else [ends]):
        problems.append(
            f"generation_config.json ends texts at {ends}, the run's tokenizer at {tokenizer.eod}"
        )
    return problems


def _comparable(prompts: Sequence[Prompt], ours: Sequence[Answer], tolerance: float) -> list[int]:
    """How many tokens of each prompt can be compared: those before a tie between two experts."""
    lengths = []
    for prompt, our in zip(prompts, ours, strict=True):
        ties = (our.router_margins[: len(prompt.tokens)] <= tolerance).nonzero()
        lengths.append(int(ties[0]) if len(ties) else len(prompt.tokens))
    return lengths


def _compare_texts(
    prompt: Prompt, ours: Answer, theirs: Answer, tokenizer: Tokenizer, tolerance: float
) -> Text:
    verdict, differs_at = "same", None
    if ours.continuation != theirs.continuation:
        pairs = zip(ours.continuation, theirs.continuation, strict=False)
        shorter = min(len(ours.continuation), len(theirs.continuation))
        differs_at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
        # Each logit may be off by the tolerance, so two may change places.
        near = 2 * tolerance * ours.logits.std().item()
        chosen = ours.router_margins[: len(prompt.tokens) + differs_at]
        tie = ours.margins[differs_at] <= near or bool((chosen <= tolerance).any())
        verdict = "tie" if tie else "different"
    return Text(
        prompt.name, len(prompt.tokens), tokenizer.decode(ours.continuation),
        tokenizer.decode(theirs.continuation), verdict, differs_at,
    )  # fmt: skip


def _why_no_arbiter(export: Path, hf_config: dict[str, Any]) -> str | None:
    size = sum(path.stat().st_size for path in export.glob("*.safetensors"))
    if hf_config["model_type"] not in FAMILIES:
        return f"it does not know {hf_config['model_type']}"
    if size > 4 * ARBITER_PARAMETERS:
        return f"{size / 1e6:,.0f} MB are too many for it"
    return None
