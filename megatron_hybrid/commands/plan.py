"""`megatron-hybrid plan`: memory and time of a run on a cluster, before it runs."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hybrid.bounds import MOST_GPUS
from megatron_hybrid.commands.app import only_with

if TYPE_CHECKING:
    from megatron_hybrid.config import RunConfig
    from megatron_hybrid.planner.balance import Split
    from megatron_hybrid.planner.costs import Costs
    from megatron_hybrid.planner.hardware import Gpu

logger = logging.getLogger(__name__)

FILE_COLUMNS = 160  # of a table that goes to no terminal
# A run needs them, its plan does not go by them.
UNNEEDED = {"optimizer": {"lr": 1e-4}, "training": {"train_iters": 10**6}}


@only_with("balance", "costs", "measure")
@only_with("search", "top")
@only_with("context_tokens", "batch")
def plan(
    context: typer.Context,
    gpus: Annotated[int, typer.Option(min=1, max=MOST_GPUS, help="how many GPUs")],
    gpu: Annotated[
        str, typer.Option(help="their kind: h100, h200, b200, b300, gb200, gb300, a100, a10g")
    ] = "h100",
    search: Annotated[
        bool, typer.Option("--search", help="the fastest layouts that fit, with reasons")
    ] = False,
    balance: Annotated[
        bool, typer.Option("--balance", help="cut the pattern so that stages take the same time")
    ] = False,
    costs: Annotated[
        Path | None, typer.Option(help="with --balance: JSON of milliseconds by layer kind")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="with --balance: time the layers on this machine")
    ] = False,
    top: Annotated[int, typer.Option(min=1, max=1000, help="with --search: how many layouts")] = 10,
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="also the memory to generate at this length")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="with --context-tokens: sequences; default 1")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="draw memory by stage into this PNG")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Plan a run: `plan PRESET|FILE.yaml --gpus 512 [section.field=value | --flag value]...`.

    Memory by pipeline stage, a step's time and what it goes for, by data sheets and constants that
    were calibrated on published runs of others. Ends with 1 if the run does not fit.
    """
    from rich.console import Console

    from megatron_hybrid.errors import UserError
    from megatron_hybrid.planner.hardware import GPUS
    from megatron_hybrid.planner.report import Report, print_offers, print_report

    if gpu not in GPUS:
        raise UserError(f"--gpu={gpu} is not known; allowed: {', '.join(GPUS)}")
    if costs and measure:
        raise typer.BadParameter("one or the other", param_hint="--costs, --measure")
    kind, console = GPUS[gpu], Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_COLUMNS
    configs = [_config(context.args, gpus, kind, checked=not search)]
    if search:
        from rich.progress import Progress

        from megatron_hybrid.config.flags import parse_command_line
        from megatron_hybrid.planner.search import SEARCHED
        from megatron_hybrid.planner.search import search as find

        typed = dict(parse_command_line(context.args).values)
        if unread := [name for name in SEARCHED if name in typed]:
            logger.warning(
                "note: %s: no effect, as --search tries layouts of its own", ", ".join(unread)
            )
        with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
            task = bar.add_task("layouts", total=None)
            offers = find(
                configs[0], gpus, kind, top,
                lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        if not as_json:
            print_offers(offers, gpus, kind, console)
        configs = [offer.config for offer in offers]
    if balance:
        configs[0] = _balanced(configs[0], gpus, kind, costs, measure=measure, quiet=as_json)
    # The best alone where tables are printed, of which there is one of all.
    reports = [
        Report.of(config, gpus, kind, context_tokens, batch or 1)
        for config in (configs if as_json else configs[:1])
    ]
    report = reports[0]
    if as_json:
        found = [each.to_dict() for each in reports]
        print(json.dumps(found if search else found[0], indent=1))
    else:
        print_report(report, console)
    if output is not None:
        from megatron_hybrid.fileio import file_errors
        from megatron_hybrid.planner.picture import draw_memory

        with file_errors(output):
            draw_memory(report.memory, kind, report.title, report.summary, output)
    if not report.fits:
        raise typer.Exit(1)


def _config(words: list[str], gpus: int, gpu: "Gpu", *, checked: bool) -> "RunConfig":
    """The run; with --search its own layout need not fit the number of GPUs."""
    from megatron_hybrid.config import load_config, rules
    from megatron_hybrid.config.rules.precision import recipe_of_this_gpu
    from megatron_hybrid.errors import ConfigError
    from megatron_hybrid.model.counts import count_parameters

    if checked:
        config = load_config(
            words, which=rules.NO_FILES, world_size=gpus, has_cuda=True, stand_in=UNNEEDED
        )
    else:
        config = load_config(words, which=rules.NO_FILES, stand_in=UNNEEDED)
    facts = rules.Facts(has_cuda=True, compute_capability=gpu.compute_capability)
    if problems := list(recipe_of_this_gpu(config, facts)):
        raise ConfigError(problems)
    count_parameters(config.model)  # says what is missing for it
    return config


def _balanced(
    config: "RunConfig", gpus: int, gpu: "Gpu", path: Path | None, *, measure: bool, quiet: bool
) -> "RunConfig":
    """The same run with its pattern cut anew; says how much that is worth."""
    from megatron_hybrid.config.layers import sort_of_each
    from megatron_hybrid.errors import UserError
    from megatron_hybrid.planner.balance import Balancer
    from megatron_hybrid.planner.layer_time import Rank
    from megatron_hybrid.planner.layout import chunk_sorts, layout_of
    from megatron_hybrid.planner.step_time import transfer_seconds

    layout = layout_of(config, gpus)
    if layout.pp == 1:
        raise UserError(
            "--balance needs parallel.pipeline_model_parallel_size of at least 2; it is 1"
        )
    layers = [sort.name for sort in sort_of_each(config.model)]
    found = _costs(config, gpus, gpu, path, layers, measure=measure)
    transfer = 0.0 if path or measure else 1e3 * transfer_seconds(Rank(config, layout, gpu))
    balancer = Balancer(layers, found, layout.pp, layout.vpp, layout.micro_batches, transfer)
    best = balancer.best()
    if not quiet:
        now = [[sort.name for sort in chunk] for chunk in chunk_sorts(config.model, layout)]
        _print_balance(found, balancer.timed(tuple(now)), best)
    model = config.model.model_copy(update={"hybrid_layer_pattern": best.pattern})
    return config.model_copy(update={"model": model})


def _costs(
    config: "RunConfig",
    gpus: int,
    gpu: "Gpu",
    path: Path | None,
    layers: list[str],
    *,
    measure: bool,
) -> "Costs":
    from megatron_hybrid.planner.costs import read_costs
    from megatron_hybrid.planner.search import predicted_costs

    if path is not None:
        return read_costs(path, layers)
    if not measure:
        return predicted_costs(config, gpus, gpu)
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import process_groups, select_device

    select_device()
    platform = initialize()
    from megatron_hybrid.planner.measure import measure_costs, one_rank, timed_otherwise

    if note := timed_otherwise(config, has_cuda=platform.has_cuda):
        logger.warning("note: %s", note)
    single = one_rank(config, "".join(name[0] for name in layers))
    with process_groups(single, platform, alone=True):
        return measure_costs(single)


def _print_balance(costs: "Costs", now: "Split", best: "Split") -> None:
    print("milliseconds a micro batch, forward and backward:")
    for name, cost in costs.of.items():
        print(f"  {name:9}  {cost.forward_ms:8.3f}  {cost.backward_ms:8.3f}")
    gain = now.step_ms / best.step_ms - 1
    print(f"as it is  bubble {now.bubble:.1%}, {now.step_ms:.1f} ms a step: {now.pattern}")
    print(f"balanced  bubble {best.bubble:.1%}, {best.step_ms:.1f} ms a step ({gain:.1%} faster):")
    print(f"model.hybrid_layer_pattern='{best.pattern}'")
