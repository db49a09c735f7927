"""Whether a folder of cached answers is what a run can learn from. From files alone."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.integrity import checkpoint_digest
from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.teachers.cache_find import lacking
from megatron_hybrid.teachers.cache_spec import read_cache

if TYPE_CHECKING:
    from megatron_hybrid.data.datasets import RunData
    from megatron_hybrid.objectives.distillation_options import Options, Teacher

NAME = "training.objective_options"


def cache_problems(
    config: RunConfig,
    name: str,
    teacher: "Teacher",
    *,
    temperature: float,
    conversations: bool,
) -> Iterator[str]:
    """Why cached answers are none to a run's model and data.

    Args:
        name: the option and its value, for the sentence.
        conversations: whether samples are rows of conversations.
    """
    assert teacher.cache is not None
    try:
        spec = read_cache(teacher.cache).spec
        if teacher.checkpoint is not None:
            folder = find_checkpoint(teacher.checkpoint)
            if checkpoint_digest(folder) != spec.teacher:
                yield f"{name} has the answers of another teacher than {folder}"
    except UserError as error:
        yield f"{name}: {error}"
        return
    if config.model.num_meta_tokens:
        yield (
            f"{name}: model.num_meta_tokens={config.model.num_meta_tokens} is not supported; "
            "allowed: 0"
        )
    if config.data.mock_data or config.data.sample_order == "megatron":
        field = "mock_data=true" if config.data.mock_data else "sample_order=megatron"
        yield f"{name}: samples of data.{field} have no plan by which they are found"
    words = config.model.vocab_size
    if words is not None and words != spec.vocab_size:
        yield f"{name} is of {spec.vocab_size} words; it must be model.vocab_size={words}"
    elif (ours := tokenizer_of(config)) is not None and (
        (ours.fingerprint, ours.eod) != (spec.tokenizer, spec.eod)
    ):
        yield (
            f"{name} is of another tokenizer than data.tokenizer_model="
            f"{config.data.tokenizer_model}"
        )
    if config.data.packed_documents != spec.packed_documents:
        yield (
            f"{name} is of data.packed_documents={str(spec.packed_documents).lower()}; it is "
            f"{str(config.data.packed_documents).lower()}"
        )
    if conversations != spec.conversations:
        its = "rows of conversations" if spec.conversations else "windows of text"
        yield f"{name} is of {its}; training.objective={config.training.objective} reads others"
    if temperature != spec.temperature:
        yield (
            f"{NAME}.temperature={temperature} must be that of {name}, {spec.temperature}: the "
            "mass of what was not kept is known at no other"
        )


def lacking_answers(options: "Options", data: "RunData", consumed_samples: int) -> Iterator[str]:
    """Samples of a run that its caches have no answers to.

    One rank looks through what may be a million files; what it finds ends the run.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    for option, teacher in options.named.items():
        if teacher.cache is None:
            continue
        place = f"{NAME}.cache" if option == "teacher" else f"{NAME}.{option}.cache"
        try:
            cache = read_cache(teacher.cache)
        except UserError as error:
            yield f"{place}={teacher.cache}: {error}"
            continue
        yield from lacking(cache, data.plans, consumed_samples, f"{place}={teacher.cache}")


def tokenizer_of(config: RunConfig) -> Tokenizer | None:
    """Of a run's data; None: there is none, which is told of by itself."""
    data = config.data
    try:
        return _known(data.tokenizer_type, data.tokenizer_model, config.model.vocab_size)
    except UserError:
        return None


@lru_cache
def _known(kind: str, model: Path | None, words: int | None) -> Tokenizer:
    return build_tokenizer(kind, model, vocab_size=words)
