"""`megatron-hybrid compress score`: what of a model matters, for `compress prune`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_hybrid.bounds import MOST_COUNT, MOST_PROCESSES
from megatron_hybrid.commands.evaluate import token_progress
from megatron_hybrid.commands.generate import check_launcher, refuse_options, start_ranks
from megatron_hybrid.log import unsaid
from megatron_hybrid.platform.threads import spin_before_sleeping


def score(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="a run's folder, its checkpoints', or one of them")
    ],
    output: Annotated[Path, typer.Option(help="the file of scores, such as scores.safetensors")],
    picture: Annotated[Path | None, typer.Option(help="a PNG of importance by layer")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=MOST_COUNT, help="samples that a rank computes at once")
    ] = 8,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROCESSES, help="start this many ranks on this machine"),
    ] = None,
) -> None:
    """Importance of layers, embedding channels, channels of MLPs, heads and experts.

    By the samples that the run evaluates itself on, `training.eval_iters` steps of them, or by
    `data.data_path=...`. Any layout gives the same: `parallel.tensor_model_parallel_size=2` and its
    like say how ranks divide the model, and the rest of them divide the samples.
    """
    refuse_options(context)
    check_launcher(nproc)
    from megatron_hybrid.checkpoint.files import find_checkpoint

    find_checkpoint(checkpoint)  # what is not there is said before torch is loaded
    spin_before_sleeping()
    from megatron_hybrid.compression.score import open_scoring
    from megatron_hybrid.compression.score import score as run
    from megatron_hybrid.compression.scores import refuse_other_file
    from megatron_hybrid.training.distributed import is_rank_zero, launched_world_size

    refuse_other_file(output)
    if nproc is not None and nproc > 1:
        with unsaid():
            open_scoring(checkpoint, context.args, batch_size=batch_size, world_size=nproc)
        start_ranks(nproc)
    ranks = launched_world_size()
    opened = open_scoring(checkpoint, context.args, batch_size=batch_size, world_size=ranks)
    with token_progress(opened.tokens, shown=is_rank_zero()) as told:
        found = run(opened, ranks=ranks, told=told)
    if not is_rank_zero():
        return
    found.scores.save(output)
    print(f"{output}: of {found.samples} samples, on which the model's loss is {found.loss:.4f}")
    if picture is not None:
        from megatron_hybrid.compression.picture import draw

        draw(found.scores, opened.config.model, picture)
        print(picture)
    print(f"go on with: megatron-hybrid compress prune {checkpoint} --scores {output} --save ...",
          file=sys.stderr)  # fmt: skip
