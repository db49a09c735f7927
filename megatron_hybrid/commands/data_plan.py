"""`megatron-hybrid data plan`: what a run will read of every source, before anything runs."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hybrid.commands.app import only_with

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig
    from megatron_hybrid.data.saved_plan import SavedPlan
    from megatron_hybrid.data.tokenizer import Tokenizer


logger = logging.getLogger(__name__)

# Words that are ours to read: presets, section.field=value, Megatron-LM's flags.
CONFIG_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}


@only_with("scale", "write")
def plan(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="draw the blend over time into this PNG")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="plan a smaller run with the same epochs, such as 1/15 of the tokens"),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="with --scale: write the smaller run's config to this YAML")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Show what a run would read: of each source in each phase, weight, samples, tokens, epochs.

    The config is given as to `pretrain`. A run that has checkpoints is planned on from the latest
    one. A source that would be read more often than its cap fails the command.
    """
    from rich.console import Console

    from megatron_hybrid.config import load_config, rules
    from megatron_hybrid.config.scale import parse_scale, scale_config
    from megatron_hybrid.data.plan_report import report_plan
    from megatron_hybrid.data.plan_table import print_plan
    from megatron_hybrid.data.run_plan import check_epochs, open_run_sources, training_plan
    from megatron_hybrid.fileio import write_atomic
    from megatron_hybrid.objectives.registry import find_objective, objective_fits

    # No sample depends on the learning rate; a config that is written has it from who wrote it.
    unneeded = {"optimizer": {"lr": 1e-4}} if write is None else None
    which = (*rules.PLAN, objective_fits)
    config = load_config(context.args, which=which, stand_in=unneeded)
    if scale is not None:
        if config.checkpoint.load is not None and not config.checkpoint.finetune:
            logger.warning(
                "note: checkpoint.load=%s has no effect on the smaller run, which begins anew: "
                "its samples are others", config.checkpoint.load,
            )  # fmt: skip
        config = scale_config(config, parse_scale(scale))
        if write is not None:
            _refuse_other_config(write, config)
    saved = _saved_plan(config)
    consumed = saved.consumed_samples if saved else 0
    objective = find_objective(config.training.objective)
    tokenizer = _tokenizer(config)
    sources = open_run_sources(
        config,
        None if tokenizer is None else tokenizer.fingerprint,
        None if tokenizer is None else tokenizer.eod,
        conversations=objective.conversations,
    )
    made = training_plan(config, sources, saved.plan if saved else None, consumed)
    report = report_plan(config, made, consumed)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print_plan(report, Console())
    if output is not None:
        from megatron_hybrid.data.plan_picture import draw_plan  # and matplotlib, which is slow

        with _writing(output):
            draw_plan(made, output, config.run_dir.name, consumed)
    check_epochs(config, made)
    if write is not None:
        with _writing(write):
            write_atomic(write, config.to_yaml())


def _tokenizer(config: "RunConfig") -> "Tokenizer | None":
    """What the files must have been made with; None, and said so: it is not here."""
    from megatron_hybrid.data.tokenizer import build_tokenizer

    data, vocab_size = config.data, config.model.vocab_size
    lacking = None
    if data.tokenizer_type == "null":
        lacking = "model.vocab_size is not set" if vocab_size is None else None
    elif data.tokenizer_model is None:
        lacking = "data.tokenizer_model is not set"
    elif not data.tokenizer_model.exists():
        lacking = f"data.tokenizer_model={data.tokenizer_model}: no such file"
    if lacking is not None:
        logger.warning("note: %s: the files are not held against the run's tokenizer", lacking)
        return None
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model, vocab_size=vocab_size)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What was asked for and cannot be written is the user's to mend."""
    from megatron_hybrid.errors import UserError

    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _refuse_other_config(path: Path, config: "RunConfig") -> None:
    """Refuse to write over what is not the same smaller run of an earlier time."""
    from megatron_hybrid.config import load_config
    from megatron_hybrid.errors import UserError

    if not path.is_file() or not path.stat().st_size:
        return
    try:
        same = load_config([str(path)], which=()).run_dir == config.run_dir
    except UserError:
        same = False
    if not same:
        raise UserError(
            f"--write {path}: a file is there, and not the config of {config.run_dir}; name another"
        )


def _saved_plan(config: "RunConfig") -> "SavedPlan | None":
    """The plan that the run would go on with; None: it starts at its first sample."""
    from megatron_hybrid.checkpoint.saved_config import refuse_other_data, saved_config
    from megatron_hybrid.data.saved_plan import read_saved_plan
    from megatron_hybrid.training.start import find_checkpoint

    folder, weights_only, *_ = find_checkpoint(config)
    if folder is None or weights_only:
        return None
    saved, run = read_saved_plan(folder), saved_config(folder)
    if run is not None:  # as the run would
        refuse_other_data(folder, config, run, has_plan=saved is not None)
    if saved is not None:
        logger.info("planned on from %s", folder)
    else:
        logger.warning(
            "note: %s holds no plan of its data: this is the plan from its beginning, and the run "
            "goes on in it after what it has read", folder,
        )  # fmt: skip
    return saved
