"""`megatron-hybrid distill ...`: a teacher's answers, kept for runs that learn from them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_hybrid.bounds import MOST_COUNT, MOST_PROCESSES
from megatron_hybrid.commands.app import App, only_with
from megatron_hybrid.commands.data_plan import CONFIG_WORDS
from megatron_hybrid.commands.generate import check_launcher, refuse_options, start_ranks
from megatron_hybrid.log import unsaid
from megatron_hybrid.platform.imports import importing
from megatron_hybrid.platform.threads import spin_before_sleeping

if TYPE_CHECKING:
    from megatron_hybrid.teachers.cache_open import Opened

app = App(help="Keep what a teacher says of the samples of a run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep what a teacher says of the samples of a run."""


@app.command(
    "cache",
    context_settings=CONFIG_WORDS,
    options_metavar="PRESET|FILE.yaml [section.field=value | --flag value]... [OPTIONS]",
)
@only_with("top_p", "min_k")
def cache(
    context: typer.Context,
    teacher: Annotated[
        Path, typer.Option(help="a run's folder, its checkpoints', or one of them, of any layout")
    ],
    output: Annotated[
        Path, typer.Option(help="the folder of the answers; the same for all workers")
    ],
    top_k: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, help="likeliest tokens that are kept of each")
    ] = 64,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=1e-6, max=1.0, help="keep only as many of them as have this probability together"
        ),
    ] = None,
    min_k: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, help="with --top-p: keep at least so many")
    ] = 1,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        typer.Option(help="of kept logits; by default that of the teacher's weights"),
    ] = None,
    block_samples: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_COUNT, help="samples of a file; by default 256 MiB of them"),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROCESSES, help="start this many ranks on this machine"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="say how many samples, tokens and bytes, and write nothing")
    ] = False,
) -> None:
    """Keep a teacher's likeliest tokens for every sample that a run will read.

    The config is the run's, of which the data count; `parallel` is the layout of this worker, and
    `training.micro_batch_size` its own too. Any number of workers may share the work: the same
    command again, on other machines or in a Slurm array (slurm/distill_cache.sbatch). Each takes
    what is missing and what nobody else makes; after a kill, the same command goes on. A run reads
    the folder with training.objective_options.cache=OUTPUT.
    """
    refuse_options(context)
    check_launcher(nproc)
    from megatron_hybrid.errors import UserError
    from megatron_hybrid.fileio import why_not_writable
    from megatron_hybrid.teachers.cache_open import Asked, open_caching
    from megatron_hybrid.training.distributed import is_rank_zero, launched_world_size

    asked = Asked(teacher, output, top_k, top_p, min_k, dtype, block_samples)
    ranks = nproc or launched_world_size()
    if nproc is not None and nproc > 1 and not dry_run:
        with unsaid():
            open_caching(context.args, asked, ranks)
        start_ranks(nproc)
    spin_before_sleeping()
    opened = open_caching(context.args, asked, ranks)
    if is_rank_zero():
        _print(opened)
    if not dry_run:
        if reason := why_not_writable(output):
            raise UserError(f"--output {output}: {reason}")
        with importing():
            from megatron_hybrid.teachers.cache_write import make_answers

        make_answers(opened)


def _print(opened: "Opened") -> None:
    spec, plans = opened.cache.spec, opened.cache.plans
    a_token = spec.token_bytes()
    samples = sum(plan.samples for plan in plans.values())
    most = "" if spec.top_p is None else "at most "
    values = f"{spec.top_k} ids and {spec.dtype} logits"
    print(
        f"{samples:,} samples, {opened.cache.tokens:,} tokens, {most}{a_token:,.6g} bytes a token "
        f"({most}{values}, {a_token / spec.top_k:.3g} bytes each in all): "
        f"{most}{_size(a_token * opened.cache.tokens)} in {_count(opened):,} files"
    )


def _count(opened: "Opened") -> int:
    sizes = opened.cache.spec.block_samples
    stretches = [each for plan in opened.cache.plans.values() for each in plan.stretches]
    return sum(
        -(-(each.end_sample - each.first_sample) // sizes[str(each.seq_length)])
        for each in stretches
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
