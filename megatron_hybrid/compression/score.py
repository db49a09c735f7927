"""Scoring: a checkpoint's model in a layout, the samples that it is asked about, the file of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.compression.scores import Scores, fingerprint_of
from megatron_hybrid.evaluation.run import Asked, Opened, open_evaluation
from megatron_hybrid.generation.checkpoint import loaded_model
from megatron_hybrid.platform.backend import resolve_backend


@dataclass(frozen=True)
class Scored:
    """What came of it, the same on every rank.

    Attributes:
        loss: of the parent on the same tokens.
    """

    scores: Scores
    samples: int
    loss: float


def open_scoring(
    checkpoint: Path, words: Sequence[str], *, batch_size: int, world_size: int
) -> Opened:
    """Find the checkpoint, its layout and the samples, without the engine.

    Args:
        words: of the layout and the data, as of an evaluation of the run's own data.
        batch_size: samples of a micro batch.

    Raises:
        UserError: the checkpoint, the layout or the data cannot be used.
    """
    return open_evaluation(checkpoint, Asked(batch_size=batch_size), words, world_size=world_size)


def score(opened: Opened, *, ranks: int, told: Callable[[int], None]) -> Scored:
    """Importance of all that `compress prune` cuts, by the samples that a run evaluates itself on.

    Args:
        ranks: that compute.
        told: called with the tokens that were read since the last time.

    Raises:
        UserError: the checkpoint cannot be loaded, or a file cannot be read.
    """
    own, folder = opened.own, opened.folder
    assert own is not None
    with CheckpointReader(folder) as reader:
        fingerprint = fingerprint_of(reader)
    # A packed row is one of several samples: alone, each row is one.
    rows = 1 if opened.config.data.packed_documents else opened.asked.batch_size
    with loaded_model(opened.config, folder, opened.tokenizer, alone=ranks == 1) as (
        config,
        chunks,
    ):
        from megatron_hybrid.compression.activations import Activations, ScoredLosses

        activations = Activations(config, chunks)
        losses = ScoredLosses(activations, config, chunks, resolve_backend("auto"), rows)
        sums = losses.sums_of_batches(own.calls(config, rows, told), len(own.names))
        values, samples = activations.collect()
    loss, count = sums.sum(dim=0).tolist()
    said = {
        "checkpoint": str(folder),
        "samples": str(samples),
        "seq_length": str(opened.config.data.seq_length),
        "data": ", ".join(own.names),
    }
    return Scored(Scores(values, fingerprint, said), samples, loss / count)
