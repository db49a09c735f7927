"""Which layers of a student are brought to which of its teacher's: options, and what cannot be."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, Strict

from megatron_hybrid.config.base import Positive, PositiveReal, Section, Words
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.errors import UserError

if TYPE_CHECKING:
    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.objectives.distillation_options import Options

NAME = "training.objective_options.hidden_states"


class LayerPair(Section):
    """A layer of the student, the teacher's that it is compared with, and the term's weight.

    Layers are counted from 1, as symbols of `model.hybrid_layer_pattern` without `|`. Compared is
    what they leave: the sum that goes on to the next layer.
    """

    student: Positive
    teacher: Positive
    weight: PositiveReal = 1.0

    @property
    def name(self) -> str:
        """Of its figure."""
        return f"hidden_{self.student}"


LayerPairs = Annotated[
    tuple[LayerPair, ...],
    Strict(False),
    Field(),
    Words(
        "a list of pairs of layers, with a weight above 0 where wanted, such as "
        "[{student: 2, teacher: 4, weight: 0.5}]"
    ),
]


def pair_problems(config: "RunConfig", options: "Options") -> Iterator[str]:
    """Why layers cannot be compared; nothing where they can."""
    from megatron_hybrid.teachers.config import shares_groups, teacher_config

    pairs = options.hidden_states
    if not pairs:
        return
    if options.teachers:
        yield f"{NAME} is of one teacher, {NAME.rpartition('.')[0]}.teacher; of several it is not"
    for whose in ("student", "teacher"):
        numbers = [getattr(pair, whose) for pair in pairs]
        if twice := sorted({n for n in numbers if numbers.count(n) > 1}):
            yield (
                f"{NAME}: layer {twice[0]} of the {whose} is in {numbers.count(twice[0])} pairs; "
                "allowed: each layer in one"
            )
    training = config.training
    if training.recompute_granularity == "full":
        yield (
            f"{NAME} with training.recompute_granularity=full is not supported: what layers leave "
            "is not kept; allowed: null, selective"
        )
    if config.gpu.cuda_graph_impl != "none":
        yield (
            f"{NAME} with gpu.cuda_graph_impl={config.gpu.cuda_graph_impl} is not supported; "
            "allowed: none"
        )
    if options.cache is not None:
        yield f"{NAME} needs a teacher that runs; of a cache ({options.cache}) no layers are kept"
    if options.teacher is None or options.cache is not None:
        return
    try:
        teacher = teacher_config(config, options.named["teacher"])
    except UserError:
        return  # which is told of by itself
    if not shares_groups(config, teacher):
        yield (
            f"{NAME} with a layout of the teacher's own, {NAME.rpartition('.')[0]}.teacher_parallel"
            ", is not supported; allowed: the student's"
        )
        return
    yield from _places(config, teacher, pairs)


def _places(config: "RunConfig", teacher: "RunConfig", pairs: Sequence[LayerPair]) -> Iterator[str]:
    """Layers that are not there, and such as no pipeline stage has both of."""
    for pair in pairs:
        stages = []
        for whose, of in (("student", config), ("teacher", teacher)):
            number, stage = getattr(pair, whose), _stages(of)
            if number > len(stage):
                yield (
                    f"{NAME}: layer {number} of the {whose} is not there; allowed: 1 to "
                    f"{len(stage)}"
                )
            else:
                stages.append(stage[number - 1])
        if len(set(stages)) > 1:
            near = [n for n, stage in enumerate(_stages(teacher), 1) if stage == stages[0]]
            yield (
                f"{NAME}: layer {pair.student} of the student is on pipeline stage {stages[0]}, "
                f"layer {pair.teacher} of the teacher on stage {stages[1]}; allowed: the teacher's "
                f"{near[0]} to {near[-1]}, or another cut of model.hybrid_layer_pattern"
            )


def _stages(config: "RunConfig") -> list[int]:
    """The pipeline stage of each layer."""
    size = config.parallel.pipeline_model_parallel_size
    chunks = parse_pattern(config.model.hybrid_layer_pattern).chunks(size)
    return [index % size for index, chunk in enumerate(chunks) for _ in chunk]
