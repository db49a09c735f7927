"""The data of a run: what it will read, planned from files alone, and then the windows themselves.

Planning needs neither torch nor other ranks. Of the three kinds of data only megatron-core's order
lets ranks wait for each other, when its windows are opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from megatron_hybrid.config.phases import batch_sizes, run_tokens
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batches import Span, Steps, whole_batches
from megatron_hybrid.data.conversations import note_masks, note_templates
from megatron_hybrid.data.megatron_blend import MegatronBlend
from megatron_hybrid.data.mock import MockWindows
from megatron_hybrid.data.plan import Plan, SourceUse
from megatron_hybrid.data.planned_windows import PlannedWindows
from megatron_hybrid.data.run_plan import (
    check_epochs,
    open_run_sources,
    training_plan,
    validation_plan,
)
from megatron_hybrid.data.saved_files import file_digests
from megatron_hybrid.data.saved_plan import SavedPlan
from megatron_hybrid.data.source import Source
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.windows import Windows

if TYPE_CHECKING:
    from megatron_hybrid.data.batch import Batch


@dataclass(frozen=True)
class RunData:
    """What a run will read.

    Attributes:
        steps: the global batches of training.
        valid_steps: those of an evaluation; None: the run has none.
        plan: which window every sample is; None with made-up tokens and in megatron-core's order.
        valid_plan: of the samples of an evaluation.
        sources: of the plans, opened, by name.
        files: in megatron-core's order, digests of its files, as `file_digests` has them.
    """

    steps: Steps
    valid_steps: Steps | None
    plan: Plan | None = None
    valid_plan: Plan | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def phase(self, sample: int) -> str | None:
        """The name of the phase that a sample belongs to; None where there are not several."""
        if self.plan is None or len(self.plan.phases) == 1:
            return None
        return self.plan.phases_of(sample)[0]

    @property
    def source_names(self) -> tuple[str, ...]:
        """Of the plan's sources, in its order."""
        return () if self.plan is None else tuple(source.name for source in self.plan.sources)

    def located(self, plan: Plan, batch: "Batch") -> "Batch":
        """A micro batch of a plan with the sources of its samples, by their numbers in
        `source_names`, where they begin and, in training, of which phases they are."""
        names = [self.source_names.index(source.name) for source in plan.sources]
        found = plan.locate(batch.samples or ())
        sources = tuple(names[number] for number in found.sources.tolist())
        phases = plan.phases_of(batch.samples or ()) if plan is self.plan else None
        return replace(batch, sources=sources, offsets=tuple(found.offsets.tolist()), phases=phases)

    @property
    def plans(self) -> dict[Literal["train", "valid"], Plan]:
        """Those that there are: of training, and of evaluations."""
        both: dict[Literal["train", "valid"], Plan | None]
        both = {"train": self.plan, "valid": self.valid_plan}
        return {name: plan for name, plan in both.items() if plan is not None}

    def consumed(self, samples: int) -> tuple[SourceUse, ...]:
        """What each source has given when `samples` samples have been read."""
        return () if self.plan is None else self.plan.consumed(samples)


def plan_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    saved: SavedPlan | None,
    *,
    conversations: bool = False,
) -> RunData:
    """Settle which samples a run reads, and in which steps.

    Args:
        config: `data` and `training` of a valid config.
        tokenizer: the one the files were made with.
        saved: the plan of the checkpoint that the run goes on from; None: it starts anew.
        conversations: samples are rows of whole conversations, with masks of what is learnt.

    Raises:
        DataError: a file is missing or damaged, a source has too little text or too low a cap, or
            the config changes what was read before the checkpoint.
    """
    training, sizes = config.training, batch_sizes(config)
    if config.data.mock_data or config.data.sample_order == "megatron":
        data = _without_plan(config)
        if not config.data.data_path:
            return data
        # Its files are held against their facts, as those of a plan.
        sources = open_run_sources(config, tokenizer.fingerprint, tokenizer.eod)
        if config.data.mock_data:
            return data
        note_masks(sources, training.objective)
        shards = [shard for source in sources.values() for shard in source.shards]
        return replace(data, files=file_digests(shards))
    sources = open_run_sources(
        config, tokenizer.fingerprint, tokenizer.eod, conversations=conversations
    )
    if conversations:
        note_templates(sources, tokenizer)
    else:
        note_masks(sources, training.objective)
    if saved is None:
        plan = training_plan(config, sources)
    else:
        plan = training_plan(config, sources, saved.plan, saved.consumed_samples)
    check_epochs(config, plan)
    steps = Steps(plan.spans, sizes)
    if training.eval_interval is None:
        return RunData(steps, None, plan, None, sources)
    valid_plan = validation_plan(config, sources, plan)
    return RunData(steps, _evaluations(config, valid_plan.spans), plan, valid_plan, sources)


def _without_plan(config: RunConfig) -> RunData:
    """The steps of a run whose samples no plan of ours names."""
    training, seq_length, sizes = config.training, config.data.seq_length, batch_sizes(config)
    samples = whole_batches(sizes, 0, run_tokens(config), seq_length, reach=True)
    eval_samples = training.eval_iters * training.global_batch_size
    return RunData(
        Steps([Span(0, samples, seq_length)], sizes),
        _evaluations(config, (Span(0, eval_samples, seq_length),)),
    )


def other_passes(config: RunConfig, saved: RunConfig) -> list[str]:
    """Where megatron-core's order is another one for the length of a run alone.

    Args:
        config, saved: of one blend, seed and sequence length.

    Returns:
        A sentence for each source whose samples the engine shuffles otherwise.

    Raises:
        DataError: a file is missing or damaged.
    """
    now, then = (
        MegatronBlend.open(each, _sizes(_without_plan(each))).passes(each.data.seq_length)
        for each in (config, saved)
    )
    return [
        f"megatron-core's order shuffles {prefix} over {_passes(*ours)}, in the checkpoint over "
        f"{_passes(*theirs)}, by the number of samples that the run takes"
        for (_, prefix), ours, theirs in zip(config.data.data_path, now, then, strict=True)
        if ours != theirs
    ]


def _passes(count: int, apart: bool) -> str:
    shown = "1 pass" if count == 1 else f"{count} passes"
    return f"{shown}, the last one apart" if apart else shown


def _evaluations(config: RunConfig, spans: tuple[Span, ...]) -> Steps | None:
    """The batches of an evaluation, whose size does not follow the schedule of training."""
    if config.training.eval_interval is None:
        return None
    return Steps(spans, ((0, config.training.global_batch_size),))


def open_windows(
    config: RunConfig, tokenizer: Tokenizer, data: RunData
) -> tuple[Windows, Windows | None]:
    """The windows to train and to validate on, of what `plan_data` has settled.

    All ranks call it together.

    Raises:
        DataError: in megatron-core's order, as `plan_data`.
    """
    if data.plan is not None:
        train, valid = (
            PlannedWindows(plan, dict(data.sources), tokenizer) if plan is not None else None
            for plan in (data.plan, data.valid_plan)
        )
        assert train is not None
        return train, valid
    sizes = _sizes(data)
    if not config.data.mock_data:
        from megatron_hybrid.data.megatron_order import build_windows  # torch and the engine

        return build_windows(config, tokenizer, sizes)
    made_up = [_mock(config, tokenizer, number, size) for number, size in enumerate(sizes)]
    return made_up[0], made_up[1] if sizes[1] else None


def _sizes(data: RunData) -> tuple[int, int]:
    """Samples to train and to validate on."""
    return data.steps.samples, data.valid_steps.samples if data.valid_steps else 0


def _mock(config: RunConfig, tokenizer: Tokenizer, number: int, size: int) -> MockWindows:
    return MockWindows(
        size=size,
        seq_length=config.data.seq_length,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        seed=(config.training.seed, number),
    )
