"""Small dense checkpoints, what is made of them, and their logits in any layout."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.files import TRACKER_FILE
from megatron_hybrid.config import RunConfig, UpcyclingConfig, load_config, rules
from megatron_hybrid.upcycling.request import Request, upcycled_config
from megatron_hybrid.upcycling.write import Upcycling
from tests.training.runs import words

PATTERN = "M-*-M-"
FFN_HIDDEN_SIZE = 48
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "EP2": (2, ["parallel.expert_model_parallel_size=2"]),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
}
# Of these, PP2 needs the pattern cut in two.
CUT = 3


def cut_in_two(pattern: str) -> str:
    """A pattern for two pipeline stages, as a word."""
    return f"model.hybrid_layer_pattern={pattern[:CUT]}|{pattern[CUT:]}"


def dense_words(run_dir: Path, *more: str) -> list[str]:
    """The command line of a dense run of four steps."""
    return words(
        run_dir, f"model.hybrid_layer_pattern={PATTERN}",
        f"model.ffn_hidden_size={FFN_HIDDEN_SIZE}", "model.init_method_std=0.1", *more,
    )  # fmt: skip


def train(line: Sequence[str]) -> str:
    """On a rank: a whole run; why it ended."""
    from tests.training.runs import trainer

    with trainer(line) as run:
        return str(run.run())


def upcycle(
    dense_run: Path, save: Path, request: Request, *more: str, **options: Any
) -> tuple[RunConfig, Path]:
    """Make a MoE checkpoint of a run's newest: its config and its folder."""
    from megatron_hybrid.checkpoint.files import find_checkpoint
    from megatron_hybrid.checkpoint.reader import CheckpointReader
    from megatron_hybrid.checkpoint.source_model import source_config

    source = find_checkpoint(dense_run)
    with CheckpointReader(source) as reader:
        dense = source_config(reader, None)
    config = upcycled_config(dense, request, save, more)
    how = {name: options.pop(name) for name in ("restart_schedule", "threads") if name in options}
    done = Upcycling(source, dense, config, UpcyclingConfig(**options), **how).write(save)
    return config, done.folder


def as_words(config: RunConfig, folder: Path, *more: str) -> list[str]:
    """A command line that gives a config back, with changes on top."""
    path = folder / f"config-{abs(hash((config, more))):x}.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return [str(path), *more]


def logits(line: Sequence[str], checkpoint: Path, *, upcycle: bool = False) -> Tensor | None:
    """On a rank: `[b, s, V]` logits of fixed tokens; None but on the last pipeline stage.

    Args:
        line: of the model that is built.
        checkpoint: loaded into it; with `upcycle`, a dense one.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    with loaded(line, checkpoint, upcycle=upcycle) as (config, model):
        draws = torch.Generator().manual_seed(1)
        assert config.model.vocab_size is not None
        tokens = torch.randint(0, config.model.vocab_size, (2, 16), generator=draws)
        positions = torch.arange(16).expand_as(tokens)

        def step(_: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
            return chunk(tokens, positions, None), lambda output, non_loss_data: output

        with torch.no_grad():
            found = get_forward_backward_func()(
                forward_step_func=step, data_iterator=iter([]), model=model,
                num_microbatches=1, seq_length=16, micro_batch_size=2, forward_only=True,
                collect_non_loss_data=True,
            )  # fmt: skip
            if not parallel_state.is_pipeline_last_stage():
                return None
            (output,) = found
            gathered: Tensor = gather_from_tensor_model_parallel_region(output)
            return gathered


@contextmanager
def loaded(
    line: Sequence[str], checkpoint: Path, *, upcycle: bool = False
) -> Iterator[tuple[RunConfig, torch.nn.Module]]:
    """On a rank: a model of a command line in eval mode, with a checkpoint in it."""
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups

    config = load_config(line, which=rules.NO_FILES)
    with model_parallel_groups(config, initialize()):
        yield config, build(line, checkpoint, upcycle=upcycle)


def build(line: Sequence[str], checkpoint: Path, *, upcycle: bool = False) -> torch.nn.Module:
    """On a rank whose process groups are made: a model with a checkpoint in it."""
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.training.checkpoint import load_checkpoint

    config = load_config(line, which=rules.NO_FILES)
    engine_config = transformer_config(config, "torch", torch.device("cpu"))
    (model,) = build_model_chunks(config, engine_config, "torch")
    load_checkpoint(config, checkpoint, [model], None, weights_only=True, upcycle=upcycle)
    evaluated: torch.nn.Module = model.eval()
    return evaluated


def dying(at: float | str) -> Callable[[int, int], None]:
    """On a rank: what `write` tells its bytes, which kills the rank when that share is written; or
    the rank is killed in a step of publishing, "publish" or "tracker".
    """

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    written = 0

    def advance(done: int, total: int) -> None:
        nonlocal written
        written += done
        if not isinstance(at, str) and written >= at * total:
            die()

    write_atomic = files.write_atomic

    def die_at_tracker(path: Path, data: str) -> None:
        if path.name == TRACKER_FILE:
            die()
        write_atomic(path, data)

    if at == "publish":
        files.put_in_place = die
    elif at == "tracker":
        files.write_atomic = die_at_tracker
    return advance
