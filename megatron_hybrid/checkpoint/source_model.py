"""Which model a distributed checkpoint holds: from the run's own config, or from what is typed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.inert_pickle import Opaque
from megatron_hybrid.checkpoint.megatron_arguments import differences, function_values, run_values
from megatron_hybrid.checkpoint.progress import is_ours
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.saved_config import (
    other_functions,
    read_config,
    refuse_other_model,
)
from megatron_hybrid.config import ModelConfig, RunConfig, build_config, load_config, rules
from megatron_hybrid.config.flags import parse_command_line
from megatron_hybrid.config.layers import in_the_model, refuse_mamba1, refuse_unlike
from megatron_hybrid.config.rules.common import LENGTHS
from megatron_hybrid.config.tracker import CONFIG_FILE


def source_config(reader: CheckpointReader, source: str | None) -> RunConfig:
    """The config of the run that saved a checkpoint.

    Of Megatron-LM's own checkpoints, only the model section and the sequence length are known.

    Args:
        source: a preset or YAML file that describes the model, where the checkpoint does not; one
            that has a config is held against it, and its own is what is given back.

    Raises:
        UserError: nothing describes it, or what does is wrong, or not what the checkpoint says.
    """
    if reader.config_file is None and is_ours(reader.common):
        raise CheckpointError(
            f"{reader.folder}/{CONFIG_FILE} is missing, which the run wrote: nothing says which "
            "model and tokenizer these weights are of"
        )
    saved = None if reader.config_file is None else read_config(reader.folder)
    arguments = reader.common.get("args")
    if source is not None:
        return _described(reader, source, saved, arguments)
    if saved is not None:
        return saved
    if isinstance(arguments, Opaque):
        return build_config(run_values(vars(arguments)), which=())
    raise CheckpointError(
        f"{reader.folder} does not say which model it holds: it has neither a run_config.yaml "
        "nor Megatron-LM's arguments; --model names a preset or YAML file that does"
    )


def trained_config(checkpoint: Path, source: str | None, words: Sequence[str]) -> RunConfig:
    """`source_config` of a checkpoint that another one is made of, which is trained on.

    Args:
        words: changes on top, as on a command line.

    Raises:
        UserError: nothing describes the model, or how it is to be trained.
    """
    with CheckpointReader(checkpoint) as reader:
        config = source_config(reader, source)
        if source is None and reader.config_file is None:
            refuse_unsaid(checkpoint, words)
    return config


def derived_values(source: RunConfig, save: Path) -> dict[str, Any]:
    """A config's values for what is made of its checkpoint.

    How the source began, and where it saved, says nothing of the run that goes on from `save`.
    """
    values = source.model_dump(mode="json")
    values["run_dir"] = str(save.parent if save.name == "checkpoints" else save)
    values["upcycling"] = {}
    values["optimizer"]["restart_schedule"] = False
    for name in ("save", "load", "finetune", "load_optim", "load_rng", "verify_integrity"):
        del values["checkpoint"][name]
    return values


def refuse_unsaid(source: Path, words: Sequence[str]) -> None:
    """Of Megatron-LM's own checkpoint only the model is known: how it is trained must be typed.

    Raises:
        CheckpointError: naming what is not among the words.
    """
    typed = {path for path, _ in parse_command_line(words).values}
    needed = (("optimizer.lr",), ("training.global_batch_size",), LENGTHS)
    unsaid = [" or ".join(names) for names in needed if not typed & set(names)]
    if unsaid:
        raise CheckpointError(
            f"{source} is Megatron-LM's own and does not say how it was trained; set "
            f"{'; '.join(unsaid)}, or name a preset or YAML file with --model"
        )


def _described(
    reader: CheckpointReader, source: str, saved: RunConfig | None, arguments: object
) -> RunConfig:
    """What a preset or YAML file says of a checkpoint that may say something itself."""
    config = load_config([source], which=rules.MODEL)
    if config.model.vocab_size is None:
        raise CheckpointError(
            f"--model {source}: model.vocab_size is not set, and {reader.folder} is taken by its "
            "tensors alone; it must be a whole number of at least 1"
        )
    said: Mapping[str, Any] = {}
    if saved is not None:
        refuse_other_model(reader.folder, config.model, saved.model)
        said = dict(saved.model)
    elif isinstance(arguments, Opaque):
        refuse_other_arguments(reader.folder, arguments, config.model)
        said = function_values(vars(arguments), config.model.hybrid_layer_pattern)
        said = {"vocab_size": vars(arguments).get("vocab_size"), **said}
    found = other_functions(config.model, said)
    if (words := said.get("vocab_size")) not in (None, config.model.vocab_size):
        found.append(f"model.vocab_size={config.model.vocab_size}, in the checkpoint {words}")
    if found:
        raise CheckpointError(
            f"{reader.folder} holds another model than --model {source}: {', '.join(found)}; "
            "allowed: no --model, as the checkpoint itself says which it is"
        )
    # Lengths, data and precision are the run's that saved it, which a file of a model only repeats.
    return config if saved is None else saved


def refuse_other_arguments(folder: Path, arguments: object, model: ModelConfig) -> None:
    """Refuse a checkpoint of Megatron-LM whose arguments are not of this model.

    Args:
        arguments: what the checkpoint holds as `args`, if anything.

    Raises:
        UserError: every argument that differs, with both values.
        ConfigError: layers of unlike sizes, which no argument tells.
    """
    model, what = in_the_model(model), f"{folder}, a checkpoint of Megatron-LM's own,"
    refuse_mamba1(model, what)
    refuse_unlike(model, what)
    found = differences(vars(arguments), model) if isinstance(arguments, Opaque) else []
    if found:
        lines = (f"  - {difference}" for difference in found)
        raise CheckpointError("\n".join([f"{folder} holds another model:", *lines]))
