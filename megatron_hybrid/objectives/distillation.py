"""Distillation: a student's distribution of the next token is brought to a teacher's.

Legend: b samples of the micro batch (with packed documents: one row), s tokens of this context
parallel rank, v vocabulary of this tensor parallel rank, h hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from megatron_hybrid.objectives.base import Losses, Objective
from megatron_hybrid.objectives.distillation_options import Options
from megatron_hybrid.objectives.layer_pairs import pair_problems
from megatron_hybrid.objectives.sft import SupervisedFineTuning

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.data.datasets import RunData
    from megatron_hybrid.layers.kl_divergence import Divergence


class Answer(Protocol):
    """What a teacher says of the tokens of a micro batch, as far as this rank has them."""

    def divergence(
        self, logits: "Tensor", labels: "Tensor", tp_group: "ProcessGroup", options: Options
    ) -> "Divergence":
        """How far the student is from it.

        Args:
            logits: the student's, `[s, b, v]`; their memory is used for the gradient.
            labels: `[s, b]` int64.
        """
        ...


class TeacherSource(Protocol):
    """Where a teacher's answers come from."""

    def look_ahead(self, micro_batches: Sequence["Batch"], *, held_out: bool) -> None:
        """Told the micro batches of a global batch of which answers will be asked. All ranks call
        it together, each with those of its replica.

        Args:
            held_out: they are of an evaluation, of whose split `Batch.samples` are numbers.
        """
        ...

    def answer(self, samples: tuple[int, ...]) -> Answer:
        """On ranks of the last pipeline stage: what it says of a micro batch of those samples."""
        ...


class LayerSource(TeacherSource, Protocol):
    """A teacher whose layers are there, too."""

    def state(self, samples: tuple[int, ...], layer: int) -> "Tensor":
        """On ranks of a layer's pipeline stage: what it leaves of those samples, as tokens of the
        student's layer are cut there. Asked before `answer`."""
        ...


# Of tokens, whose means are reported.
FIGURES = ("kl", "agreement", "lm_loss", "teacher_lm_loss")
BALANCED_STEPS = 100  # of the running means by which terms are balanced


class Distillation(Objective):
    """KL divergence from a teacher's next token, over the tokens that the loss mask keeps.

    Where the data have several sources, what is reported of all is also reported of each.
    """

    output = "hidden"
    reports: tuple[str, ...] = FIGURES
    looks_ahead = True
    by_source = True
    Options = Options

    def __init__(self, config: "RunConfig", options: Any) -> None:
        super().__init__(config, options)
        self.sources: list[TeacherSource] = []
        self._names: Sequence[str] = ()
        self._teachers = list(options.named.values())
        self._weights: list[list[float]] = []  # by teacher and source
        self._pairs = [pair.name for pair in options.hidden_states]
        self._layers: LayerSource | None = None

    @classmethod
    def problems(cls, config: "RunConfig", options: Any) -> Iterator[str]:
        """A model without a next token, and a teacher that is not there or cannot teach it."""
        from megatron_hybrid.teachers.config import teacher_problems

        name, mask = f"training.objective={config.training.objective}", config.model.attn_mask_type
        if mask != "causal":
            yield f"{name} needs model.attn_mask_type=causal; it is {mask}"
        yield from teacher_problems(config, options, conversations=cls.conversations)
        yield from pair_problems(config, options)

    @classmethod
    def data_problems(
        cls, config: "RunConfig", options: Any, data: "RunData", consumed_samples: int
    ) -> Iterator[str]:
        """Samples of which no answers were kept."""
        from megatron_hybrid.teachers.cache_config import lacking_answers

        yield from lacking_answers(options, data, consumed_samples)

    @classmethod
    def frozen(cls, config: "RunConfig", options: Any) -> Sequence["RunConfig"]:
        """The teachers."""
        from megatron_hybrid.teachers.config import teacher_config

        live = (each for each in options.named.values() if each.cache is None)
        return [teacher_config(config, teacher) for teacher in live]

    def open(self, backend: str, device: "torch.device", sources: Sequence[str]) -> None:
        """Build the teachers and load them."""
        from megatron_hybrid.teachers.cached import CachedTeacher
        from megatron_hybrid.teachers.live import LiveTeacher

        for teacher in self._teachers:
            offload = self.options.teacher_offload
            if teacher.cache is not None:
                self.sources.append(CachedTeacher(teacher.cache, device, sources))
            else:
                layers = [pair.teacher for pair in self.options.hidden_states]
                self._layers = LiveTeacher(
                    self.config, teacher, backend, device, offload=offload, layers=layers
                )
                self.sources.append(self._layers)
            self._weights.append(teacher.weights(sources or ("",)))
        self._names = sources if len(sources) > 1 else ()
        of_sources = (f"{figure}/{name}" for name in self._names for figure in ("tokens", *FIGURES))
        self.reports = (*FIGURES, *of_sources, *self._pairs)
        self._device = device
        if self._pairs:
            from megatron_hybrid.objectives.hidden_states import HiddenTerms

            split = self.config.parallel.sequence_parallel
            kind = self.options.hidden_states_loss
            self._terms = HiddenTerms(self.options.hidden_states, kind, split=split)

    def parameters(self, model: "nn.Module") -> "nn.Module | None":
        """Projections to the teacher's width, where it is another one."""
        if not self._pairs:
            return None
        from megatron_hybrid.objectives.hidden_states import projections

        [teacher] = self.frozen(self.config, self.options)
        return projections(self.config, teacher, self.options.hidden_states, model)

    def look_ahead(self, micro_batches: Sequence["Batch"], *, held_out: bool) -> None:
        for source in self.sources:
            source.look_ahead(micro_batches, held_out=held_out)

    def prepare(self, batch: "Batch") -> "Batch":
        """Each token gets the number of its source, which is cut as tokens are."""
        if not self._names or batch.sources is None:
            return batch
        import torch

        numbers = torch.tensor(batch.sources)
        each = batch.tokens.numel() // len(numbers)
        of_tokens = numbers.repeat_interleave(each).view(batch.tokens.shape)
        return replace(batch, extra={**batch.extra, "source": of_tokens})

    def watching(self, batch: "Batch", model: "nn.Module") -> AbstractContextManager[None]:
        """Terms of layers' hidden states are added where the layers are."""
        if not self._pairs:
            return nullcontext()
        assert batch.samples is not None and self._layers is not None
        factors = {name: self._factor(name) for name in self._pairs}
        states = partial(self._layers.state, batch.samples)
        return self._terms.compared(model, batch.loss_mask, states, factors)

    def beside(self) -> Mapping[str, "Tensor"]:
        return self._terms.sums(self._device) if self._pairs else {}

    def after_step(self, reports: Mapping[str, float]) -> None:
        """Running means of the terms, for what balances them."""
        if not self.options.balance_terms:
            return
        for name in ("kl", "lm_loss", *self._pairs):
            before = self.state.get(name, reports[name])
            self.state[name] = before + (reports[name] - before) / BALANCED_STEPS

    def _factor(self, term: str) -> float:
        """By which a term is balanced: 1 before the first step, of which nothing is known."""
        if not self.options.balance_terms:
            return 1.0
        mean = self.state.get(term, 0.0)
        return self.state["kl"] / mean if mean > 0.0 else 1.0

    def losses(self, output: "Tensor", batch: "Batch", model: Any) -> Losses:
        import torch

        assert batch.samples is not None
        logits, mask = logits_of(model, output), batch.loss_mask
        total, shares, *figures = (torch.zeros_like(mask) for _ in range(4))
        last = len(self.sources) - 1
        for number, source in enumerate(self.sources):
            answer, weight = source.answer(batch.samples), self._weight(number, batch)
            found = answer.divergence(
                # The gradient takes the place of what it is given.
                logits if number == last else logits.clone(),
                batch.labels.t(), model.pg_collection.tp, self.options,
            )  # fmt: skip
            total = total + weight * found.divergence.t()
            of_teacher = (found.agreement.t(), found.teacher_loss.t())
            figures = [a + weight * b for a, b in zip(figures, of_teacher, strict=True)]
            shares = shares + weight
        lm_loss = found.student_loss.t()
        values = total * self.options.kl_weight
        if self.options.lm_loss_weight:
            values = values + self.options.lm_loss_weight * self._factor("lm_loss") * lm_loss
        agreement, teacher_lm_loss = (each / (shares + (shares == 0.0)) for each in figures)
        seen = torch.stack([total, agreement, lm_loss, teacher_lm_loss]).detach()
        # Those of layers are told `beside`.
        of_pairs = dict.fromkeys(self._pairs, total.new_zeros(()))
        return Losses(values, mask, sums=of_pairs | self._sums(seen * mask, batch))

    def _weight(self, number: int, batch: "Batch") -> "Tensor":
        """Of a teacher, for each token: `[b, s]`."""
        teacher = self._teachers[number]
        phase = batch.phases[0] if batch.phases else None  # a global batch is of one
        weights = batch.loss_mask.new_tensor(self._weights[number]) * teacher.phase_weight(phase)
        if "source" not in batch.extra:
            return weights[0].expand(batch.loss_mask.shape)
        return weights[batch.extra["source"]]

    def _sums(self, figures: "Tensor", batch: "Batch") -> dict[str, "Tensor"]:
        """Over all tokens and over those of each source.

        Args:
            figures: `[n, b, s]`, in the order of `FIGURES`, 0 where the mask is.
        """
        sums = dict(zip(FIGURES, figures.flatten(1).sum(1), strict=True))
        for number, name in enumerate(self._names):
            here = batch.extra["source"] == number
            found = [(batch.loss_mask * here).sum(), *(figures * here).flatten(1).sum(1)]
            for figure, total in zip(("tokens", *FIGURES), found, strict=True):
                sums[f"{figure}/{name}"] = total
        return sums

    def report(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """Means over the tokens that were learnt: of all, and of each source that had any."""
        totals = dict(zip(self.reports, sums, strict=True))
        of_all = (*FIGURES, *self._pairs)
        found = {figure: totals[figure] / max(count, 1.0) for figure in of_all}
        for name in self._names:
            if tokens := totals[f"tokens/{name}"]:
                found |= {f"{each}/{name}": totals[f"{each}/{name}"] / tokens for each in FIGURES}
        return found


class SftDistillation(Distillation):
    """The same over the tokens that the masks of conversations name; samples are those of `sft`."""

    conversations = True

    @classmethod
    def problems(cls, config: "RunConfig", options: Any) -> Iterator[str]:
        """Those of `sft` and of `distillation`."""
        of_samples = list(SupervisedFineTuning.problems(config, None))
        yield from of_samples
        yield from (each for each in super().problems(config, options) if each not in of_samples)


def logits_of(model: Any, hidden: "Tensor") -> "Tensor":
    """A model's logits `[s, b, v]` of its last hidden states, `[s, b, h]` or `[s / TP, b, h]`."""
    weight = None
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    # The engine makes what leaves a model fp32; it was of the model's own format.
    hidden = hidden.to(model.config.params_dtype)
    logits: Tensor = model.output_layer(hidden, weight=weight)[0]
    return logits
