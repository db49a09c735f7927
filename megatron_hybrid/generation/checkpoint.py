"""A checkpoint opened for generation: the model of any layout, and its tokenizer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.saved_config import read_config
from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.flags import parse_command_line
from megatron_hybrid.config.pattern import cut_evenly
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.config.ranks import PP
from megatron_hybrid.config.rules.generation import LAYOUT_FIELDS
from megatron_hybrid.config.sections import PrecisionConfig
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.backend import resolve_backend
from megatron_hybrid.training.distributed import process_groups, select_device

# Whatever the ranks that trained it: one process generates, unless it is told otherwise.
ONE_RANK = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.context_parallel_size=1",
    "parallel.expert_model_parallel_size=1",
    "parallel.expert_tensor_parallel_size=1",
    "gpu.overlap_p2p_comm=false",
    "gpu.align_param_gather=false",
    "gpu.gradient_accumulation_fusion=false",
    "gpu.moe_shared_expert_overlap=false",
    "gpu.cuda_graph_impl=none",
    "gpu.cuda_graph_modules=[]",
    "training.recompute_granularity=null",
    "training.recompute_method=null",
    "training.recompute_num_layers=null",
    "training.recompute_modules=[]",
)


def read_checkpoint(
    checkpoint: Path,
    layout: Sequence[str] = (),
    *,
    world_size: int = 1,
    parse_special_tokens: bool = False,
) -> tuple[RunConfig, Path, Tokenizer]:
    """The config to generate by, the folder and the tokenizer of the newest checkpoint under one.

    Args:
        checkpoint: as for `find_checkpoint`.
        layout: words of `LAYOUT_FIELDS`, such as `parallel.tensor_model_parallel_size=2`.
        world_size: ranks that generate.
        parse_special_tokens: the tokenizer lets the text of a special token become its id.

    Raises:
        UserError: there is no whole checkpoint, it is not of a model that can generate, or the
            ranks cannot hold it so.
    """
    check_words(layout, LAYOUT_FIELDS, "generation")
    folder = find_checkpoint(checkpoint)
    config = read_layout(folder, layout, world_size=world_size, which=rules.GENERATION)
    return config, folder, load_tokenizer(folder, parse_special_tokens=parse_special_tokens)


def read_layout(
    folder: Path, words: Sequence[str], *, world_size: int, which: tuple[rules.Rule, ...]
) -> RunConfig:
    """The config of a checkpoint's model in a layout of other ranks than those that trained it.

    Args:
        folder: the checkpoint itself.
        words: that `check_words` lets pass.
        which: rules of such a layout.

    Raises:
        UserError: it is not of a model that can generate, or the ranks cannot hold it so.
    """
    # How a run of an earlier version was trained is for no rule of today's to judge.
    config = read_config(folder, *ONE_RANK, which=rules.MODEL)
    stages = dict(parse_command_line(words).values).get(PP, 1)
    cut = []
    if type(stages) is int and stages > 1:  # its type refuses what else it is
        cut = [
            f"model.hybrid_layer_pattern={cut_evenly(config.model.hybrid_layer_pattern, stages)}"
        ]
    config = load_config(
        [*cut, *words], base=config.model_dump(mode="json"),
        which=which, world_size=world_size, has_cuda=torch.cuda.is_available(),
    )  # fmt: skip
    refuse_unable(config, folder)
    return config


def refuse_unable(config: RunConfig, name: object) -> None:
    """Refuse what is no model of texts from left to right.

    Args:
        name: of the model, for the error.

    Raises:
        UserError: naming the field.
    """
    if config.model.attn_mask_type != "causal":
        raise UserError(
            f"{name} has model.attn_mask_type={config.model.attn_mask_type}: each of its tokens "
            "sees all others, so that it cannot write one after the other; allowed: causal"
        )


def check_words(words: Sequence[str], fields: Sequence[str], purpose: str) -> None:
    """Refuse words that are not of these fields.

    Args:
        purpose: what they are said for, as "generation".

    Raises:
        ConfigError: every word that is not.
    """
    line = parse_command_line(words)
    problems = list(line.problems)
    if line.source is not None:
        problems.append(f"{line.source!r} is no word of a layout")
    problems += [
        f"{name} is not for {purpose} to change; allowed: {', '.join(fields)}"
        for name, _ in line.values
        if name not in fields
    ]
    if problems:
        raise ConfigError(problems)


@contextmanager
def loaded_model(
    config: RunConfig, folder: Path, tokenizer: Tokenizer, *, alone: bool = True
) -> Iterator[tuple[RunConfig, list[torch.nn.Module]]]:
    """The model with the weights of a checkpoint, for the time of the block: this rank's chunks.

    Args:
        config: of a layout in which ranks generate.
        folder: the checkpoint itself, `.../iter_0000100`, saved by any layout.
        alone: this process is the only rank, whatever the environment says.

    Raises:
        UserError: it cannot be loaded, is of another model, or has fewer ids than the tokenizer.
    """
    config = config.with_vocab_size(tokenizer.vocab_size)
    if config.precision.recipe in FLOAT8_RECIPES:
        # The weights are bf16, and a token alone has no shape that float8 could take.
        config = config.model_copy(update={"precision": PrecisionConfig(recipe="bf16")})
    if not alone:
        select_device()
    platform, backend = initialize(), resolve_backend("auto")
    with process_groups(config, platform, alone=alone):
        from megatron_hybrid.model.build import build_model_chunks
        from megatron_hybrid.model.transformer_config import transformer_config
        from megatron_hybrid.training.checkpoint import load_checkpoint

        engine_config = transformer_config(config, backend, platform.device)
        chunks = build_model_chunks(config, engine_config, backend)
        load_checkpoint(config, folder, chunks, None, weights_only=True)
        for chunk in chunks:
            chunk.eval()
        yield config, chunks
