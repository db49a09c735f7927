"""`megatron-hybrid upcycle`: a dense checkpoint becomes a fine-grained mixture of experts."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_hybrid.bounds import MOST_EXPERTS
from megatron_hybrid.commands.options import ModelOption, ThreadsOption, read_option
from megatron_hybrid.commands.progress import byte_progress

logger = logging.getLogger(__name__)


def upcycle(
    context: typer.Context,
    load: Annotated[
        Path, typer.Option(help="the dense checkpoint: one, a folder of them, or a run: its newest")
    ],
    save: Annotated[Path, typer.Option(help="folder of checkpoints to make: what --load takes")],
    experts: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_EXPERTS, help="E: copies of each MLP; there are E * G experts"
        ),
    ],
    granularity: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_EXPERTS, help="G: experts that each copy of an MLP is cut into"
        ),
    ],
    topk: Annotated[int, typer.Option(min=1, max=MOST_EXPERTS, help="T: experts a token goes to")],
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS", help="such as 2,4,10-20, counted from 1; by default all MLPs"
        ),
    ] = None,
    shared_experts: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_EXPERTS,
            help="of the G cuts, those in an expert that every token goes to",
        ),
    ] = 0,
    router_order: Annotated[
        Literal["softmax-topk", "topk-softmax"],
        typer.Option(help="of the probabilities and the choice"),
    ] = "softmax-topk",
    router_std: Annotated[
        float | None,
        typer.Option(min=0, help="standard deviation of the router; default model.init_method_std"),
    ] = None,
    router_noise: Annotated[
        float, typer.Option(min=0, help="standard deviation of noise on each expert's own row")
    ] = 0.0,
    reinit_fraction: Annotated[
        float, typer.Option(min=0, max=0.999, help="share of each expert's channels drawn anew")
    ] = 0.0,
    scale_weights: Annotated[
        bool, typer.Option(help="scale the experts so that a layer's output stays as large")
    ] = True,
    restart_schedule: Annotated[
        bool, typer.Option(help="the learning rate begins its schedule anew; else it goes on")
    ] = True,
    model: ModelOption = None,
    threads: ThreadsOption = None,
    dry_run: Annotated[bool, typer.Option(help="print what would be done, and exit")] = False,
) -> None:
    """Make a MoE checkpoint of a dense one: `upcycle ... [section.field=value | --flag value]...`.

    The '-' layers become 'E' layers. Steps, samples and the plan of the data go on; the optimizer
    is fresh. `pretrain --load SAVE` goes on from there, in any layout.
    """
    from rich.console import Console

    from megatron_hybrid.checkpoint.files import find_checkpoint
    from megatron_hybrid.config.pattern import read_numbers

    chosen = None if layers is None else read_option(read_numbers, layers, "--layers")
    source = find_checkpoint(load)  # what is not there is said before torch is loaded
    from megatron_hybrid.checkpoint.derived import refuse_to_replace
    from megatron_hybrid.checkpoint.saved_config import other_functions, said_of_functions
    from megatron_hybrid.checkpoint.source_model import trained_config
    from megatron_hybrid.config import UpcyclingConfig
    from megatron_hybrid.upcycling.report import print_report
    from megatron_hybrid.upcycling.request import Request, upcycled_config
    from megatron_hybrid.upcycling.write import Upcycling

    request = Request(
        experts, granularity, topk, chosen, shared_experts, router_order == "softmax-topk"
    )
    refuse_to_replace(save)
    dense = trained_config(source, model, context.args)
    config = upcycled_config(dense, request, save, context.args)
    options = UpcyclingConfig(
        router_std=router_std, router_noise=router_noise, reinit_fraction=reinit_fraction,
        scale_weights=scale_weights,
    )  # fmt: skip
    upcycling = Upcycling(
        source, dense, config, options, restart_schedule=restart_schedule, threads=threads
    )
    print_report(dense, config, upcycling, Console())
    if found := other_functions(config.model, said_of_functions(dense.model)):
        logger.warning(
            "note: %s was trained as another function of the same weights: %s",
            source, ", ".join(found),
        )  # fmt: skip
    if dry_run:
        return
    with byte_progress("upcycle") as advance:
        done = upcycling.write(save, advance)
    print(f"{done.folder}: {done.tensors} tensors, {done.nbytes / 1e9:.2f} GB")
    print(f"go on with: megatron-hybrid pretrain --load {save} training.train_tokens=...")
