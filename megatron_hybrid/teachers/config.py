"""What a teacher is: its checkpoint's model within the run that it teaches. From files alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.saved_config import read_config
from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.pattern import cut_evenly
from megatron_hybrid.config.rules.parallel import packed_context_parallel, sequence_length
from megatron_hybrid.config.sections import GpuConfig, ParallelConfig
from megatron_hybrid.data.tokenizer import load_tokenizer
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.teachers.cache_config import cache_problems, tokenizer_of

if TYPE_CHECKING:
    from megatron_hybrid.objectives.distillation_options import Options, Teacher

NAME = "training.objective_options"
# Of a layout that runs a model forward over the samples of a run.
_RULES = (*rules.EVALUATION, sequence_length, packed_context_parallel)


def teacher_problems(
    config: RunConfig, options: "Options", *, conversations: bool
) -> Iterator[str]:
    """Why a run's teachers cannot teach its model; nothing where they can.

    Args:
        conversations: whether samples are rows of conversations.
    """
    one = options.teacher or options.cache
    if (one is None) == (not options.teachers):
        said = f"={one}, with teachers" if options.teachers else " is not set"
        yield (
            f"{NAME}.teacher{said}; allowed: one teacher, or its answers as {NAME}.cache, or "
            f"several teachers as {NAME}.teachers"
        )
    if options.teachers and options.teacher_parallel is not None:
        yield f"{NAME}.teacher_parallel is of one teacher; of several, each has its own `parallel`"
    for option, teacher in options.named.items():
        sources, phases = list(config.data.sources), [each.name for each in config.data.phases]
        for what, asked, known in (
            ("source", teacher.sources, sources), ("phase", teacher.phases, phases),
        ):  # fmt: skip
            for name in asked or ():
                if name not in known:
                    yield (
                        f"{NAME}.{option}.{what}s: {name} is not a {what} of the data; allowed: "
                        f"{', '.join(known) or f'none, as data.{what}s has none'}"
                    )
        if teacher.cache is not None:
            place = f"{NAME}.cache" if option == "teacher" else f"{NAME}.{option}.cache"
            yield from cache_problems(
                config, f"{place}={teacher.cache}", teacher,
                temperature=options.temperature, conversations=conversations,
            )  # fmt: skip
        elif teacher.checkpoint is None:
            yield f"{NAME}.{option} has neither checkpoint nor cache; allowed: one of them, or both"
        else:
            name = f"{NAME}.{option}={teacher.checkpoint}"
            yield from problems_of_checkpoint(config, name, teacher, teacher.checkpoint)


def problems_of_checkpoint(
    config: RunConfig, name: str, options: "Teacher", checkpoint: Path
) -> Iterator[str]:
    """Why a checkpoint cannot teach a run's model.

    Args:
        name: the option and its value, for the sentence.
    """
    try:
        folder = find_checkpoint(checkpoint)
        teacher = teacher_config(config, options)
    except ConfigError as error:
        yield from (f"{name}: {each}" for each in error.problems)
        return
    except UserError as error:
        yield f"{name}: {error}"
        return
    if teacher.model.attn_mask_type != "causal":
        yield (
            f"{name} must have model.attn_mask_type=causal; it is {teacher.model.attn_mask_type}"
        )
    for whose, model in (
        ("the student has", config.model),
        (f"{checkpoint} has", teacher.model),
    ):
        if model.num_meta_tokens:
            yield (
                f"{name}: {whose} model.num_meta_tokens={model.num_meta_tokens}, which is "
                "not supported: rows of the two would not be of one length; allowed: 0"
            )
    words, theirs = config.model.vocab_size, teacher.model.vocab_size
    if words is not None and words != theirs:
        yield (f"{name} has model.vocab_size={theirs}; it must be the student's, {words}")
    elif (problem := _tokenizer_problem(config, name, folder)) is not None:
        yield problem


def teacher_config(
    config: RunConfig, options: "Teacher", world_size: int | None = None
) -> RunConfig:
    """The run of a student with its teacher's model, in the teacher's layout.

    Data, micro batches and precision are those of the run. The layers are cut evenly into
    pipeline stages, without virtual ones.

    Args:
        world_size: ranks of the run; None: not known.

    Raises:
        UserError: there is no such checkpoint, it says not of which model it is, or the model
            cannot be in that layout.
    """
    assert options.checkpoint is not None, "a cached teacher has no model"
    saved = read_config(find_checkpoint(options.checkpoint), which=rules.MODEL)
    parallel = teacher_layout(config, saved, options)
    cut = cut_evenly(saved.model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size)
    training = config.training.model_copy(
        update={
            "objective": "pretraining", "objective_options": {}, "callbacks": (),
            "recompute_granularity": None, "recompute_method": None,
            "recompute_num_layers": None, "recompute_modules": (),
        }
    )  # fmt: skip
    values = config.model_copy(
        update={
            "model": saved.model.model_copy(
                update={
                    "hybrid_layer_pattern": cut,
                    # As many rows of padding: parts of the vocabulary are the student's.
                    "make_vocab_size_divisible_by": config.model.make_vocab_size_divisible_by,
                }
            ),
            "parallel": parallel, "training": training,
            "gpu": GpuConfig(
                cp_comm_type=config.gpu.cp_comm_type,
                attention_backend=config.gpu.attention_backend,
            ),
        }
    ).model_dump(mode="json")  # fmt: skip
    return load_config([], base=values, which=_RULES, world_size=world_size)


def teacher_layout(config: RunConfig, saved: RunConfig, options: "Teacher") -> ParallelConfig:
    """The student's layout but for what the options say; experts are shared where there are any."""
    ours = config.parallel
    asked = {name: size for name, size in options.parallel or () if size is not None}
    experts = saved.model.num_moe_experts
    found = {
        "tensor_model_parallel_size": ours.tensor_model_parallel_size,
        "pipeline_model_parallel_size": ours.pipeline_model_parallel_size,
        "context_parallel_size": ours.context_parallel_size,
        "expert_model_parallel_size": ours.expert_model_parallel_size if experts else 1,
    } | asked
    split = found["tensor_model_parallel_size"] > 1
    if found["tensor_model_parallel_size"] == ours.tensor_model_parallel_size:
        split = ours.sequence_parallel
    etp = ours.expert_tensor_parallel_size if experts and not asked else None
    return ParallelConfig(
        sequence_parallel=split, expert_tensor_parallel_size=etp,
        mamba_cp_comm_type=ours.mamba_cp_comm_type, **found,
    )  # fmt: skip


def shares_groups(config: RunConfig, teacher: RunConfig) -> bool:
    """Whether the teacher's layout is the student's, but for how stages are cut.

    Groups of experts are nothing to a model without any.
    """
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"]
    if teacher.model.num_moe_experts is not None:
        names += ["expert_model_parallel_size", "expert_tensor_parallel_size"]
    return all(getattr(config.parallel, n) == getattr(teacher.parallel, n) for n in names)


def _tokenizer_problem(config: RunConfig, name: str, folder: Path) -> str | None:
    ours = tokenizer_of(config)
    if ours is None:
        return None
    try:
        theirs = load_tokenizer(folder)
    except UserError as error:
        return f"{name}: {error}"
    if (ours.fingerprint, ours.eod) == (theirs.fingerprint, theirs.eod):
        return None
    return (
        f"{name} has another tokenizer than data.tokenizer_model="
        f"{config.data.tokenizer_model}; a copy of it is in {folder}"
    )
