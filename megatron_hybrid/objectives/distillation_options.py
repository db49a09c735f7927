"""What `training.objective_options` of distillation may hold. Loads no torch."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_hybrid.config.base import (
    FilePath,
    FrozenDict,
    Positive,
    PositiveReal,
    Real,
    Section,
    Words,
)
from megatron_hybrid.config.data import Name, Weights
from megatron_hybrid.objectives.layer_pairs import LayerPairs


class TeacherParallel(Section):
    """A layout of the teacher's own, over the ranks of the run; null: the student's."""

    tensor_model_parallel_size: Positive | None = Field(default=None, description="TP")
    pipeline_model_parallel_size: Positive | None = Field(default=None, description="PP")
    context_parallel_size: Positive | None = Field(default=None, description="CP")
    expert_model_parallel_size: Positive | None = Field(default=None, description="EP")


PhaseWeights = Annotated[
    dict[str, Annotated[float, Field(ge=0)]],
    Field(min_length=1),
    AfterValidator(FrozenDict),
    Words("weights by phase such as {main: 1, anneal: 0.2}"),
]


class Teacher(Section):
    """One of several teachers.

    Attributes:
        checkpoint, cache: as `Options.teacher` and `Options.cache`; one of them at least.
        parallel: as `Options.teacher_parallel`.
        weight: of its divergence.
        sources: weights by source of the data, 0 of those that are not named; None: `weight`.
        phases: factors of them by phase of the data, 0 in those that are not named; None: 1. Of
            held-out samples, which are of no phase, 1.
    """

    checkpoint: FilePath | None = None
    cache: FilePath | None = None
    parallel: TeacherParallel | None = None
    weight: Real = 1.0
    sources: Weights | None = None
    phases: PhaseWeights | None = None

    def weights(self, names: Sequence[str]) -> list[float]:
        """By source of the data."""
        if self.sources is None:
            return [self.weight] * len(names)
        return [self.weight * self.sources.get(name, 0.0) for name in names]

    def phase_weight(self, phase: str | None) -> float:
        """The factor in a phase; None: of held-out samples."""
        if self.phases is None or phase is None:
            return 1.0
        return self.phases.get(phase, 0.0)


Teachers = Annotated[
    dict[Name, Teacher],
    AfterValidator(FrozenDict),
    Words(
        "teachers by name, each of a checkpoint or a cache and, where wanted, weight, sources, "
        "phases and parallel, such as {math: {checkpoint: runs/math, sources: {math: 1}}}"
    ),
]


class Options(Section):
    """The options of the objective."""

    teacher: FilePath | None = Field(
        default=None,
        description="a checkpoint of any model with the same tokenizer, of any layout: a folder of "
        "checkpoints or one of them",
    )
    cache: FilePath | None = Field(
        default=None,
        description="a folder of `distill cache`: the teacher's answers are read there, and it "
        "does not run; where the teacher is named too, it must be the one that gave them",
    )
    teachers: Teachers = Field(
        default=FrozenDict(),
        description="several, in place of one: the loss has the sum of their divergences, each "
        "times its weight, which may depend on the source and the phase of the sample",
    )
    teacher_parallel: TeacherParallel | None = Field(
        default=None,
        description="the teacher's layout over the same ranks, as far as it is not the student's",
    )
    teacher_offload: bool = Field(
        default=False,
        description="GPU: keep the teacher in the host's memory but for its forward passes",
    )
    kl_type: Literal["forward", "reverse", "mixed"] = Field(
        default="forward",
        description="forward: KL(teacher, student); reverse: KL(student, teacher); mixed: both",
    )
    mixed_kl_weight: float = Field(
        default=0.5, ge=0, le=1, description="mixed: the share of the forward divergence"
    )
    temperature: float = Field(
        default=1.0, ge=0.01, le=100.0, description="both models' logits are divided by it"
    )
    kl_weight: PositiveReal = Field(default=1.0, description="weight of the divergence")
    lm_loss_weight: Real = Field(
        default=0.0, description="weight of the student's own cross-entropy of the labels"
    )

    hidden_states: LayerPairs = Field(
        default=(),
        description="layers of the student whose hidden states are brought to those of layers of "
        "the teacher, counted from 1, through a projection that is learnt where widths differ",
    )
    hidden_states_loss: Literal["cosine", "mse"] = Field(
        default="cosine",
        description="of hidden states: cosine: 1 - cos of their angle; mse: the mean square of "
        "their difference",
    )
    balance_terms: bool = Field(
        default=False,
        description="scale every other term to the divergence's size, by running means of both, "
        "before its weight",
    )

    @property
    def named(self) -> dict[str, Teacher]:
        """All teachers by the option that each is of."""
        found = {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}
        if self.teacher is not None or self.cache is not None:
            found["teacher"] = Teacher(
                checkpoint=self.teacher, cache=self.cache, parallel=self.teacher_parallel
            )
        return found

    @property
    def forward_share(self) -> float:
        """Of KL(teacher, student) in the divergence; the rest is KL(student, teacher)."""
        return {"forward": 1.0, "reverse": 0.0, "mixed": self.mixed_kl_weight}[self.kl_type]
