"""What a run evaluates itself on, by source: the same samples as at its validation interval."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.batches import Span, Steps
from megatron_hybrid.data.datasets import RunData, open_windows, plan_data
from megatron_hybrid.data.loader import Replica, build_iterator
from megatron_hybrid.data.saved_plan import read_saved_plan
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.windows import Windows
from megatron_hybrid.errors import UserError
from megatron_hybrid.evaluation.windows import NOWHERE, counted_into

_CONVERSATIONS = "sft"
_OURS = ("pretraining", _CONVERSATIONS)


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
        cls, config: RunConfig, folder: Path, tokenizer: Tokenizer, *, changed: bool
    ) -> "OwnData":
        """Plan them, from files alone.

        Args:
            folder: the checkpoint itself.
            changed: the data are not those of the run.

        Raises:
            UserError: there are none, or their files cannot be used.
        """
        if config.training.objective not in _OURS:
            raise UserError(
                f"{folder} was trained with training.objective={config.training.objective}, whose "
                f"own loss is not that of the next token; give --input or --prefix; allowed "
                f"without: {', '.join(_OURS)}"
            )
        config = _evaluated(config)
        saved = None if changed else read_saved_plan(folder)
        conversations = config.training.objective == _CONVERSATIONS
        data = plan_data(config, tokenizer, saved, conversations=conversations)
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


def _evaluated(config: RunConfig) -> RunConfig:
    """A config with evaluations, which the run may not have had."""
    training = config.training.model_copy(
        update={"eval_interval": config.training.eval_interval or 1}
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
