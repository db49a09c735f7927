"""What `distill cache` is asked for, settled from files alone: samples, teacher, layout, folder."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.integrity import checkpoint_digest
from megatron_hybrid.checkpoint.saved_config import refuse_other_data, saved_config
from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.rules.files import tokenizer_given
from megatron_hybrid.data.datasets import RunData, plan_data
from megatron_hybrid.data.saved_plan import SavedPlan, read_saved_plan
from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.objectives.distillation_options import Options, Teacher
from megatron_hybrid.objectives.registry import find_objective, objective_options
from megatron_hybrid.teachers.cache_spec import (
    CACHE_FILE,
    Cache,
    CacheError,
    CacheSpec,
    Dtype,
    read_cache,
)
from megatron_hybrid.teachers.config import problems_of_checkpoint, teacher_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What is to be kept.

    Attributes:
        top_k, top_p, min_k, dtype: as in `CacheSpec`; dtype None: that of the teacher's weights.
        block_samples: samples of a file; None: by size.
    """

    teacher: Path
    output: Path
    top_k: int = 64
    top_p: float | None = None
    min_k: int = 1
    dtype: Dtype | None = None
    block_samples: int | None = None


@dataclass(frozen=True)
class Opened:
    """What was found of it.

    Attributes:
        config: of the run, in the layout of the worker.
        teacher: the checkpoint itself.
    """

    config: RunConfig
    teacher: Teacher
    tokenizer: Tokenizer
    data: RunData
    cache: Cache


def open_caching(words: Sequence[str], asked: Asked, world_size: int) -> Opened:
    """Settle it, without the engine.

    Args:
        words: of the run whose samples they are; its `parallel` is the worker's.
        world_size: ranks of the worker.

    Raises:
        UserError: the data cannot be planned, the teacher cannot teach the run's model or be in
            that layout, or the folder is of other answers.
    """
    which = (*rules.OWN_DATA, rules.has_plan, tokenizer_given)
    config = load_config(words, which=which, stand_in={"optimizer": {"lr": 1e-4}})
    tokenizer = build_tokenizer(
        config.data.tokenizer_type, config.data.tokenizer_model, vocab_size=config.model.vocab_size
    )
    config = _in_layout(config.with_vocab_size(tokenizer.vocab_size))
    folder = find_checkpoint(asked.teacher)
    teacher = Teacher(checkpoint=folder)
    problems = list(problems_of_checkpoint(config, f"--teacher {asked.teacher}", teacher, folder))
    if problems:
        raise ConfigError(problems)
    # The groups of the worker are the teacher's: of experts too, which the student may not have.
    layout = teacher_config(config, teacher, world_size).parallel
    config = config.model_copy(update={"parallel": layout})
    kind = find_objective(config.training.objective)
    data = plan_data(config, tokenizer, _saved_plan(config), conversations=kind.conversations)
    options = objective_options(config)
    temperature = options.temperature if isinstance(options, Options) else 1.0
    spec = CacheSpec(
        teacher=checkpoint_digest(folder), tokenizer=tokenizer.fingerprint, eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size, packed_documents=config.data.packed_documents,
        conversations=kind.conversations, temperature=temperature,
        top_k=asked.top_k, top_p=asked.top_p, min_k=asked.min_k,
        dtype=asked.dtype or ("bf16" if config.precision.weights == "bf16" else "fp32"),
        block_samples={},
    )  # fmt: skip
    if not asked.min_k <= asked.top_k <= tokenizer.vocab_size:
        raise UserError(
            f"--top-k {asked.top_k} must be at least --min-k, {asked.min_k}, and at most the words "
            f"of the vocabulary, {tokenizer.vocab_size}"
        )
    if spec.dtype == "bf16" and config.precision.weights != "bf16":
        logger.warning(
            "note: --dtype bf16 rounds the logits of a teacher in precision.recipe=%s",
            config.precision.recipe,
        )
    plans = data.plans
    lengths = {each.seq_length for plan in plans.values() for each in plan.stretches}
    cache = Cache(asked.output, spec.with_blocks(lengths, asked.block_samples), plans)
    _refuse_other(cache)
    return Opened(config, teacher, tokenizer, data, cache)


def _in_layout(config: RunConfig) -> RunConfig:
    """A layout of TP is one of sequence parallelism too, as the experts' layers ask for."""
    split = config.parallel.tensor_model_parallel_size > 1
    parallel = config.parallel.model_copy(update={"sequence_parallel": split})
    return config.model_copy(update={"parallel": parallel})


def _saved_plan(config: RunConfig) -> SavedPlan | None:
    """Of the run, where it has begun: its past stays as it was."""
    from megatron_hybrid.training.start import find_checkpoint as find_start

    folder, weights_only, *_ = find_start(config)
    if folder is None or weights_only:
        return None
    saved, run = read_saved_plan(folder), saved_config(folder)
    if run is not None:
        refuse_other_data(folder, config, run, has_plan=saved is not None)
    return saved


def _refuse_other(cache: Cache) -> None:
    """Refuse a folder of other answers."""
    if not (cache.folder / CACHE_FILE).exists():
        # What begins with a dot is of a worker that is just making it, or was killed then.
        if cache.folder.exists() and any(each.name[0] != "." for each in cache.folder.iterdir()):
            raise CacheError(
                f"--output {cache.folder} holds other files, and no {CACHE_FILE}; allowed: a new "
                "folder, or one of this command"
            )
        return
    if found := list(read_cache(cache.folder).differences(cache)):
        lines = "".join(f"\n  - {each}" for each in found)
        raise CacheError(f"--output {cache.folder} holds other answers:{lines}")


def begin(cache: Cache) -> None:
    """Make the folder, which from then on is of these answers alone.

    Raises:
        CacheError: another worker has just made it for others.
        OSError: it cannot be written.
    """
    cache.folder.mkdir(parents=True, exist_ok=True)
    path = cache.folder / CACHE_FILE
    if not path.exists():
        part = cache.folder / f".{CACHE_FILE}.{os.getpid()}.own"
        # Of several workers, one makes it; it may have removed what others were about to.
        with suppress(FileExistsError, FileNotFoundError):
            write_atomic(part, cache.to_json())
            os.link(part, path)
    for left in cache.folder.glob(f".*{CACHE_FILE}.*own*"):
        left.unlink(missing_ok=True)
    _refuse_other(cache)
