"""The command `megatron-hybrid`: one thin function a command. What is heavy loads on use."""

import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from launchers import torchrun
from launchers.environment import whole_number
from launchers.errors import ERROR_FILE, POSITION, record_error, redirect_output
from launchers.local import launch
from launchers.place import ATTEMPT, LOGS, Place, join, log_folder
from megatron_hybrid.bounds import MOST_PROCESSES
from megatron_hybrid.commands import compress as compress_commands
from megatron_hybrid.commands import convert as convert_commands
from megatron_hybrid.commands import data as data_commands
from megatron_hybrid.commands import distill as distill_commands
from megatron_hybrid.commands.app import App
from megatron_hybrid.commands.config import config as config_command
from megatron_hybrid.commands.evaluate import evaluate
from megatron_hybrid.commands.generate import generate
from megatron_hybrid.commands.plan import UNNEEDED, plan
from megatron_hybrid.commands.preflight import preflight
from megatron_hybrid.commands.smoke_test import smoke_test
from megatron_hybrid.commands.status import status
from megatron_hybrid.commands.submit import submit
from megatron_hybrid.commands.track import track
from megatron_hybrid.commands.upcycle import upcycle
from megatron_hybrid.commands.verdict import verdict
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import file_errors, refusal
from megatron_hybrid.log import JSON, LEVEL, Level, show_log, unsaid
from megatron_hybrid.platform.imports import importing
from megatron_hybrid.platform.threads import spin_before_sleeping
from megatron_hybrid.platform.warm import load_for_forks
from megatron_hybrid.training.lasting_output import lasting_output

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig

app = App(
    help="Train hybrid Mamba-Transformer language models on megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_commands.app, name="data")
app.add_typer(convert_commands.app, name="convert")
app.add_typer(compress_commands.app, name="compress")
app.add_typer(distill_commands.app, name="distill")
_place: Place | None = None  # of this process among the ranks of a job
# Words that are ours to read: presets, section.field=value, Megatron-LM's flags.
_CONFIG_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def log_options(
    log_level: Annotated[
        Level,
        typer.Option(
            envvar=LEVEL, show_envvar=False, help="the least that is shown of the log, on stderr"
        ),
    ] = Level.INFO,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json", envvar=JSON, show_envvar=False, help="the log as JSON, an object a line"
        ),
    ] = False,
) -> None:
    """Train hybrid Mamba-Transformer language models on megatron-core."""
    show_log(log_level, as_json=log_json)


def _show_pretrain_help(asked: bool) -> None:
    if asked:
        from megatron_hybrid import cli_text

        cli_text.print_pretrain_help(Console())
        raise typer.Exit


@app.command(context_settings=_CONFIG_WORDS, add_help_option=False)
def pretrain(
    context: typer.Context,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROCESSES, help="start this many ranks on this machine"),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print the resolved config and exit")] = False,
    show_help: Annotated[
        bool, typer.Option("--help", is_eager=True, callback=_show_pretrain_help)
    ] = False,
) -> None:
    """Train a model: `pretrain PRESET|FILE.yaml [section.field=value | --flag value]...`."""
    launched = os.environ.get("WORLD_SIZE")
    world_size = nproc or (whole_number(os.environ, "WORLD_SIZE", least=1) if launched else None)
    from megatron_hybrid import cli_text
    from megatron_hybrid.config import load_config, rules
    from megatron_hybrid.config.notes import notes
    from megatron_hybrid.training.named import NAMED

    if dry_run:
        which = (*rules.DRY_RUN, *NAMED)
        config = load_config(context.args, which=which, world_size=world_size)
        print(config.to_yaml() + cli_text.unlike_layers_text(config), end="")
        for note in notes(config, world_size):
            logging.getLogger("megatron_hybrid.cli").warning("note: %s", note)
        return
    if nproc and launched:
        raise typer.BadParameter(
            f"a launcher has started this rank already (WORLD_SIZE={launched})",
            param_hint="--nproc",
        )
    if launched and _place is None:
        torchrun.find_place(os.environ)  # says what is missing
    config = load_config(context.args, which=(*rules.ALL, *NAMED), world_size=world_size or 1)
    if nproc is None or nproc == 1:
        if os.environ.get(ATTEMPT) and not (_place and _place.own_console):
            with file_errors(config.run_dir):
                redirect_output(log_folder(config.run_dir), _place.rank if _place else 0)
        spin_before_sleeping()
        with importing():
            from megatron_hybrid.training.pretrain import pretrain as run

        with lasting_output():
            run(config)
        return
    spin_before_sleeping()
    _check_device(config, nproc)
    _check_files(config, nproc)
    argv = ["-m", "megatron_hybrid.cli", "pretrain", *context.args]
    with file_errors(config.run_dir):
        code = launch(argv, nproc, logs=config.run_dir / LOGS, forks=load_for_forks())
    raise typer.Exit(code)


def _check_device(config: "RunConfig", world_size: int) -> None:
    """Refuse before any rank starts what this machine cannot run, where the config depends on it.

    Asking for the device loads torch, which takes seconds; most configs need no answer.
    """
    etp = config.parallel.expert_tensor_parallel_size
    if config.backend == "transformer_engine" or (etp is not None and etp > 1):
        from megatron_hybrid.config import validate
        from megatron_hybrid.platform.backend import probe, resolve_backend

        resolve_backend(config.backend)
        validate(config, world_size, **probe().facts)


def _check_files(config: "RunConfig", world_size: int) -> None:
    """Refuse before any rank starts what cannot be read, or gone on with; takes no torch."""
    from megatron_hybrid.claim import refuse_if_alive
    from megatron_hybrid.training.start import claims, open_run

    refuse_if_alive(claims(config))
    with unsaid():
        open_run(config, world_size)


app.command(
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [section.field=value | --flag value]...",
)(upcycle)
app.command(
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [section.field=value | --flag value]...",
)(submit)
app.command(
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [section.field=value | --flag value]...",
)(preflight)
app.command(
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [section.field=value | --flag value]...",
)(plan)
app.command(context_settings=_CONFIG_WORDS, hidden=True)(verdict)
app.command(
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [parallel.field=value]...",
)(generate)
app.command(
    context_settings=_CONFIG_WORDS,
    options_metavar="[OPTIONS] [section.field=value]...",
)(evaluate)
app.command()(status)
app.command()(track)
app.command("smoke-test")(smoke_test)
app.command("config", no_args_is_help=True)(config_command)


@app.command(context_settings=_CONFIG_WORDS)
def counts(context: typer.Context) -> None:
    """Parameters and FLOPs of a model: `counts PRESET|FILE.yaml [section.field=value]...`."""
    from megatron_hybrid import cli_text
    from megatron_hybrid.config import load_config, rules

    config = load_config(context.args, which=rules.NO_FILES, stand_in=UNNEEDED)
    cli_text.print_counts(config, Console())


@app.command()
def doctor() -> None:
    """What is installed, what is missing, and which backend would run."""
    from megatron_hybrid.doctor import examine, report

    if not report(examine(), Console()):
        raise typer.Exit(1)


def main() -> None:
    """Run a command. Errors that a user can mend are printed as text; exit codes are 0, 1, 2.

    So is what the file system refuses: a folder that one may not search, a loop of links.
    """
    global _place
    try:
        _place = join(os.environ)
        app(prog_name="megatron-hybrid")
    except UserError as error:
        _end_with(f"{error.label}: {error}")
    except MemoryError as error:  # numpy's and Python's own
        _end_with(f"error: not enough memory: {error or 'Python asked for more'}")
    except Exception as error:
        refused = refusal(error)
        # Of what stops a rank, or a run in its midst, the place in the code says more.
        if refused and ERROR_FILE not in os.environ and POSITION.iteration is None:
            _end_with(f"error: {refused}")
        if not record_error(traceback.format_exc()):
            raise
        sys.exit(1)


def _end_with(text: str) -> NoReturn:
    """Say what went wrong, here or where the launcher finds it, and exit."""
    if not record_error(text):
        print(text, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
