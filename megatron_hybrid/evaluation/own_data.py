"""What a run evaluates itself on, by source: the same samples as at its validation interval."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.base import FrozenDict
from megatron_hybrid.config.notes import notes
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.batches import Span, Steps
from megatron_hybrid.data.datasets import RunData, open_windows, plan_data
from megatron_hybrid.data.loader import Replica, build_iterator
from megatron_hybrid.data.saved_files import read_saved_files
from megatron_hybrid.data.saved_plan import SavedPlan, read_saved_plan
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.windows import Windows
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.evaluation.windows import NOWHERE, counted_into
from megatron_hybrid.objectives.registry import objective_problems

logger = logging.getLogger(__name__)

_CONVERSATIONS = "sft"
# Whose samples have a next token, and the objective whose loss is its cross-entropy.
_OURS = {
    "pretraining": "pretraining", "distillation": "pretraining",
    _CONVERSATIONS: _CONVERSATIONS, "sft_distillation": _CONVERSATIONS,
}  # fmt: skip
# However often a run of these data would read them: nothing is trained on.
_NO_CAP = 1e30
_DIGESTS = ("digest", "older_digest")  # of a `Shard`, in plans


@dataclass(frozen=True)
class OwnData:
    """The held-out samples of a run.

    Attributes:
        names: of the sources.
    """

    tokenizer: Tokenizer
    data: RunData
    names: Sequence[str]

    @classmethod
    def find(
        cls, config: RunConfig, folder: Path, tokenizer: Tokenizer, *, said: Collection[str]
    ) -> "OwnData":
        """Plan them, from files alone.

        Args:
            folder: the checkpoint itself.
            said: fields that make the data others than the run's.

        Raises:
            UserError: there are none, or their files cannot be used, or are no longer those that
                the run has read.
        """
        if config.training.objective not in _OURS:
            raise UserError(
                f"{folder} was trained with training.objective={config.training.objective}, whose "
                f"own loss is not that of the next token; give --input or --prefix; allowed "
                f"without: {', '.join(_OURS)}"
            )
        config = _evaluated(config)
        if problems := objective_problems(config):
            raise ConfigError(problems)
        for note in notes(config):
            if note.startswith(tuple(f"{name}{end}" for name in said for end in "=. ")):
                logger.warning("note: %s", note)
        saved = read_saved_plan(folder)
        conversations = config.training.objective == _CONVERSATIONS
        data = plan_data(
            _uncapped(config), tokenizer, None if said else saved, conversations=conversations
        )
        if not any(name in ("data.data_path", "data.sources") or ".path" in name for name in said):
            _refuse_other_files(folder, config, data, saved)
        if data.valid_plan is not None:
            uses = data.valid_plan.consumed(data.valid_plan.samples)
            return cls(tokenizer, data, [use.name for use in uses])
        return cls(
            tokenizer, data, ["made-up tokens" if config.data.mock_data else "data.data_path"]
        )

    @property
    def tokens(self) -> int:
        """Of all samples together."""
        steps = self.data.valid_steps
        return 0 if steps is None else steps.samples * steps.seq_length(0)

    def calls(
        self, config: RunConfig, batch_size: int, told: Callable[[int], None]
    ) -> Iterator[list[Batch]]:
        """Micro batches of this rank, for `TokenLosses.sums_of_batches`.

        All ranks call it together.
        """
        from megatron.core import parallel_state

        size = parallel_state.get_data_parallel_world_size()
        replica = Replica(parallel_state.get_data_parallel_rank(), size)
        _, valid = open_windows(_evaluated(config), self.tokenizer, self.data)
        steps = self.data.valid_steps
        assert valid is not None and steps is not None
        samples, seq_length = steps.samples, steps.seq_length(0)
        rows = min(batch_size, -(-samples // size))
        # Of as many as all ranks take at once; what is beyond the last sample is not counted.
        whole = -(-samples // (rows * size)) * rows * size
        training = config.training.model_copy(update={"micro_batch_size": rows})
        sized = config.model_copy(update={"training": training})
        filled = Steps([Span(0, whole, seq_length)], [(0, rows * size)])
        batches = build_iterator(
            _FilledUp(valid, samples), filled, sized, consumed_samples=0, replica=replica
        )
        owners = self._owners(samples)
        for batch in batches:
            assert batch.samples is not None
            sums = [owners[each] if each < samples else NOWHERE for each in batch.samples]
            told(rows * size * seq_length)
            yield [counted_into(batch, sums)]

    def _owners(self, samples: int) -> list[int]:
        """The number of each sample's source."""
        plan = self.data.valid_plan
        if plan is None:
            return [0] * samples
        found: list[int] = plan.locate(np.arange(samples)).sources.tolist()
        return found


def _refuse_other_files(
    folder: Path, config: RunConfig, data: RunData, saved: SavedPlan | None
) -> None:
    """Refuse files that were made anew under the paths of those that the run has read.

    Raises:
        UserError: naming each.
    """
    known = read_saved_files(folder)
    others = [name for name, digest in data.files.items() if known.get(name, digest) != digest]
    for source in () if saved is None else saved.plan.sources:
        shards = data.sources[source.name].shards if source.name in data.sources else ()
        digests = [tuple(getattr(each, name) for each in shards) for name in _DIGESTS]
        if shards and source.shards not in digests:
            others.append(source.name)
    if others:
        field = "data.data_path" if config.data.data_path else "data.sources"
        lines = "".join(f"\n  - {field}: {name} holds other tokens than then" for name in others)
        raise UserError(
            f"what {folder} evaluated itself on is no longer there; allowed: {field}=..., or "
            f"--prefix, to name what is meant:{lines}"
        )


def _uncapped(config: RunConfig) -> RunConfig:
    """A config whose sources may be read any number of times."""
    cap = {"max_epochs": _NO_CAP}
    sources = FrozenDict({n: s.model_copy(update=cap) for n, s in config.data.sources.items()})
    data = config.data.model_copy(update={**cap, "sources": sources})
    return config.model_copy(update={"data": data})


def _evaluated(config: RunConfig) -> RunConfig:
    """A config with evaluations, which the run may not have had, of the next token's
    cross-entropy: without a teacher, which need not be there."""
    training = config.training.model_copy(
        update={
            "eval_interval": config.training.eval_interval or 1,
            "objective": _OURS[config.training.objective],
            "objective_options": FrozenDict(),
        }
    )
    return config.model_copy(update={"training": training})


class _FilledUp:
    """Windows with the last one again and again after it."""

    def __init__(self, windows: Windows, size: int) -> None:
        self._windows, self._last = windows, size - 1
        self.eod, self.vocab_size = windows.eod, windows.vocab_size
        self.conversations = windows.conversations

    def __len__(self) -> int:
        return len(self._windows)

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return self._windows.__getitems__(self._known(indices))

    def document_ends(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        return self._windows.document_ends(self._known(indices))

    def learnt(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        return self._windows.learnt(self._known(indices))

    def describe(self, index: int, token: int) -> str:
        return self._windows.describe(min(index, self._last), token)

    def _known(self, indices: Sequence[int]) -> list[int]:
        return [min(index, self._last) for index in indices]
