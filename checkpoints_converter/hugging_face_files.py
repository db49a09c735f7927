"""The small files of an exported folder: configs, tokenizer, and a model card with its facts."""

import json
from pathlib import Path
from typing import Any

from checkpoints_converter import releases
from checkpoints_converter.carried_files import (
    CARD,
    CONFIG,
    GENERATION,
    as_they_were,
    generation_config,
    source_config,
    token_ids,
)
from checkpoints_converter.family import Family
from checkpoints_converter.inspection import Contents, open_any
from checkpoints_converter.tokenizer_files import write_tokenizer
from megatron_hybrid.checkpoint.carried import read_carried, write_files
from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.pattern import KINDS, parse_pattern
from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.data.tokenizer import holds_tokenizer, load_tokenizer
from megatron_hybrid.fileio import write_atomic


def write_small_files(
    folder: Path,
    checkpoint: Path,
    config: RunConfig,
    family: Family,
    *,
    dtype: str,
    parameters: int,
) -> list[str]:
    """Write all files of an exported folder but the weights; config.json last.

    Args:
        checkpoint: the distributed checkpoint, from which tokenizer and facts come.
        dtype: of most weights, as transformers names it.
        parameters: numbers in all tensors.

    Returns:
        What holds, but the user should know.

    Raises:
        DataError: the checkpoint's tokenizer is damaged.
    """
    tokenizer = load_tokenizer(checkpoint) if holds_tokenizer(checkpoint) else None
    problem = tokenizer and config.vocabulary_problem(tokenizer.vocab_size)
    carried = read_carried(checkpoint)
    specials, tokenizer_note = write_tokenizer(tokenizer, folder, carried)
    write_files(folder, as_they_were(carried))
    contents = open_any(checkpoint).contents
    card = _card(checkpoint, contents, config, family, dtype, parameters, tokenizer_note)
    write_atomic(folder / CARD, card)
    own = {"bos_token_id": specials.bos, "eos_token_id": specials.eos, "pad_token_id": specials.pad}
    ids = token_ids(carried, own)
    write_atomic(folder / GENERATION, generation_config(carried, ids))
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        # Releases of transformers differ in the name.
        "dtype": dtype,
        "torch_dtype": dtype,
        "max_position_embeddings": _positions(
            source_config(carried), max(sequence_lengths(config))
        ),
        "use_cache": True,
        **ids,
        **family.config(config.model),
    }
    write_atomic(folder / CONFIG, _json(fields))
    notes = [f"it can be used with another tokenizer only: {problem}"] if problem else []
    release = releases.problem_here(family, config.model) if family.in_transformers else None
    return [*notes, release] if release else notes


def _positions(source: dict[str, Any], seq_length: int) -> int:
    """How many positions the model is for: as many as it came with, where it was for more."""
    said = source.get("max_position_embeddings")
    return max(said, seq_length) if type(said) is int else seq_length


def _lengths(config: RunConfig) -> list[int]:
    """The shortest samples of the run and the longest, where they differ."""
    found = sorted(set(sequence_lengths(config)))
    return [found[0], found[-1]] if len(found) > 1 else found


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _card(
    checkpoint: Path,
    contents: Contents,
    config: RunConfig,
    family: Family,
    dtype: str,
    parameters: int,
    tokenizer_note: str,
) -> str:
    """README.md: what the model is and how it was trained, as far as the checkpoint says it."""
    model = config.model
    pattern = parse_pattern(model.hybrid_layer_pattern)
    layers = ", ".join(
        f"{pattern.count(symbol)} {kind}" for symbol, kind in KINDS.items() if pattern.has(symbol)
    )
    oldest, why = releases.floor(family, model)
    facts: dict[str, Any] = {
        "Architecture": f"`{family.architecture}` (`{family.model_type}`)",
        "Layers": f"{pattern.num_layers}: {layers}",
        "Pattern": f"`{pattern.layers}`",
        "Hidden size": model.hidden_size,
        "Vocabulary": model.vocab_size,
        "Parameters": f"{parameters:,}",
        "Weights": dtype,
        "Steps": _count(contents.progress.get("steps")),
        "Samples seen": _count(contents.progress.get("samples")),
        "Tokens seen": _count(contents.progress.get("tokens")),
        "Sequence length in training": " to ".join(map(str, _lengths(config))),
        "Trained on ranks of": _layout(contents),
        "Tokenizer": tokenizer_note,
        "transformers": f"{oldest} or later: {why}"
        if family.in_transformers
        else "has no such model: the code of the released one goes with it",
        "Converted from": f"`{checkpoint.name}`",
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
        f"# {config.preset or family.model_type}", "",
        "| | |", "|---|---|", *rows, "",
        *_data(contents),
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")',
        "```", "",
        "In half precision transformers also rounds the decays of Mamba-2 layers, which training "
        "kept in fp32; `dtype=torch.float32` computes with all there is.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _layout(contents: Contents) -> str | None:
    if contents.layout is None:
        return None
    return " ".join(f"{name} {size}" for name, size in contents.layout.items()) or "one GPU or DP"


def _data(contents: Contents) -> list[str]:
    """What was read of each source, where a data plan tells."""
    if contents.plan is None:
        return []
    plan, samples = contents.plan.plan, contents.plan.consumed_samples
    rows = [
        f"| {use.name} | {use.tokens:,} | {use.epochs:.2f} |"
        for use in plan.consumed(samples)
        if use.tokens
    ]
    return ["## Data", "", "| source | tokens | epochs |", "|---|---|---|", *rows, ""]
