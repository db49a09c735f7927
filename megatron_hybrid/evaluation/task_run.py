"""An evaluation by tasks: a checkpoint's model in a layout, asked by the rank that leads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.config import RunConfig, rules
from megatron_hybrid.config.rules.evaluation import WINDOWS
from megatron_hybrid.config.rules.generation import LAYOUT_FIELDS
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.evaluation.run import iteration_of
from megatron_hybrid.evaluation.tasks import AskedTasks, Tasks, Told
from megatron_hybrid.generation import Generator, Limits
from megatron_hybrid.generation.checkpoint import check_words, read_layout
from megatron_hybrid.training.metrics import TASKS


@dataclass(frozen=True)
class OpenedModel:
    """What was found of a checkpoint, before its weights are loaded.

    Attributes:
        folder: the checkpoint itself.
        max_length: tokens of a text at most.
    """

    config: RunConfig
    folder: Path
    tokenizer: Tokenizer

    @property
    def max_length(self) -> int:
        return self.config.data.seq_length


def open_model(
    checkpoint: Path, asked: AskedTasks, words: Sequence[str], *, world_size: int
) -> OpenedModel:
    """Find a checkpoint, without the engine.

    Args:
        words: of the layout, and `data.seq_length=N` for texts of another length than the run's.

    Raises:
        UserError: the checkpoint or the layout cannot be used.
    """
    check_words(words, (*LAYOUT_FIELDS, WINDOWS), "evaluation by tasks")
    folder = find_checkpoint(checkpoint)
    config = read_layout(folder, words, world_size=world_size, which=rules.GENERATION)
    # What a chat template writes are special tokens, which its messages may not hold.
    special = asked.parse_special_tokens or asked.apply_chat_template
    tokenizer = load_tokenizer(folder, parse_special_tokens=special)
    return OpenedModel(config.with_vocab_size(tokenizer.vocab_size), folder, tokenizer)


def limits_for(max_length: int, batch_size: int) -> Limits:
    """Room for so many texts at once, or for one where they are long."""
    page = Limits.page_tokens
    longest = (max_length // page + 2) * page
    return Limits(batch_size, max(longest, min(batch_size * longest, Limits.max_tokens)))


def evaluate_tasks(
    opened: OpenedModel, tasks: Tasks | None, batch_size: int, *, ranks: int, told: Told
) -> dict[str, Any] | None:
    """Have a checkpoint's model answer tasks.

    Args:
        tasks: on the rank that leads; None on the others.
        batch_size: texts at once.
        ranks: that evaluate.

    Returns:
        The record; None on the ranks that followed.

    Raises:
        UserError: the checkpoint cannot be loaded, or a task asks what it cannot be asked.
    """
    limits = limits_for(opened.max_length, batch_size)
    with Generator.of_checkpoint(
        opened.config, opened.folder, opened.tokenizer, limits=limits, alone=ranks == 1
    ) as generator:
        if tasks is None:
            generator.follow()
            return None
        found = tasks.ask(generator, opened.max_length, told)
    place = {"kind": TASKS, "iteration": iteration_of(opened.folder)}
    return place | {"checkpoint": opened.folder.name} | found
