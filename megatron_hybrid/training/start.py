"""What a run starts from and what it will read: settled from files alone, before the engine starts.

No other rank is needed, and torch only to look into another run's checkpoint, so a launcher finds
out what cannot run before it starts any rank, and every rank comes to the same answer by itself.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hybrid.checkpoint import files as checkpoint_files
from megatron_hybrid.checkpoint.carried import Carried, carried_on, ends_of
from megatron_hybrid.checkpoint.progress import Progress, saved_progress
from megatron_hybrid.checkpoint.same_samples import refuse_other_samples
from megatron_hybrid.checkpoint.saved_config import (
    other_functions,
    other_training,
    refuse_other_model,
    said_of_functions,
    saved_config,
)
from megatron_hybrid.checkpoint.saved_here import saved_here
from megatron_hybrid.claim import claim_file
from megatron_hybrid.config import RunConfig, validate
from megatron_hybrid.config.describe import shown
from megatron_hybrid.config.rules.common import LENGTHS, values
from megatron_hybrid.config.tracker import CONFIG_FILE
from megatron_hybrid.data.batches import Steps
from megatron_hybrid.data.conversations import note_ends
from megatron_hybrid.data.datasets import RunData, plan_data
from megatron_hybrid.data.run_plan import evaluated
from megatron_hybrid.data.saved_plan import SavedPlan, read_saved_plan
from megatron_hybrid.data.tokenizer import (
    Tokenizer,
    build_tokenizer,
    holds_tokenizer,
    load_tokenizer,
)
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.objectives.registry import data_problems, find_objective
from megatron_hybrid.training.batch_sizes import check_batch_sizes
from megatron_hybrid.training.named import check_named
from megatron_hybrid.upcycling.scheme import scheme_between

logger = logging.getLogger(__name__)


class Origin(NamedTuple):
    """The checkpoint that a run starts from.

    Attributes:
        folder: one checkpoint, `…/iter_0000100`; None: the run starts from nothing.
        weights_only: the counters, the optimizer and the data start anew.
        is_own: the run saved it itself, after it had started elsewhere: it is taken up whole,
            whatever the fields say of how the run began.
        upcycle: it is a dense model's, whose MLPs become experts.
    """

    folder: Path | None
    weights_only: bool
    is_own: bool
    upcycle: bool = False


@dataclass(frozen=True)
class Start:
    """Where a run starts, and what it will read from there on.

    Attributes:
        saved_plan: that travels in the checkpoint; None: it has none, or the data start anew.
        carried: of the Hugging Face folder that the model came from, by path.
        consumed_samples: at which it goes on; None: the state in the checkpoint alone tells.
    """

    origin: Origin
    data: RunData
    saved_plan: SavedPlan | None = None
    carried: Carried = field(default_factory=dict)
    consumed_samples: int | None = None


def claims(config: RunConfig) -> list[Path]:
    """What a run claims: its folder, and that of its checkpoints, which may be elsewhere."""
    assert config.checkpoint.save is not None
    return [claim_file(config.run_dir), claim_file(config.checkpoint.save)]


def open_run(config: RunConfig, world_size: int | None) -> tuple[RunConfig, Tokenizer, Start]:
    """Open what a run needs of files.

    Args:
        config: valid.
        world_size: ranks of the run; None: not known.

    Returns:
        The config with the size of the vocabulary, the tokenizer, and where the run starts.

    Raises:
        UserError: the tokenizer, what the config names, the checkpoint, the data or the
            sizes of the batches cannot be used; every problem of the first of these that has any.
    """
    data = config.data
    tokenizer = build_tokenizer(
        data.tokenizer_type, data.tokenizer_model, vocab_size=config.model.vocab_size
    )
    config = config.with_vocab_size(tokenizer.vocab_size)
    check_named(config)
    return config, tokenizer, find_start(config, tokenizer, world_size)


def find_start(config: RunConfig, tokenizer: Tokenizer, world_size: int | None) -> Start:
    """Find the checkpoint to start from and plan the data.

    The run goes on with its own checkpoint, else starts from `checkpoint.load` or `upcycling.from`,
    else from nothing.

    Raises:
        UserError: as `open_run`.
    """
    origin = find_checkpoint(config)
    saved_plan: SavedPlan | None = None
    progress = None
    consumed: int | None = 0
    if origin.folder is not None and origin.is_own:
        _note_other_beginning(config, origin.folder)
    if origin.folder is not None and not origin.is_own and not origin.upcycle:
        _refuse_other_arguments(config, origin.folder)
    if origin.folder is not None:
        _note_other_functions(config, origin.folder)
    if origin.folder is not None and origin.weights_only:
        _look_at_weights(config, tokenizer, origin)
    if origin.folder is not None and not origin.weights_only:
        if _starts_elsewhere(config, origin.folder):
            progress = _look_into(config, origin)
        saved_plan = _resumed_plan(config, tokenizer, origin.folder, upcycle=origin.upcycle)
        _note_other_training(config, origin.folder)
        if not origin.is_own and not _starts_elsewhere(config, origin.folder):
            _note_left_out(config, origin.folder)
        # Without a plan, the state in the checkpoint alone knows how far it has read.
        consumed = saved_plan.consumed_samples if saved_plan is not None else None
    conversations = find_objective(config.training.objective).conversations
    data = plan_data(config, tokenizer, saved_plan, conversations=conversations)
    if problems := data_problems(config, data, consumed or 0):
        raise ConfigError(problems)
    if origin.folder is not None and not origin.weights_only:
        _note_other_evaluations(config, origin.folder, data, saved_plan)
    if progress is not None:
        consumed = progress.consumed_samples
        _refuse_nothing_left(config, origin, data.steps, consumed)
        start = consumed if config.optimizer.restart_schedule else progress.schedule_start_samples
        validate(config, schedule_start_tokens=data.steps.tokens_before(start))
    if consumed is not None:
        check_batch_sizes(config, data.steps, consumed, world_size)
    carried = carried_on(origin.folder, tokenizer) if origin.folder is not None else {}
    if conversations:
        note_ends(data.sources, {tokenizer.eod, *ends_of(carried)}, tokenizer)
    return Start(origin, data, saved_plan, carried, consumed)


def find_checkpoint(config: RunConfig) -> Origin:
    """The checkpoint that a run starts from.

    Raises:
        UserError: there is none where a field names one, or it cannot be used so.
    """
    options, dense = config.checkpoint, config.upcycling.source
    assert options.save is not None
    name = "checkpoint.load" if dense is None else "upcycling.from"
    start = options.load or dense
    saved_here(options.save)  # that its list is damaged is said now, not when the run first saves
    own = checkpoint_files.latest_checkpoint(options.save)
    starts_elsewhere = start is not None and start.resolve() != options.save.resolve()
    if own is not None and starts_elsewhere:
        return Origin(own, weights_only=False, is_own=True)
    restarts = {
        "checkpoint.finetune=true": options.finetune,
        "optimizer.restart_schedule=true": config.optimizer.restart_schedule,
        "upcycling": dense is not None,
    }
    for restart, asked in restarts.items():
        if own is not None and asked:
            raise UserError(
                f"{restart} cannot start from {name}={start}, the folder that this run saves to; "
                "give the new run a run_dir of its own"
            )
    if own is None and start is not None:
        folder = checkpoint_files.latest_checkpoint(start)
        if folder is None:
            raise UserError(f"{name}={start} holds no checkpoint")
        return Origin(folder, options.finetune, is_own=False, upcycle=dense is not None)
    return Origin(own, weights_only=False, is_own=False)


def _starts_elsewhere(config: RunConfig, folder: Path) -> bool:
    """Whether a checkpoint is another run's; one of its own was looked into when it began."""
    save = config.checkpoint.save
    assert save is not None
    return folder.parent.resolve() != save.resolve()


def _look_into(config: RunConfig, origin: Origin) -> Progress | None:
    """The counters in the checkpoint that a run goes on from; None: it does not tell.

    Raises:
        UserError: it is damaged, or its dense model cannot become this one.
    """
    from megatron_hybrid.checkpoint.reader import CheckpointReader  # and torch
    from megatron_hybrid.checkpoint.source_model import source_config

    assert origin.folder is not None
    with CheckpointReader(origin.folder) as reader:
        if origin.upcycle:
            dense, scale = source_config(reader, None).model, config.upcycling.scale_weights
            scheme_between(dense, config.model, scale_weights=scale)
        return saved_progress(origin.folder, reader.common, config)


def _look_at_weights(config: RunConfig, tokenizer: Tokenizer, origin: Origin) -> None:
    """What is said of a checkpoint of which a run takes the weights alone.

    Raises:
        UserError: they are of another model, or cannot become this one.
    """
    folder = origin.folder
    assert folder is not None
    if origin.upcycle:
        _look_into(config, origin)
    elif (saved := saved_config(folder)) is not None:
        refuse_other_model(folder, config.model, saved.model)
    if holds_tokenizer(folder):
        its = load_tokenizer(folder)
        if (its.fingerprint, its.eod) != (tokenizer.fingerprint, tokenizer.eod):
            logger.warning(
                "note: data.tokenizer_model=%s is not the tokenizer of %s, with whose ids its "
                "weights were trained", config.data.tokenizer_model, folder,
            )  # fmt: skip


def _refuse_other_arguments(config: RunConfig, folder: Path) -> None:
    """Of Megatron-LM's own checkpoints, its arguments alone say which model they hold."""
    if (folder / CONFIG_FILE).exists():
        return
    from megatron_hybrid.checkpoint.inert_pickle import Opaque
    from megatron_hybrid.checkpoint.megatron_arguments import function_values
    from megatron_hybrid.checkpoint.reader import CheckpointReader  # and torch
    from megatron_hybrid.checkpoint.source_model import refuse_other_arguments

    with CheckpointReader(folder) as reader:
        arguments = reader.common.get("args")
    refuse_other_arguments(folder, arguments, config.model)
    if isinstance(arguments, Opaque):
        _note(config, folder, function_values(vars(arguments), config.model.hybrid_layer_pattern))


def _note_other_functions(config: RunConfig, folder: Path) -> None:
    """Say what is computed otherwise with the weights of a checkpoint than when it was trained."""
    saved = saved_config(folder)
    if saved is None:
        return
    _note(config, folder, said_of_functions(saved.model))
    was, now = saved.training.objective, config.training.objective
    if was != now:
        logger.warning("note: %s minimised %s; training.objective=%s", folder, was, now)
        return
    had, has = saved.training.objective_options, config.training.objective_options
    if had != has:
        logger.warning(
            "note: %s minimised %s with training.objective_options=%s; now %s",
            folder, now, shown(dict(had)), shown(dict(has)),
        )  # fmt: skip


def _note_other_beginning(config: RunConfig, folder: Path) -> None:
    """Say where a run goes on that was asked to begin otherwise than it once did."""
    saved = saved_config(folder)
    if saved is None:
        return
    asked, did = (
        {
            "checkpoint.load": each.checkpoint.load and str(each.checkpoint.load.resolve()),
            "checkpoint.finetune": each.checkpoint.finetune,
            "upcycling.from": each.upcycling.source and str(each.upcycling.source.resolve()),
        }
        for each in (config, saved)
    )
    if other := [f"{name}={shown(v)}" for name, v in asked.items() if v and v != did[name]]:
        logger.warning(
            "note: this run goes on from its own %s; %s is for how a run begins, and is not read: "
            "give another beginning a run_dir of its own", folder, ", ".join(other),
        )  # fmt: skip


def _note_other_training(config: RunConfig, folder: Path) -> None:
    """Say what a run that goes on does otherwise than the one that saved its checkpoint."""
    saved = saved_config(folder)
    if saved is not None and (found := other_training(config, saved)):
        logger.warning("note: %s was trained with other settings: %s", folder, ", ".join(found))


def _note_other_evaluations(
    config: RunConfig, folder: Path, data: RunData, saved_plan: SavedPlan | None
) -> None:
    """Say where evaluations are of other samples than those of the run so far."""
    saved = saved_config(folder)
    if saved is None or data.valid_steps is None or saved.training.eval_interval is None:
        return
    if data.plan is None:
        now, then = (
            [f"{c.training.eval_iters * c.training.global_batch_size} samples of "
             f"{c.data.seq_length} tokens"] for c in (config, saved)
        )  # fmt: skip
    elif saved_plan is not None:
        now = evaluated(config, data.sources, data.plan)
        then = evaluated(saved, data.sources, saved_plan.plan)
    else:
        return
    if now != then:
        logger.warning(
            "note: evaluations are of %s; those of %s were of %s", ", ".join(now), folder,
            ", ".join(then),
        )  # fmt: skip


def _note_left_out(config: RunConfig, folder: Path) -> None:
    """Say what a run does not take up of its own checkpoint, as every start of it would not."""
    for name in ("load_optim", "load_rng"):
        if not getattr(config.checkpoint, name):
            logger.warning(
                "note: checkpoint.%s=false is of every start of this run, as after a requeue, also "
                "where it goes on from its own %s", name, folder,
            )  # fmt: skip


def _note(config: RunConfig, folder: Path, said: Mapping[str, Any]) -> None:
    if found := other_functions(config.model, said):
        logger.warning(
            "note: %s was trained as another function of the same weights: %s",
            folder, ", ".join(found),
        )  # fmt: skip


def _refuse_nothing_left(config: RunConfig, origin: Origin, steps: Steps, consumed: int) -> None:
    """A run of another's checkpoint that would train nothing is not what anyone asks for."""
    if consumed < steps.samples:
        return
    lengths = (f"{name}={value}" for name, value in values(config, LENGTHS).items() if value)
    raise UserError(
        f"nothing is left to train: {origin.folder} has read {consumed} samples, and "
        f"{', '.join(lengths)} ends at {steps.samples}; allowed: a longer run, or "
        "checkpoint.finetune=true, which counts anew"
    )


def _resumed_plan(
    config: RunConfig, tokenizer: Tokenizer, folder: Path, *, upcycle: bool
) -> SavedPlan | None:
    """The plan in a checkpoint that this run goes on from, whose samples must be this run's."""
    saved_plan, saved = read_saved_plan(folder), saved_config(folder)
    if saved is not None:
        if not upcycle:
            refuse_other_model(folder, config.model, saved.model)
        refuse_other_samples(folder, config, saved, has_plan=saved_plan is not None)
        its = load_tokenizer(folder)
        # A fingerprint is of the file with the vocabulary, which need not name the end token.
        if (its.fingerprint, its.eod) != (tokenizer.fingerprint, tokenizer.eod):
            raise UserError(
                f"data.tokenizer_model={config.data.tokenizer_model} is not the tokenizer of "
                f"{folder}, which is there as a copy; checkpoint.finetune=true may change it"
            )
    return saved_plan
