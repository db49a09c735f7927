"""What an objective is. The loop, schedules, evaluation, rerun and metrics know only this.

Legend: b samples of the micro batch (with packed documents: one row), s tokens of this context
parallel rank, h hidden size, v vocabulary of this tensor parallel rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_hybrid.config.base import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.data.datasets import RunData


@dataclass(frozen=True)
class Losses:
    """A micro batch's part of what a step minimises.

    A step minimises sum(values * weights) / sum(count), both sums over the whole global batch, all
    micro batches and ranks: however samples fall on them, it is the same function.

    Attributes:
        values: `[b, s]`, a loss a token; or `[b]`, one a sequence. Of any shape.
        weights: of that very shape; no gradient goes through them.
        count: `[]`, what the sum is divided by: a whole number. None: the sum of the weights,
            which must then be whole (as a mask's is).
        sums: `[]` each, further sums for the report, by the names in `Objective.reports`.
    """

    values: "Tensor"
    weights: "Tensor"
    count: "Tensor | None" = None
    sums: Mapping[str, "Tensor"] = field(default_factory=dict)


class Objective:
    """What a step minimises. A subclass is one file, and has `losses` and what else it needs.

    Every rank makes one, within the process groups and before its first step, and calls `open`.
    What it computes of a sample is a function of the sample, of its `parameters` and of its
    `state`, which changes between steps alone: so resumed runs, steps that are run again and all
    layouts agree.

    What happens with a micro batch, in this order:

    1. `prepare`, on the CPU, sees the whole of it, on every rank alike; and `look_ahead`, where the
       objective `looks_ahead`, all of a global batch that are of this replica, prepared.
    2. Its tensors `[b, s]` go to the device, cut to what this context parallel rank has.
    3. The model runs on `tokens` and `position_ids`, stage by stage, within `watching`.
    4. `losses` turns its output into losses: on the last pipeline stage only, on each of its
       context and tensor parallel ranks. Stages before it need nothing of an objective.
    5. Sums, and those that `beside` has, are reduced over all ranks, and `report` says what else
       the step found; `after_step` is told.

    An evaluation does the same without gradients, on the held-out samples.

    Attributes:
        output: what `losses` gets of the model.
            "losses": cross-entropy in nats of each of `batch.labels`, `[b, s]` fp32. The cheapest:
            logits are not kept.
            "logits": `[b, s, v]`, of this tensor parallel rank's part of the vocabulary.
            "hidden": hidden states after the last norm, `[s, b, h]`, or `[s / TP, b, h]` with
            sequence parallelism. The model's output layer (`model.output_layer`) does not run.
        reports: names of what `Losses.sums` holds; settled by `open` at the latest.
        next_tokens: whether `losses` weighs the cross-entropies of next tokens, to which those of
            the tokens after them may be added (`model.mtp_num_layers`).
        is_cross_entropy: whether the loss is the mean cross-entropy of tokens, in nats, so that its
            exponential is a perplexity.
        by_source: whether `Batch.sources`, `offsets` and `phases` are to say what samples are of.
        looks_ahead: whether it is told all micro batches of a step before the first one.
        conversations: what a sample is. False: a window of text. True: a row of whole
            conversations, of `data tokenize --chat`, with a `loss_mask` of 1 where the label is to
            be learnt.
        state: numbers by name, the same on every rank, which checkpoints hold.
        Options: the fields of `training.objective_options`, as a section of a config, with defaults
            and descriptions; None: it has none.
    """

    output: ClassVar[Literal["losses", "logits", "hidden"]] = "losses"
    reports: tuple[str, ...] = ()
    next_tokens: ClassVar[bool] = False
    is_cross_entropy: ClassVar[bool] = False
    by_source: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    conversations: ClassVar[bool] = False
    Options: ClassVar[type[Section] | None] = None

    def __init__(self, config: "RunConfig", options: Any) -> None:
        """Args: `options`, an `Options`, valid; None where the objective has none."""
        self.config = config
        self.options = options
        self.state: dict[str, float] = {}

    @classmethod
    def problems(cls, config: "RunConfig", options: Any) -> Iterator[str]:
        """What a config asks for that this cannot do: a sentence each, with field, value, rule and
        what is allowed. Called before any rank starts; should load no torch."""
        yield from ()

    @classmethod
    def data_problems(
        cls, config: "RunConfig", options: Any, data: "RunData", consumed_samples: int
    ) -> Iterator[str]:
        """As `problems`, of the samples that a run will read: of what it needs of them and has not.
        Called before any rank starts; should load no torch.

        Args:
            data: the run's, with its plan.
            consumed_samples: from which it goes on.
        """
        yield from ()

    @classmethod
    def frozen(cls, config: "RunConfig", options: Any) -> Sequence["RunConfig"]:
        """The models that run forward, once a token, beside the one that is trained: for counts of
        FLOPs and plans of memory and time. Each is the run with that model, in its own layout.
        Called before any rank starts; loads no torch.

        Raises:
            UserError: one is not there; as `problems` says.
        """
        return ()

    def open(self, backend: str, device: "torch.device", sources: Sequence[str]) -> None:
        """Make what it needs beside the model, such as frozen models, on all ranks together.

        The run's random numbers must be left as they were.

        Args:
            backend: "torch" or "transformer_engine".
            device: of this rank.
            sources: names of the sources of the data, in the order of `Batch.sources`' numbers.
        """

    def parameters(self, model: "nn.Module") -> "nn.Module | None":
        """What is trained beside the weights of a chunk, such as a projection; None: nothing.

        The chunk has it as its child `objective`, whose parameters the run's optimizer updates and
        its checkpoints hold; exports, evaluations and generation have nothing of it. Called before
        `open`, on the CPU or the device. Every tensor and data parallel rank must make the same,
        with names that are one chunk's alone, and leave the run's random numbers as they were. A
        parameter whose gradient is, with sequence parallelism, of a tensor parallel rank's tokens
        needs the attribute `sequence_parallel`, set to True.

        Args:
            model: megatron-core's HybridModel.
        """
        return None

    def look_ahead(self, micro_batches: Sequence["Batch"], *, held_out: bool) -> None:
        """What comes next: the micro batches of this replica in a global batch, on the CPU.

        All ranks call it together, before the pipeline starts: here, and not in `losses`, an
        objective may run what needs other stages or replicas. A step that is run again comes here
        again.

        Args:
            held_out: they are of an evaluation: `Batch.samples` are numbers in that split.
        """

    def prepare(self, batch: "Batch") -> "Batch":
        """The micro batch as this objective needs it, the whole row, on the CPU.

        `batch.samples` are the numbers of its samples in the run (in an evaluation: in the held-out
        split): what is drawn at random must be drawn from them and `training.seed`. Tensors of its
        own, `[b, s]`, go into `batch.extra`, and are moved and cut like the others.
        """
        return batch

    def inputs(self, batch: "Batch") -> Mapping[str, Any]:
        """What the model's forward gets beside tokens, positions, labels and documents, by name.

        Args:
            batch: as for `losses`.
        """
        return {}

    def watching(self, batch: "Batch", model: "nn.Module") -> AbstractContextManager[None]:
        """Within it the model's forward runs, on every stage.

        Here layers' outputs may be seen. What is added to the loss there, as
        `hidden_states.AddedLoss` does, is a part of the sum that `Losses` has, and told by
        `beside`.

        Args:
            batch: as for `losses`.
            model: the chunk.
        """
        return nullcontext()

    def beside(self) -> Mapping[str, "Tensor"]:
        """Sums that this rank has found within `watching` since it was last asked: `[]` each, by
        names in `reports`, and "loss", of what was added to the loss. Asked once a global batch, on
        all ranks; must be the same on tensor parallel ranks."""
        return {}

    def losses(self, output: "Tensor", batch: "Batch", model: "nn.Module") -> Losses:
        """The losses of a micro batch, on the last pipeline stage.

        Where a loss is of a whole sequence, which context parallel ranks hold in parts, its sum
        over tokens must be reduced over the context parallel group here, and `count` be given on
        one of these ranks alone, or a part of it on each.

        Args:
            output: as `Objective.output` says.
            batch: as `prepare` left it, tensors `[b, s]` on the device and of this rank.
            model: the last chunk, megatron-core's HybridModel.
        """
        raise NotImplementedError

    def report(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """What else a step found, for `extra` of its record, by name; the same on every rank.

        Args:
            sums: over the global batch, in the order of `reports`.
            count: what the loss was divided by.
        """
        return {
            name: total / max(count, 1.0) for name, total in zip(self.reports, sums, strict=True)
        }

    def after_step(self, reports: Mapping[str, float]) -> None:
        """A step was applied: `state` may change, from what is the same on every rank.

        Args:
            reports: as `report` gave them.
        """
