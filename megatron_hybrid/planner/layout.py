"""What each rank of a config has: its part of the layers, the tokens and the batch."""

from dataclasses import dataclass

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.phases import sequence_lengths


@dataclass(frozen=True)
class Layout:
    """The sizes that memory and time depend on.

    Attributes:
        tp, pp, vpp, cp, ep, etp, dp: sizes of the parallel dimensions; dp without cp.
        chunks: the pattern text of each pipeline segment, in the order of the layers; segment i is
            chunk i // pp of stage i % pp.
        sequence_parallel: norms and residuals are split over TP.
        micro_batch, micro_batches: samples in a forward pass, and how many of those a step has on a
            rank.
        seq_length: tokens, the longest of the run.
    """

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    chunks: tuple[str, ...]
    sequence_parallel: bool
    micro_batch: int
    micro_batches: int
    seq_length: int

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def shards(self) -> int:
        """Ranks that share the optimizer state of dense parameters."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that share the optimizer state of an expert."""
        return self.world_size // (self.pp * self.ep * self.etp)

    @property
    def tokens(self) -> int:
        """Of a micro batch on a rank, where TP ranks see all of them."""
        return self.micro_batch * self.seq_length // self.cp

    @property
    def own_tokens(self) -> int:
        """The same where sequence parallelism splits them."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    def stage_chunks(self, stage: int) -> tuple[str, ...]:
        """The pattern text of each chunk of a stage."""
        return self.chunks[stage :: self.pp]


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The layout of a valid config on `world_size` ranks."""
    p, training = config.parallel, config.training
    tp, pp, cp = (
        p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size,
    )  # fmt: skip
    dp = world_size // (tp * pp * cp)
    chunks = split_layers(config.model.hybrid_layer_pattern, pp)
    return Layout(
        tp, pp, len(chunks) // pp, cp, p.expert_model_parallel_size,
        p.expert_tensor_parallel_size or 1, dp, chunks, p.sequence_parallel,
        training.micro_batch_size,
        training.global_batch_size // (training.micro_batch_size * dp),
        max(sequence_lengths(config)),
    )  # fmt: skip


def split_layers(pattern: str, stages: int) -> tuple[str, ...]:
    """The segments of a pattern; without `|` it is cut evenly, as the engine does."""
    parsed = parse_pattern(pattern)
    if len(parsed.segments) > 1 and stages > 1:
        return parsed.segments
    size = parsed.num_layers // stages
    return tuple(parsed.layers[i * size : (i + 1) * size] for i in range(stages))
