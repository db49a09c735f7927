"""`megatron-hybrid compress prune`: a smaller model's checkpoint, cut from a larger one's."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_hybrid.bounds import MOST_COUNT, MOST_EXPERTS
from megatron_hybrid.commands.options import ModelOption, ThreadsOption, read_option
from megatron_hybrid.commands.progress import byte_progress


def prune(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="the parent: a run's folder, its checkpoints', or one of them")
    ],
    save: Annotated[Path, typer.Option(help="folder of checkpoints to make: what --load takes")],
    num_layers: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_COUNT, help="layers that stay: by --scores, the most important ones"
        ),
    ] = None,
    drop_layers: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", help="that go, such as 43-48,50, counted from 1"),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_COUNT, help="embedding channels, the same in all layers"),
    ] = None,
    ffn_hidden_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_COUNT, help="channels of each MLP")
    ] = None,
    mamba_num_heads: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_COUNT, help="heads of Mamba-2, as many of each group"),
    ] = None,
    mamba_head_dim: Annotated[
        int | None, typer.Option(min=1, max=MOST_COUNT, help="channels of each head of Mamba-2")
    ] = None,
    num_attention_heads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_COUNT, help="query heads, as many of each head of keys and values"
        ),
    ] = None,
    num_moe_experts: Annotated[
        int | None, typer.Option(min=1, max=MOST_EXPERTS, help="experts of each MoE layer")
    ] = None,
    moe_shared_expert_intermediate_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_COUNT, help="channels of each shared expert")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS:FIELD=SIZE",
            help="sizes of some layers, such as 10-20:ffn_hidden_size=9728, counted from 1 in the "
            "parent; may be repeated",
        ),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="importance: a file of `compress score`")
    ] = None,
    keep: Annotated[
        Literal["first"] | None,
        typer.Option(help="without scores: the first channels, heads and experts stay"),
    ] = None,
    restart_schedule: Annotated[
        bool, typer.Option(help="the learning rate begins its schedule anew; else it goes on")
    ] = True,
    model: ModelOption = None,
    threads: ThreadsOption = None,
    dry_run: Annotated[bool, typer.Option(help="print what would be done, and exit")] = False,
) -> None:
    """Cut a smaller model from a trained one: `compress prune RUN --save OUT --hidden-size N ...`.

    Layers, embedding channels, channels of MLPs, heads and experts go; steps, samples and the plan
    of the data go on, and the optimizer is fresh. `pretrain --load SAVE` trains it in any layout.
    """
    from rich.console import Console

    from megatron_hybrid.checkpoint.files import find_checkpoint
    from megatron_hybrid.compression.request import Request, read_sizes
    from megatron_hybrid.config.pattern import read_numbers

    sizes = {
        "ffn_hidden_size": ffn_hidden_size,
        "mamba_num_heads": mamba_num_heads,
        "mamba_head_dim": mamba_head_dim,
        "num_attention_heads": num_attention_heads,
        "num_moe_experts": num_moe_experts,
        "moe_shared_expert_intermediate_size": moe_shared_expert_intermediate_size,
    }
    request = Request(
        num_layers,
        () if drop_layers is None else read_option(read_numbers, drop_layers, "--drop-layers"),
        hidden_size,
        {name: size for name, size in sizes.items() if size is not None},
        [each for text in layers or () for each in read_option(read_sizes, text, "--layers")],
    )
    source = find_checkpoint(checkpoint)  # what is not there is said before torch is loaded
    from megatron_hybrid.checkpoint.derived import refuse_to_replace
    from megatron_hybrid.checkpoint.source_model import trained_config
    from megatron_hybrid.compression.report import print_report
    from megatron_hybrid.compression.write import Pruning

    refuse_to_replace(save)
    parent = trained_config(source, model, context.args)
    pruning = Pruning(
        source, parent, request, save, context.args, scores=scores, keep_first=keep == "first",
        restart_schedule=restart_schedule, threads=threads,
    )  # fmt: skip
    print_report(pruning, Console())
    if dry_run:
        return
    with byte_progress("prune") as advance:
        done = pruning.write(advance)
    print(f"{done.folder}: {done.tensors} tensors, {done.nbytes / 1e9:.2f} GB")
    print(f"go on with: megatron-hybrid pretrain --load {save} training.train_tokens=...")
